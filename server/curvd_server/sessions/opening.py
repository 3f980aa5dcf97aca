"""How a session is made: described, brought onto the device, verified, numbered."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

from curvd.contract import (
    Dtype,
    LossSpec,
    Mode,
    OperatorSpec,
    ParameterLayout,
    SessionInfo,
    SessionState,
    Tier,
)
from curvd.errors import LimitExceeded
from curvd_server.sessions.allotments import Allotments
from curvd_server.sessions.deletions import Deletions
from curvd_server.sessions.parameters import state_of
from curvd_server.sessions.session import Session, SessionDependencies, to_the_end
from curvd_server.storage import StoredSession
from curvd_server.system import Ongoing, calling


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSession:
    """What a session is to be."""

    dataset_id: str
    model_id: str = ""
    """Empty, like all that belongs to the model, if it shares a session's parameters."""
    loss: LossSpec | None = None
    dtype: Dtype = Dtype.FLOAT32
    mode: Mode = Mode.EVAL
    operators: tuple[OperatorSpec, ...] = ()
    """Operators to build before the answer; empty: the Hessian, unless `build_later`."""
    build_later: bool = False
    """Whether nothing is built before the answer if no operator is named."""
    plan: Tier | None = None
    """Which tier the first answer of an operator waits for; None: the server's."""
    shares_with: str = ""
    """Id of a session whose parameters it shares, and all that belongs to them."""
    params: tuple[str, ...] = ()
    """Globs that choose the parameters; empty: all of them."""
    budget_bytes: int | None = None
    lease_s: float | None = None
    name: str = ""
    request_id: str = ""
    fingerprint: str = ""
    """Hash of the request, without its id."""
    share_with: tuple[str, ...] = ()
    """Other callers who may use it: names, and groups behind an "@"."""


