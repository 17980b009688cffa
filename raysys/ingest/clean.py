"""Judges event rows: usable ones are pseudonymised, refused ones get a reason, none is lost.

    columns as read, ColumnPlan -> clean() -> Cleaned: usable + refused = rows read

`read.read_events` calls it, batch by batch. Pure Polars, for Ray Data's tasks.

What happened to columns is counted in rows, by these names:

    added:foo           the file has a column that the contract does not know
    rescued:foo         … and its value is kept in `Cleaned.rescued`
    missing:query       the file has no such column: null
    default:event_type  … and it was filled from the config
    derived:event_id    … and it was made of the row's other values
    cast:price          a value came in another type, and fits
    nulled:price        a value became null: blank text, NaN, or one that does not fit
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import polars as pl

from raysys.ingest.contract import Fitted, complete, fit
from raysys.ingest.pseudonym import Pseudonymizer, carry_forward, is_pseudonym, replace_inside
from raysys.ingest.rescue import RESCUED_SCHEMA, rescue
from raysys.partitions.schema import (
    EVENT_SCHEMA,
    EVENT_TYPES,
    REQUIRED_EVENT_COLUMNS,
    ColumnPlan,
    accepted,
)

CLEAN_SCHEMA: dict[str, pl.DataType] = {
    "user": pl.String(),
    "item_id": pl.String(),
    "ts": pl.Float64(),
    "event_id": pl.String(),
    "event_type": pl.String(),
    "request_id": pl.String(),
    "query": pl.String(),
    "surface": pl.String(),
    "position": pl.Int32(),
    "propensity": pl.Float64(),
    "sample_fraction": pl.Float64(),
    "version": pl.String(),
}
"""Usable rows: `user` is a pseudonym, `ts` UNIX seconds; `request_id` is made of the user and the
time where the shop sent none. `position` and `propensity` are kept for debiasing."""
CLEAN_COLUMNS = list(CLEAN_SCHEMA)
REFUSED_SCHEMA: dict[str, pl.DataType] = {
    **{name: EVENT_SCHEMA[name] for name in ("event_id", "item_id", "ts", "event_type")},
    "reason": pl.String(),
}
"""Refused rows, without the user, since quarantine lies below the root like all else. In a file
whose columns are shifted an id may be the user's, and a type anything: they are null then."""
MAX_CLOCK_SKEW = datetime.timedelta(hours=14)
"""Partitions may be cut by the shop's own time zone."""
_NEVER_NULLED = REQUIRED_EVENT_COLUMNS | {"user_key_id"}
"""A pseudonym without its key's id would be taken for a raw id."""
_MAX_CACHED_USERS = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Cleaned:
    """Where every row that was read went."""

    usable: pl.DataFrame
    """CLEAN_SCHEMA."""
    refused: pl.DataFrame
    """REFUSED_SCHEMA."""
    rescued: pl.DataFrame
    """RESCUED_SCHEMA: of usable rows, the values that the contract does not know, as JSON."""
    row_counts: Counter[str]
    """Refused rows by reason, for example `quarantined: no user_id`."""
    column_counts: Counter[str]
    """Rows by what happened to a column; see the module."""

    @property
    def num_rows(self) -> int:
        """Rows that were read."""
        return len(self.usable) + len(self.refused)

    @classmethod
    def concat(cls, parts: Iterable[Cleaned]) -> Cleaned:
        """Returns all rows of the parts, which may be none."""
        held = list(parts)
        return cls(
            usable=_concat([part.usable for part in held], CLEAN_SCHEMA),
            refused=_concat([part.refused for part in held], REFUSED_SCHEMA),
            rescued=_concat([part.rescued for part in held], RESCUED_SCHEMA),
            row_counts=sum((part.row_counts for part in held), Counter()),
            column_counts=sum((part.column_counts for part in held), Counter()),
        )


