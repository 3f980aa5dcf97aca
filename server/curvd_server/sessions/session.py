"""One session: which version it is at, who uses it, and how it ends.

State changes on the event loop only. Whatever takes time runs elsewhere: files and
hashes in threads, everything with tensors on the device's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from curvd.contract import (
    OperatorSpec,
    SerializedGraph,
    SessionInfo,
    SessionState,
    Stage,
    Tier,
    Work,
)
from curvd.errors import Cancelled, CurvdError, VersionMismatch
from curvd_server.config import LimitsConfig
from curvd_server.device import Batcher, Device, Operator, Problem
from curvd_server.sessions.allotments import Allotment
from curvd_server.sessions.leases import Remaining
from curvd_server.sessions.operator_cache import CachedOperator, OperatorCache
from curvd_server.sessions.parameters import architecture_of, home_names, state_of
from curvd_server.sessions.stored_vectors import Vectors, check_same
from curvd_server.storage import (
    BlobStore,
    Catalogue,
    StoredSession,
    StoredVersion,
    check_representable,
    check_state,
)
from curvd_server.system import Activities, HostMemory, Ongoing, Quotas, calling

T = TypeVar("T")

_PATIENCE_S = 5.0
"""How long the end of a session waits for calls that were cancelled."""
_CHECKS = 3
"""Graphs are tried, all is brought onto the device, and the gradient is that of the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionDependencies:
    """What sessions work with."""

    catalogue: Catalogue
    """Where they survive."""
    blobs: BlobStore
    """Where their tensors are."""
    device: Device
    """Where they are computed."""
    batcher: Batcher
    """The queue of that device."""
    limits: LimitsConfig
    memory: HostMemory
    """The memory of the host, for what is stored."""
    clock: Callable[[], float]
    """Seconds since the epoch, for people: someone may set it."""
    monotonic: Callable[[], float]
    """Seconds that nobody can set, for leases."""
    plan: Tier = Tier.FIRST
    """Which tier first answers wait for, in sessions that do not say."""
    quotas: Quotas = field(default_factory=Quotas)
    """What single callers may hold."""
    activities: Activities = field(default_factory=Activities)
    """What takes long and goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """New values of some or all parameters and buffers."""

    digest: str
    """SHA-256 of the blob that holds them."""
    source: str = ""
    """What the request named in place of the blob, if the server made that."""
    expected_version: int | None = None
    request_id: str = ""

    @property
    def fingerprint(self) -> str:
        """What makes two requests the same."""
        return f"{self.source or self.digest}:{self.expected_version}"


@dataclass(frozen=True, slots=True)
class Lease:
    """A session at one version; it stays valid as long as it is held."""

    info: SessionInfo
    """As it is stored: what changes by the minute is left out. Its layout is that of
    the operator, if one was asked for."""
    problem: Problem
    operator: Operator | None
    """The one that was asked for, built."""
    vectors: Vectors
    """What the caller has stored in the session."""
    latest: Callable[[], Operator | None] = lambda: None
    """Exchanges the operator for one with a better plan at the same version, if one took
    its place; the operator itself must not be used any more. On the event loop."""


class Session:
    """A model, a dataset and a loss, on the device or ready to get there.

    Args:
        dependencies: What it works with.
        stored: What is known of it.
        relatives: Finds the sessions that share its parameters, itself among them once it
            is there.
        lock: Theirs; None: a new one.
    """

    def __init__(
        self,
        dependencies: SessionDependencies,
        stored: StoredSession,
        relatives: Callable[[Session], Sequence[Session]] = lambda session: [session],
        lock: asyncio.Lock | None = None,
    ) -> None:
        self.stored = stored
        self._relatives = relatives
        self.operator_cache = OperatorCache(
            dependencies.batcher,
            budget_bytes=stored.info.budget_bytes,
            operators=dependencies.limits.operators,
            plan=stored.info.plan,
            begin=self.begin,
        )
        self._vectors: dict[str, Vectors] = {}
        self.allotment: Allotment | None = None
        """What it has of the device."""
        self._dependencies = dependencies
        self._remaining = Remaining(
            stored.lease_s, stored.remaining_s, dependencies.monotonic
        )
        # Held while the session changes, or something is built for it; sessions that
        # share parameters change together.
        self.lock = lock or asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._unused = asyncio.Event()
        self._ended = False

    @property
    def id(self) -> str:
        """Its id."""
        return self.stored.info.id

    @property
    def family(self) -> str:
        """The same for all sessions that share its parameters."""
        return self.stored.info.parameters_of or self.id

    @property
    def users(self) -> int:
        """Calls that use it right now."""
        return len(self._tasks)

    @property
    def is_over(self) -> bool:
        """Whether its lease ran out."""
        return self.remaining.is_over

    def touch(self) -> None:
        """Renew the lease."""
        self._remaining.touch()

    @property
    def remaining(self) -> Remaining:
        """What remains of the lease; all of it while the session is in use."""
        if self._tasks:
            self._remaining.touch()
        return self._remaining

    def renew(self, lease_s: float) -> None:
        """Take a new length of the lease."""
        self.stored = replace(self.stored, lease_s=lease_s)
        self._remaining = Remaining(lease_s, None, self._dependencies.monotonic)

    def info(self) -> SessionInfo:
        """Describe it as it is now."""
        stored, cold = self.stored, self.operator_cache.problem is None
        remaining_s = self.remaining.seconds
        return replace(
            stored.info,
            device=self._dependencies.device.name,  # perhaps another one than before
            operators=self.operator_cache.reports,
            state=SessionState.COLD if cold else SessionState.READY,
            expire_time_s=(
                None
                if remaining_s is None
                else self._dependencies.clock() + remaining_s
            ),
        )

    def begin(self, work: Work, subject: str = "") -> Ongoing:
        """Make what tells how far long work for it is.

        Args:
            work: Why it takes long.
            subject: The kind of the operator, or the name of the query.

        Returns:
            A context in which the work is listed.
        """
        return Ongoing(
            work,
            subject,
            session=lambda: (self.id, self.stored.info.name),
            activities=self._dependencies.activities,
        )

    async def warm(self, opening: Ongoing | None = None) -> Problem:
        """Bring it onto the device, unless it is there.

        Args:
            opening: Tells how far that is; None: it is listed by itself.
        """
        if self.operator_cache.problem is not None:
            return self.operator_cache.problem
        if opening is None:
            with self.begin(Work.OPENING) as opening:
                return await self._warm(opening)
        return await self._warm(opening)

    async def _warm(self, opening: Ongoing) -> Problem:
        stored, dependencies = self.stored, self._dependencies

        info = stored.info

        def prepare() -> tuple[SerializedGraph, int, Callable[[], Problem]]:
            model = dependencies.catalogue.model(info.model_id)
            dataset = dependencies.catalogue.dataset(info.dataset_id)
            state = state_of(dependencies.blobs, model, stored.sources).arrays
            data = dependencies.blobs.open(dataset.digest).arrays
            parameters = {n: a for n, a in state.items() if n not in model.buffers}
            check_representable(parameters, info.dtype, what="parameter")
            check_representable(data, info.dtype, what="tensor")
            load = functools.partial(
                dependencies.device.load,
                model.info.spec,
                state,
                data,
                dataset.info.spec,
                info.loss,
                info.mode,
                info.dtype,
                info.params,
            )
            rows = min(dataset.info.spec.batch_size, dataset.info.data_points)
            return model.info.spec.graph, rows, load

        opening.enter(Stage.CHECKING, total=_CHECKS)
        graph, rows, load = await asyncio.to_thread(prepare)
        await dependencies.device.try_graphs(graph, info.loss.graph, rows=rows)
        opening.advance()
        warm = (
            s.operator_cache.problem for s in self._relatives(self) if s is not self
        )
        like = next((p for p in warm if p is not None), None)
        problem = await self.operator_cache.load(load, like)
        opening.advance()
        return problem

    @contextlib.asynccontextmanager
    async def lease(
        self, operator: OperatorSpec | None, expected_version: int | None
    ) -> AsyncIterator[Lease]:
        """Use it at its current version; see `SessionStore.lease`."""
        with self._used():
            # What is there can be had while something else is built.
            if self.operator_cache.has(operator):
                lease, built = await self._lease(operator, expected_version)
            else:
                async with self.lock:
                    lease, built = await self._lease(operator, expected_version)
            if built is None:
                yield lease
                return
            held = [built]

            def latest() -> Operator:
                held[0] = self.operator_cache.latest(held[0])
                return held[0].operator

            try:
                yield replace(lease, latest=latest)
            finally:
                self.operator_cache.release(held[0])

    async def _lease(
        self, operator: OperatorSpec | None, expected_version: int | None
    ) -> tuple[Lease, CachedOperator | None]:
        self._check_version(expected_version)
        problem, info = await self.warm(), self.stored.info
        if operator is None:
            return Lease(info, problem, None, self._vectors_of(calling().name)), None
        layout = info.layout.of_operator(operator)
        if layout is not info.layout:
            info = replace(info, layout=layout)
        built = await self.operator_cache.acquire(operator)
        return Lease(
            info, problem, built.operator, self._vectors_of(calling().name)
        ), built

    async def made_by(self, update: Update) -> StoredVersion | None:
        """Find the version that the same request made; see `SessionStore.made_by`."""
        if not update.request_id:
            return None
        known = await asyncio.to_thread(
            self._dependencies.catalogue.version_of, self.id, update.request_id
        )
        if known is not None:
            check_same(known.fingerprint, update.fingerprint, update.request_id)
        return known

    async def update(self, update: Update) -> StoredVersion:
        """Move to new values; see `SessionStore.update`."""
        with self._used():
            async with self.lock:
                known = await self.made_by(update)
                if known is not None:
                    return known
                self._check_version(update.expected_version)
                return await self._update(update)

    async def end(self) -> None:
        """Forget it, cancel its work, free its memory."""
        self._ended = True
        sources = set(self.stored.sources.values())
        try:
            await self._mark_leaving(sources)
            await asyncio.to_thread(
                self._dependencies.catalogue.delete_session, self.id
            )
        except CurvdError:
            self._ended = False
            raise
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            # A client that neither reads nor leaves keeps what it has until it does.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._unused.wait(), _PATIENCE_S)
        for vectors in self._vectors.values():
            vectors.clear()
        await self.operator_cache.close()
        self.let_go()
        # An update that was under way may have brought others meanwhile.
        await self._release(sources | set(self.stored.sources.values()))

    def let_go(self) -> None:
        """Give back what it has had of the device."""
        if self.allotment is not None:
            self.allotment.give()

    async def _update(self, update: Update) -> StoredVersion:
        stored, dependencies = self.stored, self._dependencies
        model = await asyncio.to_thread(
            dependencies.catalogue.model, stored.info.model_id
        )
        blob = await asyncio.to_thread(dependencies.blobs.open, update.digest)
        architecture = architecture_of(model)
        await asyncio.to_thread(check_state, blob, architecture, complete=False)
        given = home_names(blob, model.ties)
        sources = {**stored.sources, **dict.fromkeys(given, update.digest)}
        state = await asyncio.to_thread(state_of, dependencies.blobs, model, sources)
        info = replace(
            stored.info,
            version=stored.info.version + 1,
            parameters_digest=await asyncio.to_thread(state.digest),
        )
        version = StoredVersion(
            version=info.version,
            parameters_digest=info.parameters_digest,
            request_id=update.request_id,
            fingerprint=update.fingerprint,
        )
        values = {home: blob.arrays[name] for home, name in given.items()}
        parameters = {n: a for n, a in values.items() if n not in model.buffers}
        await asyncio.to_thread(
            check_representable, parameters, info.dtype, what="parameter"
        )
        family, moves = await self._moves(values)

        async def commit() -> None:
            there = [s for s in family if not s._ended]
            infos = [
                replace(
                    s.stored.info,
                    version=info.version,
                    parameters_digest=info.parameters_digest,
                )
                for s in there
            ]
            leaving = set(stored.sources.values()) - set(sources.values())
            await self._mark_leaving(leaving)
            await asyncio.to_thread(
                dependencies.catalogue.add_version, infos, version, sources
            )
            for session, new in zip(there, infos, strict=True):
                session.stored = replace(session.stored, info=new, sources=sources)
                moves.get(session.id, _nothing)()
            dependencies.blobs.hand_over(update.digest, stored.info.owner)
            await self._release(leaving)

        await to_the_end(commit())
        return version

    async def _moves(
        self, values: Mapping[str, Any]
    ) -> tuple[list[Session], dict[str, Callable[[], None]]]:
        """Prepare new values for all sessions that share them, in memory once.

        Returns:
            The sessions, and what changes over those that are warm.
        """
        family, moves, first = list(self._relatives(self)), {}, None
        for session in family:
            cache = session.operator_cache
            if cache.problem is not None:
                problem, moves[session.id] = await cache.move(values, first)
                first = first or problem
        return family, moves

    async def _mark_leaving(self, digests: set[str]) -> None:
        """Note that values are about to be nobody's; see `BlobStore.mark_leaving`."""
        blobs, owner = self._dependencies.blobs, self.stored.info.owner
        for digest in digests:
            await asyncio.to_thread(blobs.mark_leaving, digest, owner)

    async def _release(self, digests: set[str]) -> None:
        blobs, owner = self._dependencies.blobs, self.stored.info.owner
        for digest in digests:
            await asyncio.to_thread(blobs.release, digest, owner)

    def _vectors_of(self, name: str) -> Vectors:
        """Find what one caller stores; each sees only his own."""
        if name not in self._vectors:
            limits, memory = self._dependencies.limits, self._dependencies.memory
            quotas = self._dependencies.quotas
            self._vectors[name] = Vectors(self.id, limits.stored_bytes, memory, quotas)
        return self._vectors[name]

    def _check_version(self, expected: int | None) -> None:
        have = self.stored.info.version
        if expected is not None and expected != have:
            msg = f"session {self.id} is at version {have}, not {expected}"
            raise VersionMismatch(msg, version=have, expected_version=expected)

    @contextlib.contextmanager
    def _used(self) -> Iterator[None]:
        """Keep it from expiring; its end cancels the task that is in here."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self._ended:
                raise
            task.uncancel()
            msg = f"session {self.id} was deleted while the call ran"
            raise Cancelled(msg, session_id=self.id) from None
        finally:
            self._tasks.discard(task)
            self.touch()
            if not self._tasks:
                self._unused.set()


def _nothing() -> None:
    """Change nothing: what is cold finds its values when it warms up."""


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Finish what must not be half done, even if the caller gives up meanwhile.

    Args:
        work: What to do.

    Returns:
        Its result.
    """
    task = asyncio.ensure_future(work)
    given_up: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            given_up = error
    if given_up is not None:
        task.exception()  # so that asyncio does not miss that anyone looked
        raise given_up
    return task.result()