class Openings:
    """Makes the sessions of a store.

    Args:
        dependencies: What they work with.
        allotments: Counts what they take.
        deletions: Waits for models and datasets that a session is being made of.
        relatives: Finds the sessions of the store that share parameters with one, itself
            among them once it is there.
        add: Adds one to the store.
        latest_us: When the latest one was made, in microseconds since the epoch.
    """

    def __init__(
        self,
        dependencies: SessionDependencies,
        allotments: Allotments,
        deletions: Deletions,
        *,
        relatives: Callable[[Session], Sequence[Session]],
        add: Callable[[Session], Coroutine[Any, Any, None]],
        latest_us: int,
    ) -> None:
        self._dependencies = dependencies
        self._allotments, self._deletions = allotments, deletions
        self._relatives, self._add = relatives, add
        self._latest_us = latest_us

    async def open(
        self,
        new: NewSession,
        other: Session | None,
        *,
        validate_only: bool,
        opening: Ongoing,
    ) -> SessionInfo:
        """Bring a model, a dataset and a loss together, verified and warm.

        Args:
            new: What the session is to be.
            other: The session whose parameters it shares; None: it has its own.
            validate_only: Check and predict; add nothing.
            opening: Tells how far that is.

        Returns:
            The session.
        """
        model_id = new.model_id if other is None else other.stored.info.model_id
        with self._deletions.wanted(model_id, new.dataset_id):
            if other is None:
                stored = await asyncio.to_thread(self._described, new)
                session = Session(self._dependencies, stored, self._relatives)
                return await self._made(new, session, validate_only, opening)
            return await self._sharing(new, other, validate_only, opening)

    async def _sharing(
        self, new: NewSession, other: Session, validate_only: bool, opening: Ongoing
    ) -> SessionInfo:
        with contextlib.ExitStack() as held:
            async with other.lock:  # until this one is there, no update comes between
                for digest in other.stored.sources.values():
                    held.enter_context(self._dependencies.blobs.held(digest))
                stored = await asyncio.to_thread(self._described, new, other.stored)
                relatives, lock = self._relatives, other.lock
                session = Session(self._dependencies, stored, relatives, lock)
                return await self._made(new, session, validate_only, opening)

    async def _made(
        self, new: NewSession, session: Session, validate_only: bool, opening: Ongoing
    ) -> SessionInfo:
        stored = session.stored
        try:
            session.allotment = await asyncio.to_thread(
                self._allotments.take, stored.info
            )
            problem = await session.warm(opening)
            usual = () if new.build_later else (OperatorSpec(),)
            if not (new.operators or usual):
                await session.operator_cache.check()
                opening.advance()
            for spec in new.operators or usual:
                session.operator_cache.release(
                    await session.operator_cache.acquire(spec, opening)
                )
            info = replace(
                stored.info,
                id="" if validate_only else self._new_id(),
                layout=problem.layout,
                batches=problem.batches,
            )
            session.stored = replace(stored, info=info)
            if not validate_only:
                await to_the_end(self._add(session))
            return session.info()
        finally:
            if session not in self._relatives(session):
                await to_the_end(session.operator_cache.close())
                session.let_go()

    def _described(
        self, new: NewSession, other: StoredSession | None = None
    ) -> StoredSession:
        """Say what is known before anything is on the device. Blocks."""
        if other is not None:
            known = other.info
            new = replace(
                new,
                model_id=known.model_id,
                loss=known.loss,
                dtype=known.dtype,
                mode=known.mode,
                params=known.params,
            )
        assert new.loss is not None
        catalogue = self._dependencies.catalogue
        # Of a session that is his own, the caller has the model, whoever registered it.
        find = catalogue.usable_model if other is None else catalogue.model
        model, dataset = find(new.model_id), catalogue.usable_dataset(new.dataset_id)
        total_bytes = self._dependencies.device.describe().total_bytes
        usual_bytes = min(self._dependencies.limits.default_budget_bytes, total_bytes)
        if new.budget_bytes is not None and new.budget_bytes > total_bytes:
            msg = (
                f"budget_bytes is {new.budget_bytes}, but device "
                f"{self._dependencies.device.name} has {total_bytes} bytes in all; ask "
                "for less, or leave it out"
            )
            raise LimitExceeded(msg, budget_bytes=new.budget_bytes, limit=total_bytes)
        info = SessionInfo(
            id="",
            name=new.name,
            model_id=new.model_id,
            dataset_id=new.dataset_id,
            loss=new.loss,
            dtype=new.dtype,
            mode=new.mode,
            version=1,
            parameters_digest=state_of(self._dependencies.blobs, model, {}).digest(),
            layout=ParameterLayout(()),
            data_points=dataset.info.data_points,
            batches=0,
            device=self._dependencies.device.name,
            budget_bytes=usual_bytes if new.budget_bytes is None else new.budget_bytes,
            operators=(),
            state=SessionState.COLD,
            create_time_s=self._dependencies.clock(),
            expire_time_s=None,
            params=new.params,
            plan=new.plan or self._dependencies.plan,
            owner=calling().name,
            shared_with=new.share_with,
        )
        if other is not None:
            info = replace(
                info,
                version=other.info.version,
                parameters_digest=other.info.parameters_digest,
                parameters_of=other.info.parameters_of or other.info.id,
            )
        if new.budget_bytes is None:
            budget_bytes = self._allotments.budget_bytes(info, usual_bytes)
            info = replace(info, budget_bytes=budget_bytes)
        return StoredSession(
            info=info,
            lease_s=self._lease_s(new),
            request_id=new.request_id,
            fingerprint=new.fingerprint,
            sources={} if other is None else other.sources,
        )

    def _lease_s(self, new: NewSession) -> float | None:
        """Say how long a session lives without a call; None: for ever."""
        if new.lease_s is not None:
            return new.lease_s
        return float(self._dependencies.limits.lease_s) or None

    def _new_id(self) -> str:
        self._latest_us = max(
            self._latest_us + 1, int(self._dependencies.clock() * 1e6)
        )
        return f"{self._latest_us:014x}-{secrets.token_hex(4)}"
