"""Discovery: what lies below the root, by day or hour, and what lies where it is never read."""

from __future__ import annotations

import datetime

import pytest

from raysys.errors import DataError, PartitionChangedError
from raysys.ledger.records import PartitionRef
from raysys.partitions import layout
from raysys.partitions.discover import (
    Discovered,
    PartitionRange,
    discover,
    require_as_planned,
    work_folders,
)
from raysys.storage import ObjectInfo, Root

DAY = "events/dt=2017-03-01"


def keys(there: Discovered) -> dict[str, int]:
    """Key of each partition found, in order, -> how many files it has."""
    return {partition.key: len(partition.files) for partition in there.partitions}


def put(root: Root, *paths: str) -> None:
    for path in paths:
        root.put(path, path.encode())


class TestWhatIsThere:
    def test_finds_partitions_by_date_and_item_files(self, root: Root) -> None:
        names = ["events/dt=2017-03-02/b", "events/dt=2017-03-01/b", "events/dt=2017-03-01/a"]
        put(root, *(f"{name}.parquet" for name in [*names, "items/dt=2017-03-01/x", "items/y"]))
        there = discover(root)
        assert there.root_uri == root.uri
        assert [[f.path for f in p.files] for p in there.partitions] == [
            ["events/dt=2017-03-01/a.parquet", "events/dt=2017-03-01/b.parquet"],
            ["events/dt=2017-03-02/b.parquet"],
        ]
        assert [f.path for f in there.item_files] == [
            "items/dt=2017-03-01/x.parquet",
            "items/y.parquet",
        ]
        assert there.partitions[0].files[0].size_bytes == len("events/dt=2017-03-01/a.parquet")

    def test_finds_nothing_in_an_empty_root(self, root: Root) -> None:
        assert discover(root) == Discovered(root_uri=root.uri, partitions=(), item_files=())

    def test_days_and_hours_mix_and_come_by_the_end_of_their_time(self, root: Root) -> None:
        hours = [f"{DAY}/hour={hour}/a.parquet" for hour in ("23", "05")]
        put(root, f"{DAY}/a.parquet", *hours, "events/dt=2017-02-28/a.parquet")
        assert list(keys(discover(root))) == [
            "events/dt=2017-02-28",
            f"{DAY}/hour=05",
            f"{DAY}/hour=23",
            DAY,
        ]

    def test_a_day_that_has_hours_is_no_partition_without_files_of_its_own(
        self, root: Root
    ) -> None:
        put(root, f"{DAY}/hour=05/a.parquet", f"{DAY}/_SUCCESS")
        assert keys(discover(root)) == {f"{DAY}/hour=05": 1}

    def test_lists_the_folders_of_updates(self, root: Root) -> None:
        for folder in (layout.staging("u1"), layout.state_folder("u1"), layout.quarantine("u1")):
            root.put(f"{folder}/x", b"")
        put(root, f"{layout.version_folder('v1')}/x", f"{DAY}/a.parquet")
        assert work_folders(root) == ["staging/u1", "state/u1", "versions/v1", "quarantine/u1"]


class TestEmptyPartitions:
    @pytest.mark.parametrize("name", ["_SUCCESS", "a.parquet.crc", ".a.parquet"])
    def test_a_folder_without_data_is_a_partition_without_files(
        self, root: Root, name: str
    ) -> None:
        put(root, f"{DAY}/{name}", f"events/dt=2017-03-02/hour=05/{name}")
        assert keys(discover(root)) == {DAY: 0, "events/dt=2017-03-02/hour=05": 0}

    @pytest.mark.parametrize("others", [[], [f"{DAY}/hour=04/a.parquet"]], ids=["alone", "beside"])
    def test_so_is_a_folder_in_which_nothing_lies_at_all(
        self, local_root: Root, others: list[str]
    ) -> None:
        for key in (f"{DAY}/hour=05", "events/dt=2017-03-02"):
            local_root.put(f"{key}/x", b"")
            local_root.delete_prefix(f"{key}/x")
        put(local_root, *others)
        found = keys(discover(local_root))
        assert found == {**dict.fromkeys([f"{DAY}/hour=04"] if others else [], 1),
                         f"{DAY}/hour=05": 0, "events/dt=2017-03-02": 0}  # fmt: skip

    @pytest.mark.parametrize(
        "path", ["events/_temporary/0/a.parquet", "events/.dt=2017-03-01/a", "events/other/a.txt"]
    )
    def test_a_folder_of_another_name_is_none_while_it_holds_no_data(
        self, local_root: Root, path: str
    ) -> None:
        put(local_root, path)
        assert keys(discover(local_root)) == {}


