"""Where everything lies below the root.

events/dt=2017-03-01/*.parquet   items/**/*.parquet        written by the shop
ledger/   versions/VERSION/   state/UPDATE/                 written by raysys, kept
staging/UPDATE/                                             an update's work, removed after it
quarantine/UPDATE/                                          what an update refused, with reasons
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
HELD_OUT = "held_out"
"""Below an update's `state/`: the draws of who is held out."""

SERVED_FILES = ("impressions-", "feedback-")
"""How files begin that replicas write below `events/`, at any time of any day."""

_PARTITION = re.compile(rf"{EVENTS}/dt=(\d{{4}}-\d{{2}}-\d{{2}})")


def events_prefix(day: datetime.date) -> str:
    """Returns the key of a day's partition.

    >>> events_prefix(datetime.date(2017, 3, 1))
    'events/dt=2017-03-01'
    """
    return f"{EVENTS}/dt={day.isoformat()}"


def partition_date(key: str) -> datetime.date:
    """Returns the day of a partition.

    >>> partition_date("events/dt=2017-03-01")
    datetime.date(2017, 3, 1)

    Raises:
      DataError: The key does not name a day.
    """
    match = _PARTITION.fullmatch(key)
    try:
        if match is not None:
            return datetime.date.fromisoformat(match[1])
    except ValueError:
        pass
    raise DataError(
        f"folder {key}: expected {EVENTS}/dt=YYYY-MM-DD; rename it, or move it out of {EVENTS}/"
    )


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
