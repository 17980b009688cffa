"""What a caller is told of a body that does not fit the schema: one line, its value, the remedy.

pydantic's errors -> describe() -> (422, "k: expected a valid integer, got '3'")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raysys.serve.schema import WITHOUT_A_REGEX, Filters, shorten


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
            return f"expected {WITHOUT_A_REGEX[context['pattern']]}{_got(error)}"
        case "duplicates" | "empty_range":
            return str(error["msg"])
        case _:
            expected = error["msg"].removeprefix("Input should be ")
            return f"expected {expected[0].lower()}{expected[1:]}{_got(error)}"


def _got(error: Any) -> str:
    # Callers log what they are answered, and a raw user id belongs into no log.
    is_id_of_user = error["loc"][-1] in ("user_id", "request_id")
    return "" if is_id_of_user else f", got {shorten(error['input'])}"
