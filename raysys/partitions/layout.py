"""Where everything lies below the root.

events/dt=2017-03-01/*.parquet            a day's events     written by the shop, and by replicas
events/dt=2017-03-01/hour=05/*.parquet    an hour's events   written by the shop
items/**/*.parquet                        the catalogue      written by the shop
ledger/   versions/VERSION/   state/UPDATE/                  written by raysys, kept
staging/UPDATE/                                              an update's work, removed after it
quarantine/UPDATE/                                           what it refused, with reasons

Days and hours may mix, even in one day. Both are UTC. A partition's *label* is its key's day or
hour, `2017-03-01` or `2017-03-01T05`: it names the partition where a path does not fit.
"""

from __future__ import annotations

import datetime
import re

from raysys.errors import DataError

EVENTS = "events"
ITEMS = "items"
STAGING = "staging"
STATE = "state"
VERSIONS = "versions"
QUARANTINE = "quarantine"
REPLAYS = "replays"
HELD_OUT = "held_out"
"""Below an update's `state/`: the draws of who is held out."""
SEEN = "seen"
"""Below an update's `state/`: the events that this update read."""

SERVED_FILES = ("impressions-", "feedback-")
"""How files begin that replicas write below `events/`, at any time of any day."""

DAY_S = 86_400.0
HOUR_S = 3_600.0
EXPECTED = f"{EVENTS}/dt=YYYY-MM-DD/ or {EVENTS}/dt=YYYY-MM-DD/hour=HH/"

_PARTITION = re.compile(rf"{EVENTS}/dt=(\d{{4}}-\d{{2}}-\d{{2}})(?:/hour=([01]\d|2[0-3]))?")
_DAY_START, _DAY_END = len(f"{EVENTS}/dt="), len(f"{EVENTS}/dt=YYYY-MM-DD")
_EPOCH = datetime.date(1970, 1, 1).toordinal()


def events_prefix(day: datetime.date) -> str:
    """Returns the key of a day's partition.

    >>> events_prefix(datetime.date(2017, 3, 1))
    'events/dt=2017-03-01'
    """
    return f"{EVENTS}/dt={day.isoformat()}"


def partition_label(key: str) -> str:
    """Returns the day or hour of a partition.

    >>> partition_label("events/dt=2017-03-01"), partition_label("events/dt=2017-03-01/hour=05")
    ('2017-03-01', '2017-03-01T05')

    Raises:
      DataError: The key names neither.
    """
    match = _PARTITION.fullmatch(key)
    try:
        if match is not None:
            datetime.date.fromisoformat(match[1])
            return match[1] if match[2] is None else f"{match[1]}T{match[2]}"
    except ValueError:
        pass
    raise DataError(f"folder {key}: expected {EXPECTED}; rename it, or move it out of {EVENTS}/")


def is_partition(key: str) -> bool:
    """Returns whether the key names a day or an hour."""
    try:
        return bool(partition_label(key))
    except DataError:
        return False


def partition_date(key: str) -> datetime.date:
    """Returns the day of a partition, or the day in which its hour lies.

    >>> partition_date("events/dt=2017-03-01/hour=05")
    datetime.date(2017, 3, 1)

    Raises:
      DataError: The key names neither.
    """
    return label_date(partition_label(key))


def partition_span(key: str) -> tuple[float, float]:
    """Returns when a partition's events begin and end, UNIX seconds.

    >>> start, end = partition_span("events/dt=1970-01-02/hour=05")
    >>> start / 3600, end / 3600
    (29.0, 30.0)

    Raises:
      DataError: The key names neither day nor hour.
    """
    label = partition_label(key)
    midnight = (label_date(label).toordinal() - _EPOCH) * DAY_S
    if len(label) == len("YYYY-MM-DD"):
        return midnight, midnight + DAY_S
    start = midnight + int(label[-2:]) * HOUR_S
    return start, start + HOUR_S


def label_date(label: str) -> datetime.date:
    """Returns the day of a label."""
    return datetime.date.fromisoformat(label[: len("YYYY-MM-DD")])


def label_order(label: str) -> str:
    """Returns what sorts labels by the end of their time, a day after the last of its hours.

    >>> sorted(["2017-03-02T00", "2017-03-01", "2017-03-01T23"], key=label_order)
    ['2017-03-01T23', '2017-03-01', '2017-03-02T00']
    """
    return label if "T" in label else f"{label}T24"


def path_day(path: str) -> str:
    """Returns the day, YYYY-MM-DD, of a partition's key or of a file in it.

    >>> path_day("events/dt=2017-03-01/hour=05/a.parquet")
    '2017-03-01'
    """
    return path[_DAY_START:_DAY_END]


def staging(update_id: str) -> str:
    """Returns the folder of an update's work, which is removed after it."""
    return f"{STAGING}/{update_id}"


def state_folder(update_id: str) -> str:
    """Returns the folder of what the next update starts from: counts, histories, items."""
    return f"{STATE}/{update_id}"


def version_folder(version: str) -> str:
    """Returns the folder of a version's artifacts."""
    return f"{VERSIONS}/{version}"


def quarantine(update_id: str) -> str:
    """Returns the folder of the rows and files that an update refused."""
    return f"{QUARANTINE}/{update_id}"
