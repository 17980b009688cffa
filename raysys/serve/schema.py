"""What the HTTP API takes and gives: the one place where pydantic stands.

    JSON body -> RankRequest | SearchRequest | RecommendRequest | AdsRequest -> ... -> JSON body
    bad body  -> 400 | 422 {"error": "candidates: 'a' stand twice; send each candidate once"}

Unknown keys are errors, so that a misspelt one is not ignored in silence, and types are strict: "3"
is no number. Every refusal is one line that names the value and says what to do. The answers'
models are what /docs shows; `serve.answer` writes their JSON without going through them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError

from raysys.ledger.records import RolloutPhase
from raysys.partitions.schema import Surface

MAX_CANDIDATES = 1000
MAX_HISTORY = 1000
MAX_EVENTS = 1000
MAX_FILTER_VALUES = 100
MAX_EXCLUDED = 1000
MAX_ID_CHARS = 256
MAX_QUERY_CHARS = 1000
MAX_REASON_CHARS = 500
DEFAULT_K = 10
"""Items of an answer to `search` and `recommend`, where the caller names no candidates."""
MAX_SHOWN = 5
"""Values that an error message names; further ones are counted."""
_MAX_VALUE_CHARS = 60
_LAST_TS = 253_402_300_799.0
"""The end of the year 9999, which is the last that a date can name."""
_MAX_AMOUNT = 1e15

# A NUL would set apart what a terminal, a log or C code shows as one.
_NOT_BLANK = r"^[^\x00]*[^\s\x00][^\x00]*$"
_NO_NUL = r"^[^\x00]*$"
_WITHOUT_A_REGEX = {_NOT_BLANK: "text that is not blank and has no NUL", _NO_NUL: "no NUL in it"}

Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARS, pattern=_NOT_BLANK)]
Query = Annotated[str, StringConstraints(max_length=MAX_QUERY_CHARS, pattern=_NO_NUL)]
Ts = Annotated[float, Field(ge=0, le=_LAST_TS, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, le=_MAX_AMOUNT, allow_inf_nan=False)]
NumItems = Annotated[int, Field(ge=1, le=MAX_CANDIDATES)]
FeedbackType = Literal["click", "cart", "purchase"]


class ApiError(Exception):
    """A request that gets an error instead of an answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def name_some(values: Sequence[str]) -> str:
    """Names the first values of many.

    >>> name_some(["a", "b"]), name_some(list("abcdefgh"))
    ("'a', 'b'", "'a', 'b', 'c', 'd', 'e' and 3 more")
    """
    shown = ", ".join(map(_short, values[:MAX_SHOWN]))
    more = len(values) - MAX_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _check_once(item_ids: Sequence[str]) -> None:
    if len(set(item_ids)) == len(item_ids):
        return
    twice = [item for item, count in Counter(item_ids).items() if count > 1]
    raise PydanticCustomError(
        "duplicates",
        "{names} stand twice; send each candidate once",
        {"names": name_some(twice)},
    )


def _each_once(candidates: list[str]) -> list[str]:
    _check_once(candidates)
    return candidates


class _Asked(_Strict):
    """What every request may say of who asks, and of the answer it wants."""

    user_id: Id | None = None
    """Decides the version that answers, and whose history counts. Stored as a keyed hash only."""
    history: Annotated[list[Id], Field(max_length=MAX_HISTORY)] | None = None
    """Items to take for the user's history, instead of what the version knows of the user."""
    explain: bool = False
    """Whether each item of the answer says what its score is made of, and which rules moved it."""
    ts: Ts | None = None
    """When the request was made, UNIX seconds. Default: now."""
    request_id: Id | None = None
    """Decides the version if there is no `user_id`, for example the id of a session. It is not
    stored; the answer has a `request_id` of its own, which feedback is sent with."""


class RankRequest(_Asked):
    """Candidates to be ranked for one user."""

    candidates: Annotated[
        list[Id], Field(min_length=1, max_length=MAX_CANDIDATES), AfterValidator(_each_once)
    ]
    """Item ids, each once."""
    query: Query | None = None
    """What the user searched for."""
    k: NumItems | None = None
    """How many ranked items to return: those that the user is shown. Default: all."""
    surface: Surface = "recommend"


class Filters(_Strict):
    """What items must have to be in an answer; of the item table's attributes, these are all."""

    category: Annotated[list[Id], Field(min_length=1, max_length=MAX_FILTER_VALUES)] | None = None
    """Any of these categories."""
    brand: Annotated[list[Id], Field(min_length=1, max_length=MAX_FILTER_VALUES)] | None = None
    """Any of these brands."""
    min_price: Amount | None = None
    """At least this, in the shop's currency. An item without a price has none that is in range."""
    max_price: Amount | None = None
    exclude_items: Annotated[list[Id], Field(max_length=MAX_EXCLUDED)] | None = None
    """None of these items; those that the version does not know are left out anyway."""

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        low, high = self.min_price, self.max_price
        if low is not None and high is not None and low > high:
            raise PydanticCustomError(
                "empty_range",
                "min_price {low} is above max_price {high}; swap them",
                {"low": low, "high": high},
            )
        return self


