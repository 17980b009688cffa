"""Periods and windows: the stretches of time of days, of hours, and of both."""

from __future__ import annotations

import datetime

import pytest

from raysys.partitions.layout import label_order, partition_label, partition_span
from raysys.partitions.periods import periods_of, window_start
from tests.helpers import partition

MARCH = datetime.datetime(2017, 3, 1, tzinfo=datetime.UTC).timestamp()


def hours_of_march(labels: list[str], period_days: int = 7) -> list[float]:
    ends = [p.end for p in periods_of([partition(label) for label in labels], period_days)]
    return [(end - MARCH) / 3600 for end in ends]


def day(number: int) -> str:
    return f"2017-03-{number:02}"


@pytest.mark.parametrize(
    ("days", "period_days", "last_days"),
    [
        pytest.param([1], 7, [1], id="one day"),
        pytest.param([1, 7], 7, [7], id="a week"),
        pytest.param([1, 8], 7, [1, 8], id="a week and a day"),
        pytest.param([*range(1, 29)], 7, [7, 14, 21, 28], id="four weeks"),
        pytest.param([5, 1, 3], 2, [1, 3, 5], id="in any order"),
        pytest.param([1, 30], 1, [1, 30], id="a gap is no period and costs nothing"),
    ],
)
def test_periods_hold_the_days_that_there_are(
    days: list[int], period_days: int, last_days: list[int]
) -> None:
    assert hours_of_march([day(n) for n in days], period_days) == [24 * n for n in last_days]


@pytest.mark.parametrize(
    ("labels", "period_days", "ends"),
    [
        pytest.param([f"{day(1)}T{h:02}" for h in range(5)], 7, [5], id="hours of one day"),
        pytest.param([f"{day(1)}T05", day(1)], 7, [24], id="a day and an hour in it"),
        pytest.param([f"{day(1)}T23", f"{day(2)}T22"], 1, [47], id="24 hours over midnight"),
        pytest.param([f"{day(1)}T23", f"{day(2)}T23"], 1, [24, 48], id="25 hours"),
    ],
)
def test_a_period_ends_with_its_last_hour(
    labels: list[str], period_days: int, ends: list[float]
) -> None:
    assert hours_of_march(labels, period_days) == ends


@pytest.mark.parametrize(
    ("labels", "start"),
    [
        pytest.param([day(1)], 0, id="a single day"),
        pytest.param([day(1), day(2), day(3)], 0, id="fewer days than the window has"),
        pytest.param([day(1), day(4), day(10)], 3 * 24, id="a window of seven days"),
        pytest.param([f"{day(1)}T05", f"{day(1)}T06"], 5, id="hours"),
        pytest.param([f"{day(1)}T05", f"{day(9)}T05"], 30, id="seven days of hours"),
    ],
)
def test_the_evaluation_window_is_the_newest_days_of_the_update(
    labels: list[str], start: float
) -> None:
    assert window_start([partition(label) for label in labels], 7) == MARCH + start * 3600


@pytest.mark.parametrize(
    ("labels", "num_days"),
    [
        pytest.param([day(1), day(2), day(5)], 3, id="days, with a gap"),
        pytest.param([f"{day(1)}T{h:02}" for h in range(6)], 0.25, id="hours"),
        pytest.param([day(1), f"{day(1)}T05", f"{day(2)}T00"], 25 / 24, id="a day and its hour"),
    ],
)
def test_a_period_knows_how_much_time_its_partitions_cover(
    labels: list[str], num_days: float
) -> None:
    (period,) = periods_of([partition(label) for label in labels], 7)
    assert period.num_days == pytest.approx(num_days)


def test_labels_sort_as_their_time_ends() -> None:
    labels = [f"2017-{month:02}-28" for month in range(1, 13)]
    labels += [f"{label}T{hour:02}" for label in labels for hour in range(24)]
    keys = [partition(label).key for label in labels]
    assert [partition_label(key) for key in keys] == labels
    ends = [
        partition_span(key)[1]
        for key in sorted(keys, key=lambda k: label_order(partition_label(k)))
    ]
    assert ends == sorted(ends)
