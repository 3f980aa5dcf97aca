"""Around every call: who may make it, what its errors look like, one line of log."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar

import grpc
import grpc.aio
import structlog
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from curvd.contract import Rpc, statuses
from curvd.errors import (
    CurvdError,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from curvd_server.system import CALLING, Quotas, calling, faults, logger
from curvd_server.system.quotas import CALLS
from curvd_server.transport.access import AccessLog
from curvd_server.transport.callers import Callers
from curvd_server.transport.drops import Drops
from curvd_server.transport.owners import Owners
from curvd_server.transport.refusals import Refusals
from curvd_server.transport.tally import Tally

if TYPE_CHECKING:  # of an extra, which few have
    from curvd_server.transport.tracing import Tracing

# Errors travel in HTTP/2 headers, of which clients accept 8 KiB; the message is in
# there twice.
_LONGEST_MESSAGE = 2000
_LONGEST_VALUE = 200
_OPEN = ("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch")
"""What needs no token: whether the server serves, for probes that have none."""

UNAUTHENTICATED = "unauthenticated"
"""The word for calls that were not let in, for the log."""

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
T = TypeVar("T")


class Gate:
    """What every call of ours passes through.

    Args:
        callers: Say who calls; None: nobody in particular, whoever it is.
        drops: Told of those who may not.
        quotas: How many calls each may make at once.
        tally: Counts the calls.
        access: Writes a line of each.
        tracing: Makes spans of them; None: nobody does.
    """

    def __init__(
        self,
        callers: Callers | None = None,
        drops: Drops | None = None,
        quotas: Quotas | None = None,
        tally: Tally | None = None,
        access: AccessLog | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._quotas = quotas or Quotas()
        self._callers, self._drops = callers or Callers(), drops or Drops()
        self._tally, self._access = tally or Tally(), access or AccessLog()
        self._log, self._tracing = logger(), tracing
        self._refusals, self._owners = Refusals(), Owners(self._quotas)
        self._draining = False
        self._idle = asyncio.Event()

    async def drain(self, grace_s: float) -> None:
        """Turn new calls away, and wait for those under way.

        Args:
            grace_s: How long at most.
        """
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self._tally.under_way:
                    self._idle.clear()
                    await self._idle.wait()
        self._access.summarise()

    async def call(
        self,
        rpc: Rpc,
        context: grpc.aio.ServicerContext[Any, Any],
        answer: Callable[[], Awaitable[T]],
    ) -> T:
        """Let one call through.

        Args:
            rpc: Which method.
            context: gRPC's.
            answer: Answers it.

        Returns:
            The answer; errors end the call with their status.
        """
        start_s, code = time.monotonic(), "OK"
        structlog.contextvars.clear_contextvars()
        traced = None
        if self._tracing is not None:
            traced = self._tracing.begin(rpc, context, start_s)
        self._tally.under_way += 1
        try:
            if self._draining:
                msg = "this server is shutting down; retry, another may answer"
                raise Unavailable(msg)
            self._identify(context)
            if self._claim(context):
                # To part with one and connect anew costs more than to be refused.
                await self._refusals.pace(calling().name, context.time_remaining())
            with self._quotas.held(CALLS, 1):
                return await answer()
        except asyncio.CancelledError as error:
            code = "CANCELLED"
            faults.released(error)
            raise
        except CurvdError as error:
            code = error.code
            faults.released(error)
            if isinstance(error, ResourceExhausted):
                await self._refusals.pace(calling().name, context.time_remaining())
            await abort(context, error)
        except Exception as error:
            if context.done():  # the client left, and a read or write noticed first
                code = "CANCELLED"
                faults.released(error)
                raise asyncio.CancelledError from error
            shortage = faults.typed(error)
            if shortage is not None:
                code = shortage.code
                self._log.error("shortage", rpc=rpc.name, error=repr(error)[:500])
                faults.released(error)
                await abort(context, shortage)
            code = Internal.code
            self._log.exception("defect", rpc=rpc.name)
            faults.released(error)
            msg = (
                f"{type(error).__name__} in {rpc.name}: a defect of curvd; the server's "
                "log has the details"
            )
            await abort(context, Internal(msg))
        finally:
            seconds = time.monotonic() - start_s
            self._tally.under_way -= 1
            self._tally.end(rpc.name, code, seconds)
            self._idle.set()
            if traced is not None:
                traced.answered(code)
            self._access.add(rpc.name, code, seconds, context.peer)

    def _identify(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Make the rest of the call run as whoever makes it.

        Raises:
            Unauthenticated: If nobody can tell.
        """
        known = context.auth_context() if self._callers.tells_apart else {}
        try:
            identity = self._callers.identify(known)
        except Unauthenticated:
            self._drops.add(UNAUTHENTICATED, context.peer())
            raise
        CALLING.set(identity)
        if identity.name:
            structlog.contextvars.bind_contextvars(caller=identity.name)

    def _claim(self, context: grpc.aio.ServicerContext[Any, Any]) -> bool:
        """Count the connection as the caller's; what grpcio relays is not seen.

        Returns:
            Whether another one of his had to go for it.
        """
        claim: Callable[[Owners], bool] | None = getattr(context, "claim", None)
        if claim is None or not calling().name:
            return False
        return claim(self._owners)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Lets in whoever brings a token; `Check` and `Watch` of its health need none.

    Args:
        callers: Know what must follow ``authorization: Bearer``.
        drops: Told of those who do not bring it.
    """

    def __init__(self, callers: Callers, drops: Drops) -> None:
        self._callers, self._drops = callers, drops

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Choose who answers a call.

        Args:
            continuation: Finds the method.
            handler_call_details: Method and metadata of the call.

        Returns:
            The method, or one that refuses.
        """
        if str(handler_call_details.method) not in _OPEN:
            try:
                metadata = handler_call_details.invocation_metadata or ()
                self._callers.admit(_one("authorization", metadata))
            except Unauthenticated as error:
                return self._refusal(error)
        return await continuation(handler_call_details)

    def _refusal(self, error: Unauthenticated) -> Handler:
        async def refuse(
            requests: object, context: grpc.aio.ServicerContext[Any, Any]
        ) -> None:
            self._drops.add(UNAUTHENTICATED, context.peer(), **error.metadata)
            await abort(context, error)

        return grpc.stream_stream_rpc_method_handler(refuse)


