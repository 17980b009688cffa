"""What the HTTP API takes and gives: the one place where pydantic stands.

    JSON body -> RankRequest -> ... -> RankAnswer -> JSON body
    bad body  -> 400 | 422 {"error": "candidates: 'a' stands twice; send each candidate once"}

Unknown keys are errors, so that a misspelt one is not ignored in silence. Every refusal is one line
that names the value and says what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

from raysys.partitions.schema import Surface

MAX_CANDIDATES = 1000
MAX_HISTORY = 1000
MAX_EVENTS = 1000
MAX_ID_CHARS = 256
MAX_QUERY_CHARS = 1000
MAX_SHOWN = 5
"""Values that an error message names; further ones are counted."""
_MAX_VALUE_CHARS = 60
_LAST_TS = 253_402_300_799.0
"""The end of the year 9999, which is the last that a date can name."""

Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARS, pattern=r"\S")]
Ts = Annotated[float, Field(ge=0, le=_LAST_TS, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
FeedbackType = Literal["click", "cart", "purchase"]


class ApiError(Exception):
    """A request that gets an error instead of an answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


def name_some(values: Sequence[str]) -> str:
    """Names the first values of many.

    >>> name_some(["a", "b"]), name_some(list("abcdefgh"))
    ("'a', 'b'", "'a', 'b', 'c', 'd', 'e' and 3 more")
    """
    shown = ", ".join(map(_short, values[:MAX_SHOWN]))
    more = len(values) - MAX_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _each_once(candidates: list[str]) -> list[str]:
    twice = [item for item, count in Counter(candidates).items() if count > 1]
    if twice:
        raise PydanticCustomError(
            "duplicates",
            "{names} stand twice; send each candidate once",
            {"names": name_some(twice)},
        )
    return candidates


class RankRequest(_Strict):
    """Candidates to be ranked for one user."""

    candidates: Annotated[
        list[Id], Field(min_length=1, max_length=MAX_CANDIDATES), AfterValidator(_each_once)
    ]
    """Item ids, each once."""
    user_id: Id | None = None
    """Decides the version that answers, and whose history counts. Stored as a keyed hash only."""
    query: Annotated[str, StringConstraints(max_length=MAX_QUERY_CHARS)] | None = None
    """What the user searched for."""
    history: Annotated[list[Id], Field(max_length=MAX_HISTORY)] | None = None
    """Items to take for the user's history, instead of what the version knows of the user."""
    k: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] | None = None
    """How many ranked items to return: those that the user is shown. Default: all."""
    surface: Surface = "recommend"
    ts: Ts | None = None
    """When the request was made, UNIX seconds. Default: now."""
    request_id: Id | None = None
    """Decides the version if there is no `user_id`, for example the id of a session. It is not
    stored; the answer has a `request_id` of its own, which feedback is sent with."""


class RankedItem(BaseModel):
    """One candidate in its place."""

    item_id: str
    score: float
    """Higher is better. Comparable within one answer only."""
    rank: int
    """From 1."""


class RankAnswer(BaseModel):
    """The ranking, and the id by which feedback refers to it."""

    request_id: str
    version: str
    """The model version that ranked."""
    ranking: list[RankedItem]
    """Best first; equal scores by item id."""
    unknown_candidates: list[str]
    """Candidates that the shop's catalogue has, but not the version that ranked: they are not in
    the ranking. This happens to new items until a version that knows them is promoted."""


class FeedbackEvent(_Strict):
    """What the user did with an item of the answer."""

    event_type: FeedbackType
    item_id: Id
    ts: Ts | None = None
    """When it happened, UNIX seconds. Default: now."""
    rank: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] | None = None
    """Of the item in the answer: lets a rollout compare how high the chosen items stood."""
    price: Amount | None = None
    quantity: Amount | None = None


class FeedbackRequest(_Strict):
    """What came of one answer. Each choice counts once for a rollout, however often it is sent."""

    request_id: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    """The `request_id` of the answer."""
    events: Annotated[list[FeedbackEvent], Field(min_length=1, max_length=MAX_EVENTS)]
    user_id: Id | None = None
    """Not needed. If both have one, it must be the user of the request."""


class FeedbackAnswer(BaseModel):
    """Says that the events are stored: they survive any crash from now on."""

    accepted: int


class ResidentVersion(BaseModel):
    """A version that this replica can answer with."""

    version: str
    roles: list[Literal["stable", "canary", "previous"]]
    num_items: int


class VersionsAnswer(BaseModel):
    """The versions in this replica's memory."""

    versions: list[ResidentVersion]
    missing: dict[str, str]
    """Version that should be resident and is not -> why not."""


class RolloutAnswer(BaseModel):
    """The rollout as this replica follows it."""

    sequence: int
    """Ledger record that this state is at least as new as."""
    rollout_id: str | None
    stable: str | None
    canary: str | None
    previous: str | None
    weight_fraction: float
    measurement: dict[str, Any] | None
    """The controller's newest look at the canary; null without one, or while it is away."""


class HealthAnswer(BaseModel):
    """Alive, or ready."""

    status: Literal["ok"]


class ErrorAnswer(BaseModel):
    """The body of every answer that is not a success."""

    error: str


def describe(errors: Sequence[Any]) -> tuple[int, str]:
    """Returns the status and the one line for what pydantic found wrong; the first error speaks.

    Args:
      errors: `RequestValidationError.errors()` of FastAPI.
    """
    error = errors[0]
    kind, context = error["type"], error.get("ctx", {})
    place = ".".join(str(part) for part in error["loc"][1:])
    if kind == "json_invalid":
        return 400, f"the body is not JSON ({context.get('error', '')}); send one JSON object"
    if not place:
        return 422, "the body is not a JSON object; send one, with Content-Type: application/json"
    return 422, f"{place}: {_problem(kind, context, error)}"


def _problem(kind: str, context: Any, error: Any) -> str:
    match kind:
        case "missing":
            return "is missing; send it"
        case "extra_forbidden":
            return "is an unknown key; leave it out, or see /docs for the known ones"
        case "too_long":
            return f"has {context['actual_length']} entries; send at most {context['max_length']}"
        case "too_short":
            return f"has {context['actual_length']} entries; send at least {context['min_length']}"
        case "string_pattern_mismatch":
            return f"expected text that is not blank{_got(error)}"
        case "duplicates":
            return str(error["msg"])
        case _:
            expected = error["msg"].removeprefix("Input should be ")
            return f"expected {expected[0].lower()}{expected[1:]}{_got(error)}"


def _got(error: Any) -> str:
    # Callers log what they are answered, and a raw user id belongs into no log.
    is_id_of_user = error["loc"][-1] in ("user_id", "request_id")
    return "" if is_id_of_user else f", got {_short(error['input'])}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[:_MAX_VALUE_CHARS]}…"
