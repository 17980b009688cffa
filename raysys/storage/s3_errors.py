"""What an error of S3 means: may it pass by itself, and what is its user told.

botocore's exception -> may_pass() -> another attempt -> explain() -> our exception
"""

from __future__ import annotations

from typing import Any

from botocore import exceptions as aws
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from raysys.errors import RootError, StorageUnavailableError

LOST_RACE = frozenset({"PreconditionFailed", "412"})
"""Codes of a condition that does not hold: the object is there already, or was replaced."""

_UNANSWERED = (
    ConnectionError,
    TimeoutError,
    HTTPError,
    ResponseParserError,
    aws.ConnectionError,
    aws.HTTPClientError,
    aws.IncompleteReadError,
    aws.ChecksumError,
    aws.FlexibleChecksumError,
)
ERRORS = (*_UNANSWERED, OSError, aws.BotoCoreError, aws.ClientError)
"""All that a request may raise."""
_PASSING_CODES = frozenset(
    {
        # Two conditional writes at once: S3 could not tell who was first and wrote neither.
        "ConditionalRequestConflict", "OperationAborted",
        "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded",
        "TooManyRequests", "TooManyRequestsException", "BandwidthLimitExceeded",
        # What came over the network was not what was sent.
        "RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch",
        "InternalError", "ServiceUnavailable",
    }
)  # fmt: skip
_NO_CREDENTIALS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.TokenRetrievalError,
    aws.NoAuthTokenError,
)


def code_of(error: BaseException) -> str:
    """Returns S3's code of an error, "" if S3 did not send it."""
    return (
        str(error.response["Error"].get("Code", "")) if isinstance(error, aws.ClientError) else ""
    )


def may_pass(error: Exception) -> bool:
    """Returns whether the same request may succeed if it is sent again."""
    if isinstance(error, aws.ClientError):
        status = _status_of(error)
        passing_status = status in (409, 429) or (status >= 500 and status != 501)
        return passing_status or code_of(error) in _PASSING_CODES
    return isinstance(error, _UNANSWERED)


def explain(error: Exception, uri: str, path: str, num_attempts: int) -> Exception:
    """Returns what to raise for `error`, which was the last of `num_attempts` of a request."""
    text = " ".join(str(error).split()) or type(error).__name__
    name = f"{uri}/{path}".rstrip("/")
    if code_of(error) == "NoSuchBucket":
        return RootError(f"root {uri}: the bucket does not exist; create it or correct `root`")
    if is_absent(error):
        return FileNotFoundError(name)
    if code_of(error) in LOST_RACE:
        return StorageUnavailableError(f"{uri}/{path} was replaced while it was read; run it again")
    if may_pass(error):
        times = "once" if num_attempts == 1 else f"{num_attempts} times"
        return StorageUnavailableError(
            f"{name}: the object store did not answer, asked {times} ({text}); "
            "check AWS_ENDPOINT_URL and the store, or try again later"
        )
    denied = code_of(error) == "AccessDenied" or _status_of(error) in (401, 403)
    if denied or isinstance(error, _NO_CREDENTIALS):
        return RootError(
            f"root {uri}: no access to {path or 'it'} ({text}); check the AWS credentials and the "
            "bucket's policy (get, put, list and delete are needed)"
        )
    return RootError(f"root {uri}: the object store refused {path or 'it'} ({text})")


def is_absent(error: BaseException) -> bool:
    """Returns whether S3 said that there is no such object."""
    return code_of(error) in ("NoSuchKey", "NotFound", "404")


def _status_of(error: Exception) -> int:
    response: dict[str, Any] = getattr(error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