def _one(name: str, metadata: Iterable[tuple[str, str | bytes]]) -> str | bytes:
    """Find the only value of a header; empty if it has none.

    Raises:
        Unauthenticated: If there are several: nobody can tell which one is meant.
    """
    found = [value for key, value in metadata if key == name]
    if len(found) > 1:
        msg = f"a call brings one header {name}, got {len(found)}"
        raise Unauthenticated(msg)
    return found[0] if found else ""


async def abort(
    context: grpc.aio.ServicerContext[Any, Any], error: CurvdError
) -> NoReturn:
    """End a call with an error.

    Args:
        context: The context of the call.
        error: What went wrong.
    """
    error = _clipped(error)
    details = status_pb2.Status.FromString(statuses.dump(error))
    for detail in _details(error):
        details.details.add().Pack(detail)
    await context.abort(
        grpc.StatusCode[error.code],
        str(error),
        ((statuses.DETAILS_KEY, details.SerializeToString()),),
    )


def _details(error: CurvdError) -> list[Message]:
    """Say it in Google's standard messages too, for clients that know only those."""
    if isinstance(error, InvalidArgument):
        field = next(iter(error.metadata), "")
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=field, description=str(error)[:_LONGEST_VALUE]
        )
        return [error_details_pb2.BadRequest(field_violations=[violation])]
    if isinstance(error, NotFound):
        kind, name = next(iter(error.metadata.items()), ("", ""))
        return [
            error_details_pb2.ResourceInfo(
                resource_type=f"curvd.{kind.removesuffix('_id')}", resource_name=name
            )
        ]
    if isinstance(error, ResourceExhausted):
        violation = error_details_pb2.QuotaFailure.Violation(
            subject=error.reason, description=str(error)[:_LONGEST_VALUE]
        )
        return [error_details_pb2.QuotaFailure(violations=[violation])]
    return []


def _clipped(error: CurvdError) -> CurvdError:
    """Keep an error within what headers may hold."""
    message = _clip(str(error), _LONGEST_MESSAGE)
    short = type(error)(message, retry_after_s=error.retry_after_s)
    short.metadata = {
        k: _clip(v, _LONGEST_VALUE) for k, v in list(error.metadata.items())[:8]
    }
    return short


def _clip(text: str, limit: int) -> str:
    # note: what is not ASCII travels percent-encoded, three bytes for each.
    if len(text.encode()) <= limit and (
        text.isascii() or len(text.encode()) * 3 <= limit
    ):
        return text
    limit = limit if text.isascii() else limit // 12
    return f"{text[:limit]} … ({len(text) - limit} more characters)"
