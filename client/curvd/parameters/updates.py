"""Updates of parameters: of one process, or of the ranks that hold the shards of a model.

A rank uploads its boxes as a part, by their digest as any upload; the first rank then
commits the digests of all parts. Until then nothing has changed on the server.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from curvd._calls.base import Call, Unary
from curvd._calls.upload import Blob, Progress, Upload, blob_of
from curvd.contract import RPCS, SessionInfo
from curvd.errors import InvalidSpec
from curvd.parameters.copies import copied
from curvd.parameters.names import plain_names
from curvd.parameters.shards import Ranks, own_boxes, sharded
from curvd.parameters.steps import between_steps
from curvd.parameters.wrappers import state_of
from curvd.tensors import Box, to_numpy
from curvd.v1 import session_service_pb2 as session_pb

if TYPE_CHECKING:
    from curvd.graph.origins import Origin

T = TypeVar("T")

Values = Any
"""`Tensors`, or a torch module, wrapped or not: what `session.update_parameters` takes."""

Version: TypeAlias = "tuple[int, str]"
"""The number of a version, and the digest of its parameters."""

Steps: TypeAlias = "Generator[Call[Any], Any, T]"
"""Calls to make one after the other, what they answer sent back in; no I/O of its own."""


def update_parameters(
    session: SessionInfo,
    values: Values | None,
    *,
    checkpoint: str | None,
    prefix: str,
    expected_version: int | None,
    request_id: str,
    progress: Progress | None,
    copy: bool,
    origin: Origin | None = None,
) -> Steps[Version]:
    """Replace parameter values; the result is the new version and its digest."""
    header = session_pb.UpdateParametersHeader(
        session_id=session.id, expected_version=expected_version, request_id=request_id
    )
    if (values is None) == (checkpoint is None):
        msg = (
            "an update has values (a module, a state dict, a file of yours) or the name "
            f"of a checkpoint on the server, got {'neither' if values is None else 'both'}"
        )
        raise InvalidSpec(msg)
    if prefix and checkpoint is None:
        msg = (
            f"prefix is of the names in a checkpoint on the server, got {prefix!r} beside "
            "values: rename those, {name.removeprefix(…): value}"
        )
        raise InvalidSpec(msg, prefix=prefix)
    if checkpoint is not None:
        header.checkpoint.name, header.checkpoint.prefix = checkpoint, prefix
        return _commit(header)
    return _steps(
        header, session, values, progress, copy, threading.get_ident(), origin
    )


def _steps(
    header: session_pb.UpdateParametersHeader,
    session: SessionInfo,
    values: Values,
    progress: Progress | None,
    copy: bool,
    asking: int,
    origin: Origin | None,
) -> Steps[Version]:
    values = state_of(values, origin)
    if not isinstance(values, Mapping):
        return (yield from _sent(header, blob_of(values), progress))
    if not values:
        msg = (
            "the update has no values: give at least one parameter or buffer by name; has "
            "a filter left none?"
        )
        raise InvalidSpec(msg)
    names = plain_names(values, set(session.layout.names))
    plain = {names[name]: value for name, value in values.items()}
    shards = sharded(plain)
    if not shards:
        blob = _copied(plain, {}, copy=copy, asking=asking)
        return (yield from _sent(header, blob, progress))
    ranks = Ranks(shards.values())
    digest, failure = "", None
    try:
        own, boxes = own_boxes(plain, shards, is_first=ranks.is_first)
        if own:
            part = session_pb.UpdateParametersHeader(
                session_id=session.id, as_part=True
            )
            blob = _copied(own, boxes, copy=copy, asking=asking)
            yield from _sent(part, blob, progress)
            digest = blob.digest
    except Exception as error:  # whatever it is, the others must not wait for ever
        failure = error
    said = ranks.exchange({"part": digest}, failure)
    header.parts.extend(one["part"] for one in said if one["part"])
    return (yield from _committed(header, ranks))


def _committed(
    header: session_pb.UpdateParametersHeader, ranks: Ranks
) -> Steps[Version]:
    """Have the first rank commit, and all of them hear of it."""
    version: Version = 0, ""
    failure = None
    if ranks.is_first:
        try:
            version = yield from _commit(header)
        except Exception as error:
            failure = error
    said = ranks.exchange({"version": version}, failure)
    return tuple(said[0]["version"])


def _commit(header: session_pb.UpdateParametersHeader) -> Steps[Version]:
    """Move the session to values that the server has, or reads itself."""
    rpc = RPCS["UpdateParameters"]
    request = rpc.request.message(header=header)
    made: Version = yield Unary(rpc, request, _read)
    return made


def _copied(
    values: Mapping[str, Any], boxes: Mapping[str, Box], *, copy: bool, asking: int
) -> Blob:
    if not copy:
        return blob_of(values, to_numpy, boxes)
    with between_steps(asking):
        return blob_of(values, copied, boxes)


def _sent(
    header: session_pb.UpdateParametersHeader, blob: Blob, progress: Progress | None
) -> Steps[Version]:
    rpc = RPCS["UpdateParameters"]
    made: Version = yield Upload(rpc, header, "values", blob, _read, progress)
    return made


def _read(response: session_pb.UpdateParametersResponse) -> Version:
    return response.version.version, response.version.parameters_digest


def run(steps: Steps[T], call: Callable[[Call[Any]], Any]) -> T:
    """Make the calls of an update.

    Args:
        steps: The update.
        call: Makes a call and waits for its answer.

    Returns:
        The result of the update.
    """
    answer: Any = None
    advance: Callable[[Any], Call[Any]] = steps.send
    while True:
        try:
            wanted = advance(answer)
        except StopIteration as done:
            result: T = done.value
            return result
        try:
            advance, answer = steps.send, call(wanted)
        except Exception as error:
            advance, answer = steps.throw, error


async def run_async(
    steps: Steps[T],
    in_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
    call: Callable[[Call[Any]], Awaitable[Any]],
) -> T:
    """Make the calls of an update; see `run`.

    Args:
        steps: The update.
        in_thread: Does what takes time without holding up the event loop.
        call: Makes a call.

    Returns:
        The result of the update.
    """
    answer: Any = None
    advance: Callable[[Any], Call[Any]] = steps.send

    def step() -> tuple[Call[Any] | None, Any]:
        try:
            return advance(answer), None
        except StopIteration as done:  # which no future can raise
            return None, done.value

    while True:
        wanted, result = await in_thread(step)
        if wanted is None:
            return result  # type: ignore[no-any-return]
        try:
            advance, answer = steps.send, await call(wanted)
        except Exception as error:
            advance, answer = steps.throw, error
