"""Our exceptions <-> gRPC statuses: both halves, side by side.

An error travels as a ``google.rpc.Status`` in the trailing metadata: one ``ErrorInfo``
with the reason, the domain and the values, and a ``RetryInfo`` if a retry may succeed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from curvd.errors import BY_CODE, BY_REASON, DOMAIN, CurvdError, Internal, Unavailable

DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata that carries the serialised ``google.rpc.Status``."""
CODES = {str(code.value[0]): code for code in grpc.StatusCode}
"""Status codes by their number in trailers."""


class RpcError(Exception):
    """A call of curvd's own transport ended with an error.

    Args:
        code: Its status.
        message: What went wrong.
        details: The value of `DETAILS_KEY`, if there was one.
    """

    def __init__(
        self, code: grpc.StatusCode, message: str, details: bytes | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.details = code, details


def dump(error: CurvdError) -> bytes:
    """Serialise an error; the inverse of `load`.

    Args:
        error: One of ours.

    Returns:
        The value of `DETAILS_KEY`.
    """
    status = status_pb2.Status(
        code=grpc.StatusCode[error.code].value[0], message=_cut(str(error), 1024)
    )
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(
            reason=error.reason,
            domain=DOMAIN,
            metadata={k: _cut(v, 256) for k, v in error.metadata.items()},
        )
    )
    if error.retry_after_s is not None:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        status.details.add().Pack(info)
    return bytes(status.SerializeToString())


def load(code: str, message: str, details: bytes | None) -> CurvdError:
    """Find the exception that a status stands for.

    Args:
        code: Name of the status code.
        message: Its message.
        details: The value of `DETAILS_KEY`, if there was one.

    Returns:
        The class that the reason names, or the general one of the code.
    """
    reason, metadata, retry_after_s = "", {}, None
    for detail in _parse(details).details:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(retry):
            retry_after_s = max(0.0, retry.retry_delay.ToNanoseconds() / 1e9)
    kind = BY_REASON.get(reason) or BY_CODE.get(code, Internal)
    error = kind(message, retry_after_s=retry_after_s)
    error.metadata = metadata
    return error


@contextlib.contextmanager
def translated(target: str) -> Iterator[None]:
    """Turn what a transport raises into our exceptions.

    Args:
        target: Where the call goes, for the message.

    Yields:
        Nothing.

    Raises:
        CurvdError: In place of `grpc.RpcError` and `RpcError`.
    """
    try:
        yield
    except RpcError as error:
        raise _explained(target, error.code.name, str(error), error.details) from error
    except grpc.RpcError as error:
        trailing: Any = error.trailing_metadata() or ()
        details = dict(trailing).get(DETAILS_KEY)
        text = error.details() or ""
        raise _explained(target, error.code().name, text, details) from error


def _explained(
    target: str, code: str, message: str, details: bytes | None
) -> CurvdError:
    message = message or code
    if details is None and code == Unavailable.code:
        message = f"no curvd server answers at {target}: {message}"
    elif details is None:
        # Not from curvd itself: say which status it was, and where from.
        message = f"{code} from {target}: {message}"
    return load(code, message, details)


def _cut(text: str, limit: int) -> str:
    # gRPC drops trailing metadata above 8 KiB; the full message travels beside it.
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _parse(details: bytes | None) -> status_pb2.Status:
    try:
        return status_pb2.Status.FromString(details or b"")
    except DecodeError:
        return status_pb2.Status()