STRAYS = [
    "events/2017-03-01/a.parquet",
    "events/dt=2017-3-1/a.parquet",
    "events/dt=2017-02-30/a.parquet",
    "events/dt=2017-03-01/hour=1/a.parquet",
    "events/dt=2017-03-01/hour=24/a.parquet",
    "events/dt=2017-03-01/hour=05/region=eu/a.parquet",
    "events/a.parquet",
]


@pytest.mark.parametrize("within", [PartitionRange(), PartitionRange(last=datetime.date.max)])
@pytest.mark.parametrize("path", STRAYS)
def test_a_file_that_would_never_be_read_is_an_error_that_names_its_place(
    local_root: Root, path: str, within: PartitionRange
) -> None:
    put(local_root, path)
    with pytest.raises(DataError) as caught:
        discover(local_root, within)
    assert (path if path.count("/") == 1 else path.rpartition("/")[0]) in str(caught.value)


class TestRange:
    DAYS = tuple(f"2017-03-{day:02}" for day in range(1, 6))
    MIDDLE = PartitionRange(first=datetime.date(2017, 3, 2), last=datetime.date(2017, 3, 3))

    def test_only_days_of_the_range_are_found(self, root: Root) -> None:
        put(root, *(f"events/dt={day}/hour=05/a.parquet" for day in self.DAYS))
        found = keys(discover(root, self.MIDDLE))
        assert list(found) == [f"events/dt={day}/hour=05" for day in self.DAYS[1:3]]
        assert len(keys(discover(root))) == 5

    def test_other_days_are_not_listed(
        self, local_root: Root, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(local_root, *(f"events/dt={day}/a.parquet" for day in self.DAYS))
        listed: list[str] = []
        whole = Root.list

        def spy(root: Root, prefix: str) -> list[ObjectInfo]:
            listed.append(prefix)
            return whole(root, prefix)

        monkeypatch.setattr(Root, "list", spy)
        discover(local_root, self.MIDDLE)
        assert sorted(listed) == ["events/dt=2017-03-02", "events/dt=2017-03-03", "items"]

    def test_a_stray_file_is_an_error_there_too(self, root: Root) -> None:
        put(root, *(f"events/dt={day}/a.parquet" for day in self.DAYS), "events/a.parquet")
        with pytest.raises(DataError, match=r"^events/a\.parquet: expected files in"):
            discover(root, self.MIDDLE)


class TestAsPlanned:
    def planned(self, root: Root) -> PartitionRef:
        put(root, f"{DAY}/a.parquet", f"{DAY}/b.parquet")
        (partition,) = discover(root).partitions
        return partition

    def test_what_did_not_change_may_be_used_whatever_came_beside_it(self, root: Root) -> None:
        planned = self.planned(root)
        put(root, f"{DAY}/c.parquet", f"{DAY}/hour=05/a.parquet")
        require_as_planned(root, planned)

    def test_a_file_that_is_gone_is_named(self, root: Root) -> None:
        planned = self.planned(root)
        root.delete_prefix(f"{DAY}/b.parquet")
        with pytest.raises(PartitionChangedError, match=r"/b\.parquet vanished after it was plan"):
            require_as_planned(root, planned)

    @pytest.mark.parametrize(
        ("data", "problem"),
        [(b"longer than before, much longer", "has 31 bytes, 30 were planned"),
         (b"x" * 30, "was written anew after it was planned")],
        ids=["size", "etag"],
    )  # fmt: skip
    def test_a_file_that_was_written_anew_is_named(
        self, root: Root, data: bytes, problem: str
    ) -> None:
        planned = self.planned(root)
        root.put(f"{DAY}/a.parquet", data)
        with pytest.raises(PartitionChangedError, match=problem):
            require_as_planned(root, planned)