class PseudonymCache:
    """Pseudonyms of the users of one file, each computed once."""

    def __init__(self, pseudonymizer: Pseudonymizer) -> None:
        self.key_ids = pseudonymizer.key_ids
        """Of the pseudonyms that a file may hold."""
        self._pseudonymizer = pseudonymizer
        self._known: dict[str, str] = {}

    def of(self, users: pl.Series) -> pl.Series:
        """Returns the pseudonym of each user; null stays null."""
        distinct = users.drop_nulls().unique()
        names: list[str] = distinct.to_list()
        if len(self._known) + len(names) > _MAX_CACHED_USERS:
            self._known.clear()
        for name in names:
            if name not in self._known:
                self._known[name] = self._pseudonymizer.pseudonym(name)
        pseudonyms = pl.Series([self._known[name] for name in names], dtype=pl.String)
        return users.replace_strict(distinct, pseudonyms, default=None, return_dtype=pl.String)

    def carried(self, users: pl.Series, key_ids: pl.Series) -> pl.Series:
        """Returns pseudonyms of earlier keys as those of the newest."""
        return carry_forward(users, key_ids, self._pseudonymizer)


def clean(
    frame: pl.DataFrame, plan: ColumnPlan, pseudonyms: PseudonymCache, span: tuple[float, float]
) -> Cleaned:
    """Splits rows into usable ones and refused ones.

    Args:
      frame: The columns `plan.read`, and `plan.rescued`, as they were read.
      span: UNIX seconds at which the rows' partition begins and ends. A row more than
        `MAX_CLOCK_SKEW` outside is refused, since a wrong time would poison every decayed count.
    """
    fitted = fit(frame, plan.read, EVENT_SCHEMA)
    filled = fitted.frame.with_columns(**{k: pl.lit(v) for k, v in plan.defaults.items()})
    is_refused, refused = _refuse(filled, fitted, plan, pseudonyms.key_ids, span)
    extra = frame.select(plan.rescued) if plan.rescued else None
    if len(refused):
        filled = filled.filter(~is_refused)
        extra = extra.filter(~is_refused) if extra is not None else None
    usable = _usable(filled, pseudonyms, derive_event_id=plan.derive_event_id)
    rescued, num_rescued = pl.DataFrame(schema=RESCUED_SCHEMA), Counter[str]()
    if extra is not None:
        rescued, num_rescued = rescue(extra, raw_users=filled["user_id"], rows=usable)
    reasons = dict(refused["reason"].value_counts().iter_rows())
    return Cleaned(
        usable=usable,
        refused=refused,
        rescued=rescued,
        row_counts=Counter({f"quarantined: {reason}": n for reason, n in reasons.items()}),
        column_counts=_column_counts(fitted, plan, num_rows=len(frame), num_usable=len(usable))
        + num_rescued,
    )


def _column_counts(
    fitted: Fitted, plan: ColumnPlan, *, num_rows: int, num_usable: int
) -> Counter[str]:
    counts = Counter(fitted.counts)
    counts.update({f"added:{name}": num_rows for name in plan.added})
    counts.update({f"missing:{name}": num_rows for name in plan.missing})
    counts.update({f"default:{name}": num_rows for name in plan.defaults})
    if plan.derive_event_id:
        counts["derived:event_id"] = num_usable
    if plan.null_wrong_values:
        nulled = fitted.wrong.keys() - _NEVER_NULLED
        counts.update({f"nulled:{name}": int(fitted.wrong[name].sum()) for name in nulled})
    return +counts


def _refuse(
    filled: pl.DataFrame,
    fitted: Fitted,
    plan: ColumnPlan,
    key_ids: tuple[str, ...],
    span: tuple[float, float],
) -> tuple[pl.Series, pl.DataFrame]:
    """Returns which rows are refused, and those rows, each with the first reason that holds."""
    wrong = {f"wrong {name}": mask for name, mask in fitted.wrong.items()}
    frame = filled.with_columns(**wrong)
    reasons = _reasons(frame, plan, key_ids, span)
    is_refused = frame.select(pl.any_horizontal(holds for _, holds in reasons)).to_series()
    refused = frame.filter(is_refused) if is_refused.any() else frame.clear()
    first = pl.coalesce(pl.when(holds).then(pl.lit(reason)) for reason, holds in reasons)
    return is_refused, _without_user(refused.with_columns(reason=first))


def _without_user(refused: pl.DataFrame) -> pl.DataFrame:
    rows = complete(refused, REFUSED_SCHEMA | {"user_id": pl.String()})
    is_good = {
        "event_id": pl.col("event_id").ne_missing(pl.col("user_id")),
        "item_id": pl.col("item_id").ne_missing(pl.col("user_id")),
        "event_type": pl.col("event_type").is_in(list(EVENT_TYPES)),
    }
    kept = [pl.when(good).then(name).alias(name) for name, good in is_good.items()]
    return rows.with_columns(kept).select(list(REFUSED_SCHEMA))


