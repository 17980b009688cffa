"""A rotation between two updates with the real ingest: a user stays the same one."""

from __future__ import annotations

import datetime
from pathlib import Path

import polars as pl
import pytest

from raysys import rotate
from raysys.config import load_config
from raysys.ingest.pseudonym import Pseudonymizer
from raysys.ingest.shard_state import load_held_out, load_histories
from raysys.ledger.records import UpdateCommitted
from raysys.partitions.schema import EVENT_SCHEMA
from raysys.storage import Root
from raysys.storage.parquet import to_parquet
from tests.stub_steps import Steps, ingest_in_a_row
from tests.update_shop import DAYS, raw_id, write_catalogue, write_day, write_shop

KEY, NEXT = b"0123456789abcdef", b"fedcba9876543210"
OLD, NEW = Pseudonymizer(KEY), Pseudonymizer(KEY, NEXT)


class TestUpdatesAroundIt:
    def write_served(
        self, root: Root, day: str, keys: Pseudonymizer, into: str | None = None
    ) -> None:
        """What a replica wrote: every user buys one item, as a pseudonym of its key."""
        evening = datetime.datetime.fromisoformat(f"{day}T20:00:00+00:00")
        rows = [
            {"event_id": f"{day}-{keys.key_id}-{number}", "event_type": "purchase",
             "user_id": keys.pseudonym(raw_id(number)), "user_key_id": keys.key_id,
             "item_id": "i00", "ts": evening}
            for number in range(100)
        ]  # fmt: skip
        schema = {name: EVENT_SCHEMA[name] for name in rows[0]}
        frame = pl.DataFrame(rows, schema=schema)
        name = f"feedback-{keys.key_id}-{day}.parquet"
        root.put(f"events/dt={into or day}/{name}", to_parquet(frame))

    @pytest.fixture
    def updates(
        self, tmp_path: Path, tiny_encoder: str, monkeypatch: pytest.MonkeyPatch
    ) -> list[UpdateCommitted]:
        folder = tmp_path / "shop"
        folder.mkdir()
        self.root = Root((folder / "root").as_uri())
        file, keys = write_shop(folder, self.root, tiny_encoder), folder / "key"
        steps = Steps(monkeypatch)
        ingest_in_a_row(monkeypatch)
        write_catalogue(self.root)
        write_day(self.root, DAYS[0])
        self.write_served(self.root, DAYS[0], OLD)
        first = steps.update(load_config(file))
        keys.write_bytes(KEY + b"\n" + NEXT)
        self.rotation = rotate.rotate_key(load_config(file))
        write_day(self.root, DAYS[1])
        for chain in (OLD, NEW):
            self.write_served(self.root, DAYS[1], chain)
        # What the first update has read comes again, as a replica sends what it cannot be sure of.
        self.write_served(self.root, DAYS[0], OLD, into=DAYS[1])
        return [first, steps.update(load_config(file))]

    def test_histories_go_on(self, updates: list[UpdateCommitted]) -> None:
        first, second = (load_histories(self.root, commit.update_id) for commit in updates)
        assert not any(name.startswith("quarantined") for name in updates[1].row_counts)
        users = {OLD.pseudonym(raw_id(n)): NEW.pseudonym(raw_id(n)) for n in range(160)}
        assert set(first["user"]) <= users.keys() and set(second["user"]) <= set(users.values())
        both = first.with_columns(user=pl.col("user").replace_strict(users)).join(
            second, on=["user", "item"], suffix="_after", validate="1:1"
        )
        assert len(both) == len(first)
        assert (both["count_after"] >= both["count"]).all()
        # Item 0 was bought once on the first day and twice on the second, by way of either key.
        served = second.filter(
            pl.col("item") == 0, pl.col("user").is_in(list(users.values())[:100])
        )
        assert len(served) == 100 and (served["count"] >= 3).all()

    def test_an_event_counts_once_over_both(self, updates: list[UpdateCommitted]) -> None:
        assert updates[1].row_counts["seen_before"] == 100

    def test_who_is_held_out_stays_so(self, updates: list[UpdateCommitted]) -> None:
        first, second = (
            dict(load_held_out(self.root, commit.update_id).iter_rows()) for commit in updates
        )
        carried = {NEW.translate(user, OLD.key_id): out for user, out in first.items()}
        assert carried.items() <= second.items() and len(second) > len(first) > 100
