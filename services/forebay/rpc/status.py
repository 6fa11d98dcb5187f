"""The one table that maps ForebayError to HTTP and gRPC, and gRPC status back to ForebayError.

Over gRPC the field at fault and the time to wait travel as trailing metadata, `forebay-param`,
`forebay-code` and `forebay-retry-after-ms`, beside a `google.rpc.RetryInfo` for Overloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from forebay.core import errors

PARAM_KEY = "forebay-param"
CODE_KEY = "forebay-code"
RETRY_AFTER_KEY = "forebay-retry-after-ms"
_STATUS_DETAILS_KEY = "grpc-status-details-bin"

Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True, slots=True)
class Mapped:
    """`http`: status code. `grpc`: status code. `type`: OpenAI's error type."""

    http: int
    grpc: grpc.StatusCode
    type: str


# Looked up along the class's ancestors, so a subclass needs a row only where it differs.
_TABLE: dict[type[errors.ForebayError], Mapped] = {
    errors.InvalidRequest: Mapped(400, grpc.StatusCode.INVALID_ARGUMENT, "invalid_request_error"),
    errors.NotFound: Mapped(404, grpc.StatusCode.NOT_FOUND, "invalid_request_error"),
    errors.Overloaded: Mapped(429, grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded_error"),
    errors.DeadlineExceeded: Mapped(504, grpc.StatusCode.DEADLINE_EXCEEDED, "timeout_error"),
    errors.RequestCancelled: Mapped(499, grpc.StatusCode.CANCELLED, "cancelled_error"),
    errors.Unavailable: Mapped(503, grpc.StatusCode.UNAVAILABLE, "unavailable_error"),
    errors.KvTransferError: Mapped(502, grpc.StatusCode.ABORTED, "server_error"),
    errors.ForebayError: Mapped(500, grpc.StatusCode.INTERNAL, "server_error"),
}

_FROM_GRPC: dict[grpc.StatusCode, type[errors.ForebayError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.RequestCancelled,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.ABORTED: errors.KvTransferError,
}


def mapped(error: errors.ForebayError) -> Mapped:
    for cls in type(error).__mro__:
        if cls in _TABLE:
            return _TABLE[cls]
    raise AssertionError("ForebayError itself has a row")


def trailing_metadata(error: errors.ForebayError) -> Metadata:
    """What goes beside status and message."""
    pairs: list[tuple[str, str | bytes]] = []
    if isinstance(error, errors.InvalidRequest | errors.NotFound):
        if error.param:
            pairs.append((PARAM_KEY, error.param))
        if error.code:
            pairs.append((CODE_KEY, error.code))
    if isinstance(error, errors.Overloaded):
        pairs.append((RETRY_AFTER_KEY, str(int(error.retry_after_s * 1000))))
        pairs.append((_STATUS_DETAILS_KEY, _retry_info(error)))
    return tuple(pairs)


def _retry_info(error: errors.Overloaded) -> bytes:
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(int(error.retry_after_s * 1000))
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    code: int = mapped(error).grpc.value[0]
    status = status_pb2.Status(code=code, message=error.message, details=[detail])
    serialised: bytes = status.SerializeToString()
    return serialised


def from_grpc(
    code: grpc.StatusCode, message: str, metadata: Mapping[str, str | bytes]
) -> errors.ForebayError:
    """The error that a peer raised, as far as its status tells."""
    cls = _FROM_GRPC.get(code, errors.InternalError)
    if issubclass(cls, errors.InvalidRequest | errors.NotFound):
        return cls(message, param=_text(metadata, PARAM_KEY), code=_text(metadata, CODE_KEY))
    if issubclass(cls, errors.Overloaded):
        retry_ms = _text(metadata, RETRY_AFTER_KEY)
        return cls(message, retry_after_s=int(retry_ms) / 1000 if retry_ms else 1.0)
    return cls(message)


def _text(metadata: Mapping[str, str | bytes], key: str) -> str | None:
    value = metadata.get(key)
    return value if isinstance(value, str) else None
