"""The hash chain: a record that was changed after it was written is found, and named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysys.errors import LedgerCorruptError
from raysys.ledger.log import Log
from raysys.ledger.records import Record, UpdateCommitted, decode
from raysys.ledger.seal import seal
from raysys.ledger.state import fold
from raysys.ledger.verify import verify
from raysys.storage import Root
from tests.helpers import (
    abandoned,
    committed,
    item_file,
    partition,
    renewed,
    rollout,
    started,
    write_records,
)

GOLDEN = Path(__file__).parents[1] / "data" / "ledger_v1" / "ledger"
"""Nine records as raysys 0.1 of schema version 1 wrote them; never write them anew."""
NUM_RECORDS = 6


def path(sequence: int) -> str:
    return f"ledger/{sequence:020d}.json"


def edit(root: Root, number: int, *, seals: bool = False, **changes: Any) -> None:
    """Changes a record by hand; who `seals` knows how to make its hash fit again."""
    body = {**json.loads(root.read_bytes(path(number))), **changes}
    if seals:
        del body["hash"]
        root.put(path(number), seal(body))
    else:
        root.put(path(number), json.dumps(body, separators=(",", ":")).encode())


def tear(root: Root) -> None:
    root.put(path(3), root.read_bytes(path(3))[:-20])


def change(root: Root) -> None:
    edit(root, 3, reason="it was always so")


def change_and_seal(root: Root) -> None:
    edit(root, 3, seals=True, reason="it was always so")


def change_the_newest(root: Root) -> None:
    edit(root, NUM_RECORDS, reason="it was always so")


def reformat(root: Root) -> None:
    root.put(path(3), json.dumps(json.loads(root.read_bytes(path(3))), indent=2).encode())


def add_a_line_end(root: Root) -> None:
    root.put(path(3), root.read_bytes(path(3)) + b"\n")


def swap(root: Root) -> None:
    third, fourth = root.read_bytes(path(3)), root.read_bytes(path(4))
    root.put(path(3), fourth)
    root.put(path(4), third)


def delete(root: Root) -> None:
    root.delete_prefix(path(3))


def delete_and_close_the_gap(root: Root) -> None:
    for number in range(3, NUM_RECORDS):
        root.put(path(number), root.read_bytes(path(number + 1)))
        edit(root, number, seals=True, sequence=number)
    root.delete_prefix(path(NUM_RECORDS))


def put_of_another_ledger(root: Root) -> None:
    other = Root(f"{root.uri}/other")
    write_records(other, [rollout(reason="elsewhere")] * 3)
    root.put(path(3), other.read_bytes(path(3)))


def strip_the_hash(root: Root) -> None:
    body = json.loads(root.read_bytes(path(3)))
    del body["hash"], body["prev"]
    root.put(path(3), json.dumps({**body, "schema_version": 1}).encode())


DAMAGE: dict[Callable[[Root], None], str] = {
    tear: "ledger record 3 cannot be read",
    change: "ledger record 3 was changed after it was written: it says hash",
    change_and_seal: "ledger record 3 was changed after it was written: record 4 follows one",
    change_the_newest: "ledger record 6 was changed after it was written: it says hash",
    reformat: "ledger record 3 was changed after it was written: it does not end with its hash",
    add_a_line_end: "ledger record 3 was changed after it was written",
    swap: "ledger record 3 says that it is record 4",
    delete: "ledger record 3 is missing although record 6 exists",
    delete_and_close_the_gap: "ledger record 2 was changed after it was written: record 3 follows",
    put_of_another_ledger: "ledger record 2 was changed .* or else record 3, from a backup",
    strip_the_hash: "ledger record 3 was changed after it was written: it has no hash",
}


@pytest.mark.parametrize("reads", [lambda root: Log(root).refresh(), verify], ids=["log", "verify"])
@pytest.mark.parametrize(
    ("damage", "message"), DAMAGE.items(), ids=[damage.__name__ for damage in DAMAGE]
)
def test_damage_is_detected_and_the_record_named(
    local_root: Root,
    damage: Callable[[Root], None],
    message: str,
    reads: Callable[[Root], object],
) -> None:
    write_records(local_root, [rollout(reason=str(i)) for i in range(NUM_RECORDS)])
    reads(local_root)
    damage(local_root)
    with pytest.raises(LedgerCorruptError, match=message) as caught:
        reads(local_root)
    assert "backup" in str(caught.value) and "\n" not in str(caught.value)


def test_every_byte_of_a_record_is_covered(local_root: Root) -> None:
    write_records(local_root, [started()])
    data = local_root.read_bytes(path(1))
    for place in range(len(data)):
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises(LedgerCorruptError, match="ledger record 1"):
            decode(changed, sequence=1)


def test_a_long_lived_reader_detects_a_record_that_follows_another(local_root: Root) -> None:
    log = Log(local_root)
    log.transact(lambda state: rollout())
    edit(local_root, 1, seals=True, reason="it was always so")
    Log(local_root).transact(lambda state: rollout())
    with pytest.raises(LedgerCorruptError, match="ledger record 1 was changed"):
        log.refresh()


def _with_key(record: Record) -> Record:
    """The fold fills in what a commit of before had no field for."""
    is_commit = isinstance(record, UpdateCommitted)
    return dataclasses.replace(record, user_key_id="key") if is_commit else record


class TestVersion1:
    """What the first release wrote reads for ever, and the chain goes on from it."""

    @pytest.fixture
    def root(self, local_root: Root) -> Root:
        for file in sorted(GOLDEN.iterdir()):
            local_root.put(f"ledger/{file.name}", file.read_bytes())
        return local_root

    def test_still_reads(self, root: Root) -> None:
        first = started(item_files=(item_file(),))
        days = (partition("2017-03-02", "a.parquet", "b.parquet"), partition("2017-03-03"))
        second = started(
            "u0002-bbbbbb", partitions=days[:1], base_version="v0001-aaaaaa",
            base_state="u0001-aaaaaa", private=False, reserved=None,
        )  # fmt: skip
        expected = [
            first,
            renewed(),
            committed(
                first,
                metrics={"before": {"ndcg10": {"mean": 0.3}}},
                artifacts={"versions/v0001-aaaaaa/head.safetensors": "0" * 64},
            ),
            second,
            committed(
                second, quarantined_files={"events/dt=2017-03-02/c.parquet": "cannot be read"}
            ),
            started("u0003-cccccc", partitions=days[1:]),
            abandoned("u0003-cccccc"),
            rollout(measurement={"phase": "inconclusive"}),
            rollout("rolled_back", reason="worse"),
        ]
        found = list(Log(root).entries())
        assert [_with_key(entry.record) for entry in found] == expected
        assert [entry.at for entry in found] == [1488326400.0 + i for i in range(1, 10)]
        assert Log(root).refresh() == fold(found)

    def test_is_chained_on(self, root: Root) -> None:
        Log(root).transact(lambda state: rollout())
        Log(root).transact(lambda state: rollout())
        assert verify(root).num_records == 11

    def test_its_last_record_is_covered_by_the_first_of_version_2(self, root: Root) -> None:
        Log(root).transact(lambda state: rollout())
        data = root.read_bytes(path(9))
        root.put(path(9), data.replace(b"worse", b"wrong"))
        with pytest.raises(LedgerCorruptError, match="ledger record 9 was changed"):
            Log(root).refresh()