class SearchRequest(_Asked):
    """Items to be found by a query, then ranked for the user."""

    query: Annotated[
        str, StringConstraints(min_length=1, max_length=MAX_QUERY_CHARS, pattern=_NOT_BLANK)
    ]
    filters: Filters | None = None
    k: NumItems = DEFAULT_K
    """How many items to return. Fewer come where fewer pass the filters."""


class RecommendRequest(_Asked):
    """Items to be chosen and ranked for a user or a history; without either, popular ones."""

    filters: Filters | None = None
    k: NumItems = DEFAULT_K
    """How many items to return. Fewer come where fewer pass the filters."""
    exclude_seen: bool = False
    """Whether to leave out the items of the user's history: no repeat purchases."""


class AdCandidate(_Strict):
    """An item that someone pays for."""

    item_id: Id
    bid: Amount
    """What the outcome is worth to the advertiser, in the shop's currency."""


def _each_ad_once(candidates: list[AdCandidate]) -> list[AdCandidate]:
    _check_once([candidate.item_id for candidate in candidates])
    return candidates


class AdsRequest(_Asked):
    """Candidates to be ranked by what showing them is worth: probability times bid."""

    candidates: Annotated[
        list[AdCandidate],
        Field(min_length=1, max_length=MAX_CANDIDATES),
        AfterValidator(_each_ad_once),
    ]
    """Items with bids, each item once."""
    reserve: Amount | None = None
    """Ads of which showing is worth less are left out. Default: `ads.reserve` of the config."""
    query: Query | None = None
    """What the user searched for."""
    k: NumItems | None = None
    """How many ads to return: those that the user is shown. Default: all that reach the reserve."""


AnyRequest = RankRequest | SearchRequest | RecommendRequest | AdsRequest


class RankedItem(BaseModel):
    """One item in its place."""

    item_id: str
    rank: int
    """From 1."""
    score: float
    """Higher is better. Comparable within one answer only."""
    probability: float
    """Calibrated chance in [0, 1] of the outcome that the version was trained on."""
    explain: dict[str, float] = Field(default_factory=dict)
    """With `explain`: parts that add up to the score without rules, by name."""
    rules: list[str] = Field(default_factory=list)
    """With `explain`: the rules that moved the item, such as "boost brand=x +0.3"."""


class AdItem(RankedItem):
    """One ad in its place."""

    bid: float
    expected_value: float
    """`probability` times `bid`: ads are ranked by it."""


class _Answer(BaseModel):
    """What every answer says besides its ranking."""

    request_id: str
    """Feedback refers to the answer by it."""
    version: str
    """The model version that ranked."""


class _OfCandidates(_Answer):
    unknown_candidates: list[str]
    """Candidates that the shop's catalogue has, but not the version that ranked: they are not in
    the ranking. This happens to new items until a version that knows them is promoted."""


class RankAnswer(_OfCandidates):
    """The candidates in their order."""

    ranking: list[RankedItem]
    """Best first; equal scores by item id."""


class SearchAnswer(_Answer):
    """The items found, in their order."""

    ranking: list[RankedItem]
    """Best first; equal scores by item id."""


class RecommendAnswer(_Answer):
    """The items chosen, in their order."""

    ranking: list[RankedItem]
    """Best first; equal scores by item id."""


class AdsAnswer(_OfCandidates):
    """The ads that reach the reserve, in their order."""

    ranking: list[AdItem]
    """Largest expected value first; equal ones by item id."""
    num_below_reserve: int
    """Ads left out because showing them is worth less than the reserve."""


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
    phase: RolloutPhase | None
    """null if there never was a rollout."""
    step_index: int | None
    """The step of the plan that a canary on trial is at, from 0."""
    stable: str | None
    canary: str | None
    previous: str | None
    weight_fraction: float
    measurement: dict[str, Any] | None
    """The controller's newest look at the canary; null without one, or while it is away."""


class SteerRequest(_Strict):
    """Why the rollout is steered; the body may be left out."""

    reason: (
        Annotated[
            str, StringConstraints(min_length=1, max_length=MAX_REASON_CHARS, pattern=_NOT_BLANK)
        ]
        | None
    ) = None
    """Recorded in the ledger."""


class StartRequest(_Strict):
    """The version to put on trial beside stable."""

    version: Id
    """A committed version."""
    weight: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = None
    """Share of users that it answers first. Default: that of the plan in the config's `rollout`."""


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
        case "extra_forbidden" if "filters" in error["loc"]:
            return (
                "is no attribute of the item table; filter by "
                f"{', '.join(Filters.model_fields)}, or leave it out"
            )
        case "extra_forbidden":
            return "is an unknown key; leave it out, or see /docs for the known ones"
        case "too_long":
            return f"has {context['actual_length']} entries; send at most {context['max_length']}"
        case "too_short":
            return f"has {context['actual_length']} entries; send at least {context['min_length']}"
        case "string_pattern_mismatch":
            return f"expected {_WITHOUT_A_REGEX[context['pattern']]}{_got(error)}"
        case "duplicates" | "empty_range":
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