def _reasons(
    frame: pl.DataFrame, plan: ColumnPlan, key_ids: tuple[str, ...], span: tuple[float, float]
) -> list[tuple[str, pl.Expr]]:
    """Reasons to refuse a row, each with when it holds (never null), the weightiest first."""
    start, end = (datetime.datetime.fromtimestamp(at, datetime.UTC) for at in span)
    ts, event_type, own_key = pl.col("ts"), pl.col("event_type"), pl.col("user_key_id")
    in_span = ts.is_between(start - MAX_CLOCK_SKEW, end + MAX_CLOCK_SKEW)
    checks: dict[str, list[tuple[str, pl.Expr]]] = {
        "user_id": [("no user_id", _is_blank("user_id"))],
        "item_id": [("no item_id", _is_blank("item_id"))],
        "event_id": [("no event_id", _is_blank("event_id"))],
        "ts": [("no ts", ts.is_null()), ("ts outside its partition", ~in_span.fill_null(True))],
        "event_type": [
            ("unknown event_type", ~event_type.is_in(list(EVENT_TYPES)).fill_null(False))
        ],
        "user_key_id": [
            ("pseudonym of another key", own_key.is_not_null() & ~own_key.is_in(list(key_ids))),
            ("user_id is no pseudonym", own_key.is_not_null() & ~is_pseudonym("user_id")),
        ],
    }
    reasons = []
    for name in [*checks, *(name for name in plan.read if name not in checks)]:
        if f"wrong {name}" in frame.columns and _must_fit(name, plan):
            reasons.append(
                (f"{name} is not {accepted(EVENT_SCHEMA[name])}", pl.col(f"wrong {name}"))
            )
        if name in frame.columns:
            reasons += checks.get(name, [])
    return reasons


def _must_fit(name: str, plan: ColumnPlan) -> bool:
    return name in _NEVER_NULLED or not plan.null_wrong_values


def _is_blank(name: str) -> pl.Expr:
    return pl.col(name).fill_null("") == ""


def _usable(
    frame: pl.DataFrame, pseudonyms: PseudonymCache, *, derive_event_id: bool
) -> pl.DataFrame:
    """Turns good rows into CLEAN_SCHEMA."""
    micros = pl.col("ts").dt.timestamp("us")
    rows = frame.with_columns(
        _users(frame, pseudonyms).alias("user"),
        (micros / 1e6).alias("ts"),
        micros.cast(pl.String).alias("micros"),
    )
    if derive_event_id:
        request = pl.col("request_id").fill_null("") if "request_id" in rows.columns else pl.lit("")
        parts = ["user", "micros", "event_type", "item_id", request]
        rows = rows.with_columns(event_id=pl.concat_str(parts, separator="|"))
    if {"user_key_id", "request_id"} <= set(rows.columns):
        # Replicas write the pseudonym into the ids that they sign.
        rows = replace_inside(rows, "request_id", old="user_id", new="user")
    rows = complete(rows, CLEAN_SCHEMA | {"micros": pl.String()})
    if rows.select(_is_blank("request_id").any()).item():
        own = pl.concat_str("user", "micros", separator="@")
        given = pl.when(_is_blank("request_id")).then(own).otherwise(pl.col("request_id"))
        rows = rows.with_columns(request_id=given)
    return rows.select(CLEAN_COLUMNS)


def _users(frame: pl.DataFrame, pseudonyms: PseudonymCache) -> pl.Series:
    if "user_key_id" not in frame.columns:
        return pseudonyms.of(frame["user_id"])
    is_raw = frame["user_key_id"].is_null()
    carried = pseudonyms.carried(frame["user_id"], frame["user_key_id"])
    if not is_raw.any():
        return carried
    raw = frame.select(pl.when(is_raw).then("user_id").alias("user")).to_series()
    return pseudonyms.of(raw).zip_with(is_raw, carried)


def _concat(frames: Sequence[pl.DataFrame], schema: dict[str, pl.DataType]) -> pl.DataFrame:
    return pl.concat(frames) if frames else pl.DataFrame(schema=schema)
