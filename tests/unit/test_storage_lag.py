"""Listings that show less than there is: nothing forks, is lost or is used twice."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from raysys.config import load_config
from raysys.errors import PartitionChangedError, StorageUnavailableError
from raysys.ledger.log import Log
from raysys.ledger.records import RolloutChanged
from raysys.storage import Root
from tests.conftest import QUICK
from tests.faulty_s3 import FaultyS3
from tests.helpers import file_uses, rollout
from tests.stub_steps import Steps
from tests.update_shop import DAYS, find_problems, write_catalogue, write_day, write_shop

LISTINGS = "list-type=2"
NUM_RECORDS = 8


def append(root: Root, *reasons: str) -> None:
    """Appends a record for each reason, as a process that knows nothing yet."""
    log = Log(Root(root.uri, QUICK))
    for reason in reasons:
        record = rollout(reason=reason)
        log.transact(lambda state, record=record: record)  # type: ignore[misc]


def reasons(root: Root) -> list[str]:
    records = [entry.record for entry in Log(root).entries()]
    return [record.reason for record in records if isinstance(record, RolloutChanged)]


def sequence_of(key: str) -> int:
    return int(key.rpartition("/")[2].removesuffix(".json"))


HIDDEN: dict[str, Callable[[int], bool]] = {
    "the-last": lambda sequence: sequence == NUM_RECORDS,
    "the-last-three": lambda sequence: sequence > NUM_RECORDS - 3,
    "some-in-the-middle": lambda sequence: sequence in (2, 5),
    "all-but-the-last": lambda sequence: sequence < NUM_RECORDS,
    "all": lambda sequence: True,
}


@pytest.mark.parametrize("hides", HIDDEN.values(), ids=HIDDEN)
class TestLedger:
    def test_a_new_reader_finds_every_record_and_appends_after_the_last(
        self, hides: Callable[[int], bool], faulty_root: Root, faulty_s3: FaultyS3
    ) -> None:
        before = [f"before {number}" for number in range(NUM_RECORDS)]
        append(faulty_root, *before)
        faulty_s3.always("lag", path=LISTINGS, hides=lambda key: hides(sequence_of(key)))
        assert len(faulty_root.list("ledger")) < NUM_RECORDS
        assert Log(faulty_root).refresh().sequence == NUM_RECORDS
        append(faulty_root, "a", "b")
        append(faulty_root, "c")
        faulty_s3.heal()
        assert reasons(faulty_root) == [*before, "a", "b", "c"]

    def test_writers_that_start_together_share_no_place(
        self, hides: Callable[[int], bool], faulty_root: Root, faulty_s3: FaultyS3
    ) -> None:
        faulty_s3.always("lag", path=LISTINGS, hides=lambda key: hides(sequence_of(key)))
        names = [f"writer {number}" for number in range(NUM_RECORDS)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda name: append(faulty_root, name), names))
        faulty_s3.heal()
        assert sorted(reasons(faulty_root)) == names


def test_reads_that_lag_too_end_in_an_error_and_not_in_a_fork(faulty_root: Root) -> None:
    class Lagging(Root):
        """Does not find what another client wrote a moment ago."""

        def read_bytes(self, path: str) -> bytes:
            if sequence_of(path) > 2:
                raise FileNotFoundError(path)
            return super().read_bytes(path)

        def list_names(self, folder: str, after: str = "") -> Any:
            return [name for name in super().list_names(folder, after) if sequence_of(name) <= 2]

    append(faulty_root, "a", "b", "c")
    log = Log(Lagging(faulty_root.uri, QUICK))
    with pytest.raises(StorageUnavailableError, match=r"/0+3\.json exists and cannot be read"):
        log.transact(lambda state: rollout(reason="fork"))
    assert reasons(faulty_root) == ["a", "b", "c"]


class TestDiscovery:
    @pytest.fixture
    def shop(self, faulty_root: Root, tiny_encoder: str) -> Root:
        write_catalogue(faulty_root)
        for day in DAYS[:2]:
            write_day(faulty_root, day)
        return faulty_root

    def update(self, shop: Root, steps: Steps, folder: Path, encoder: str, **keys: str) -> None:
        path = write_shop(folder, shop, encoder)
        lines = "".join(f"\n  {key}: {value}" for key, value in keys.items())
        path.write_text(path.read_text() + (f"partitions:{lines}\n" if lines else ""))
        steps.update(load_config(path))

    def uses(self, shop: Root) -> dict[str, int]:
        assert find_problems(shop) == []
        uses = file_uses(Log(shop).refresh().committed)
        return {content.rpartition(" ")[2]: len(updates) for content, updates in uses.items()}

    def test_a_day_that_was_hidden_is_read_by_the_next_update(
        self, shop: Root, faulty_s3: FaultyS3, tmp_path: Path, tiny_encoder: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        steps = Steps(monkeypatch)
        faulty_s3.always("lag", path=LISTINGS, hides=lambda key: DAYS[1] in key)
        self.update(shop, steps, tmp_path, tiny_encoder)
        assert list(self.uses(shop)) == [f"events/dt={DAYS[0]}/a.parquet"]
        faulty_s3.heal()
        self.update(shop, steps, tmp_path, tiny_encoder)
        assert self.uses(shop) == {f"events/dt={day}/a.parquet": 1 for day in DAYS[:2]}

    def test_a_hidden_file_of_a_day_that_was_read_is_a_late_one(
        self, shop: Root, faulty_s3: FaultyS3, tmp_path: Path, tiny_encoder: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        steps = Steps(monkeypatch)
        write_day(shop, DAYS[1], name="b.parquet")
        faulty_s3.always("lag", path=LISTINGS, hides=lambda key: "b.parquet" in key)
        self.update(shop, steps, tmp_path, tiny_encoder)
        faulty_s3.heal()
        with pytest.raises(PartitionChangedError, match=f"{DAYS[1]}/b.parquet came after"):
            self.update(shop, steps, tmp_path, tiny_encoder)
        self.update(shop, steps, tmp_path, tiny_encoder, late_files="reprocess")
        assert self.uses(shop) == {
            f"events/dt={DAYS[0]}/a.parquet": 1,
            f"events/dt={DAYS[1]}/a.parquet": 1,
            f"events/dt={DAYS[1]}/b.parquet": 1,
        }
