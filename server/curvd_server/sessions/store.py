"""All sessions of a server: finding, leasing, ending them; `opening` makes them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import weakref
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from curvd.contract import OperatorSpec, SessionInfo, Tier, Work
from curvd.errors import CurvdError, LimitExceeded, PermissionDenied, SessionNotFound
from curvd_server.sessions.allotments import Allotments
from curvd_server.sessions.deletions import Deletions
from curvd_server.sessions.opening import NewSession, Openings
from curvd_server.sessions.parameters import architecture_of
from curvd_server.sessions.session import (
    Lease,
    Session,
    SessionDependencies,
    Update,
    to_the_end,
)
from curvd_server.sessions.stored_vectors import check_same
from curvd_server.storage import Architecture, StoredVersion
from curvd_server.system import Activities, Ongoing, calling, logger
from curvd_server.system.quotas import SESSIONS

TIERS = (*Tier, "native")
"""How operators are told apart in statistics."""


@dataclass(frozen=True, slots=True)
class SessionStatistics:
    """What a store holds."""

    ready: int
    """Sessions on the device."""
    cold: int
    """Sessions that warm up at their first use."""
    users: int
    """Calls that use a session right now."""
    operators: int
    """Operators that are built."""
    tiers: Mapping[str, int]
    """Of those, by tier: ``first``, ``final``, or ``native`` for native code."""


class SessionStore:
    """All sessions of a server. Those of an earlier process come back cold.

    Args:
        dependencies: What they work with.
    """

    def __init__(self, dependencies: SessionDependencies) -> None:
        self._dependencies = dependencies
        # Two equal requests wait for each other; the entry goes with the last one.
        self._making: weakref.WeakValueDictionary[str, asyncio.Lock] = (
            weakref.WeakValueDictionary()
        )
        self._being_made = Counter[str]()
        self._allotments = Allotments(
            dependencies.catalogue, dependencies.blobs, dependencies.quotas
        )
        found, self._lost = dependencies.catalogue.sessions()
        self._sessions: dict[str, Session] = {}
        locks: dict[str, asyncio.Lock] = {}
        for s in found:
            family = s.info.parameters_of or s.info.id
            lock = locks.setdefault(family, asyncio.Lock())
            session = Session(dependencies, s, self._relatives, lock)
            with contextlib.suppress(CurvdError):  # of what is lost nothing is held
                session.allotment = self._allotments.restored(s.info)
            self._sessions[s.info.id] = session
        self.deletions = Deletions(
            dependencies.catalogue,
            dependencies.blobs,
            lambda: [session.stored.info for session in self._sessions.values()],
        )
        """Deletes models and datasets that no session needs."""
        # Ids sort by time, even if the clock has been set back since.
        latest_us = int(max(self._sessions, default="0").partition("-")[0], 16)
        self._openings = Openings(
            dependencies,
            self._allotments,
            self.deletions,
            relatives=self._relatives,
            add=self._add,
            latest_us=latest_us,
        )

    def get(self, session_id: str) -> SessionInfo:
        """Describe a session as it is now; that renews its lease.

        Args:
            session_id: The session's id.

        Returns:
            The session.

        Raises:
            SessionNotFound: If there is none.
        """
        session = self._find(session_id)
        session.touch()
        return session.info()

    def __contains__(self, session_id: str) -> bool:
        """Tell whether a session is there, whoever asks; that renews nothing."""
        session = self._sessions.get(session_id)
        return session is not None and not session.is_over

    def page(self, *, after: str = "", limit: int) -> tuple[list[SessionInfo], str]:
        """Describe sessions, oldest first.

        Args:
            after: Id of the last session of the page before.
            limit: At most so many.

        Returns:
            One page, and `after` for the next; empty if there is none.
        """
        # Ids sort by time, so a page follows even one whose last session is gone.
        sessions = self._sessions
        later = sorted(
            i
            for i, s in sessions.items()
            if i > after and not s.is_over and _is_seen(s)
        )
        page = [sessions[session_id].info() for session_id in later[:limit]]
        return page, later[limit - 1] if len(later) > limit else ""

    def statistics(self) -> SessionStatistics:
        """Report what is held; on any thread."""
        sessions = list(self._sessions.values())  # at once, on any thread
        ready = sum(s.operator_cache.problem is not None for s in sessions)
        reports = [plan for s in sessions for _, plan in s.operator_cache.reports]
        tiers = Counter("native" if r.compiled else str(r.tier) for r in reports)
        return SessionStatistics(
            ready=ready,
            cold=len(sessions) - ready,
            users=sum(s.users for s in sessions),
            operators=len(reports),
            tiers={tier: tiers[tier] for tier in TIERS},
        )

    @property
    def activities(self) -> Activities:
        """What takes long and goes on."""
        return self._dependencies.activities

    def opening(self, new: NewSession) -> Ongoing:
        """Make what tells how far the making of a session is, for `create`.

        Args:
            new: What the session is to be.

        Returns:
            What has not begun yet.
        """
        return Ongoing(
            Work.OPENING, session=lambda: ("", new.name), activities=self.activities
        )

    async def create(
        self,
        new: NewSession,
        *,
        validate_only: bool = False,
        opening: Ongoing | None = None,
    ) -> SessionInfo:
        """Bring a model, a dataset and a loss together, verified and warm.

        Args:
            new: What the session is to be.
            validate_only: Check and predict; keep nothing.
            opening: Tells how far that is; None: it is only listed.

        Returns:
            The session. The same request id answers with the session it made.

        Raises:
            ModelNotFound: If the model is not registered.
            DatasetNotFound: If the dataset is not registered.
            RequestIdReused: If the same request id came with other content.
            LimitExceeded: If there are too many sessions.
        """
        key = f"{new.request_id or secrets.token_hex(16)} {calling().name}"
        opening = opening or self.opening(new)
        async with self._making.setdefault(key, asyncio.Lock()):
            made = self._made_by(new)
            if made is not None:
                return made.info()
            self._check_room()
            other = self._owned(new.shares_with) if new.shares_with else None
            self._being_made[calling().name] += 1
            try:
                with opening:
                    return await self._openings.open(
                        new, other, validate_only=validate_only, opening=opening
                    )
            finally:
                self._being_made[calling().name] -= 1

    def lease(
        self,
        session_id: str,
        *,
        operator: OperatorSpec | None = None,
        expected_version: int | None = None,
    ) -> AbstractAsyncContextManager[Lease]:
        """Use a session at its current version.

        The version stays valid as long as the lease is held, whatever is updated
        meanwhile. Deleting the session cancels the task that holds it.

        Args:
            session_id: The session's id.
            operator: Build this one first, unless it is there.
            expected_version: Refuse another version.

        Returns:
            A context that gives the session's version; entering it raises
            VersionMismatch if it is at another one, leaving it Cancelled if the session
            was deleted meanwhile.

        Raises:
            SessionNotFound: If there is none.
        """
        return self._usable(session_id).lease(operator, expected_version)

    async def made_by(self, session_id: str, update: Update) -> StoredVersion | None:
        """Find the version that the same request made before.

        Args:
            session_id: The id of the session.
            update: The request; its blob need not be there any more.

        Returns:
            The version; None if the request is new.

        Raises:
            SessionNotFound: If there is no such session.
            RequestIdReused: If the same request id came with other content.
        """
        return await self._owned(session_id).made_by(update)

    async def update(self, session_id: str, update: Update) -> StoredVersion:
        """Move a session to new values. Running work finishes on its version.

        Args:
            session_id: The session's id.
            update: The values; their blob must be complete and held.

        Returns:
            The new version, or the one that the same request made before.

        Raises:
            SessionNotFound: If there is none.
            VersionMismatch: If it is at another version than expected.
            StateMismatch: If the values do not fit the model.
            RequestIdReused: If the same request id came with other content.
        """
        return await self._owned(session_id).update(update)

    async def architecture(self, session_id: str) -> Architecture:
        """Say what tensors the model of a session has.

        Args:
            session_id: The session's id.

        Returns:
            The tensors, under all their names.

        Raises:
            SessionNotFound: If there is none.
        """
        model_id = self._find(session_id).stored.info.model_id
        model = await asyncio.to_thread(self._dependencies.catalogue.model, model_id)
        return architecture_of(model)

    async def renew(self, session_id: str, lease_s: float | None) -> SessionInfo:
        """Put off the end of a session.

        Args:
            session_id: The session's id.
            lease_s: A new length of its lease; None: as before.

        Returns:
            The session as it is now.

        Raises:
            SessionNotFound: If there is none.
        """
        session = self._find(session_id)
        if lease_s is not None:
            _check_endable(session)
            catalogue = self._dependencies.catalogue
            await asyncio.to_thread(catalogue.set_lease, session_id, lease_s)
            session.renew(lease_s)
        return self.get(session_id)

    async def delete(self, session_id: str) -> None:
        """End a session: forget it, cancel its work, free its memory.

        Args:
            session_id: The session's id.

        Raises:
            SessionNotFound: If there is none.
        """
        if session_id in self._lost:
            if calling().name and not calling().is_operator:
                msg = (
                    f"nobody knows any more whose session {session_id!r} was, because its "
                    "record is damaged: an operator of the server has to delete it"
                )
                raise PermissionDenied(msg, session_id=session_id)
            await asyncio.to_thread(
                self._dependencies.catalogue.delete_session, session_id
            )
            del self._lost[session_id]
            return
        session = self._find(session_id)
        _check_endable(session)
        await self._end(session)

    async def expire(self) -> list[str]:
        """End the sessions whose lease ran out, and write down what others have left.

        Returns:
            The ids of those that ended.
        """
        ended = []
        for session in [s for s in self._sessions.values() if s.is_over]:
            try:
                await self._end(session)
            except CurvdError as error:  # the disk is full, perhaps; it stays for later
                logger().warning("not ended", session=session.id, error=str(error))
            else:
                ended.append(session.id)
        await self._note_leases()
        return ended

    def choose_again(self) -> None:
        """Have plans that were chosen on a busy machine chosen anew, if it is quiet now."""
        for session in self._sessions.values():
            session.operator_cache.choose_again()

    async def close(self) -> None:
        """Give the device's memory back; the sessions stay in the catalogue."""
        await self._note_leases(at_the_end=True)
        for session in self._sessions.values():
            await session.operator_cache.close()

    async def _note_leases(self, *, at_the_end: bool = False) -> None:
        """Write down what remains of leases, where that has changed."""
        due = {
            s.id: note[0]
            for s in self._sessions.values()
            if (note := s.remaining.to_note(at_the_end=at_the_end)) is not None
        }
        try:
            await asyncio.to_thread(self._dependencies.catalogue.set_remaining, due)
        except CurvdError as error:
            logger().warning("leases not written down", error=str(error))
            return
        for session_id, seconds in due.items():
            if session_id in self._sessions:
                self._sessions[session_id].remaining.noted(seconds)

    def _relatives(self, session: Session) -> list[Session]:
        """Find the sessions that share the parameters of one."""
        family = session.family
        return [s for s in self._sessions.values() if s.family == family]

    async def _add(self, session: Session) -> None:
        await asyncio.to_thread(
            self._dependencies.catalogue.add_session, session.stored
        )
        session.touch()
        self._sessions[session.id] = session

    async def _end(self, session: Session) -> None:
        del self._sessions[session.id]
        try:
            await to_the_end(session.end())
        except CurvdError:  # the catalogue still has it
            self._sessions[session.id] = session
            raise

    def _made_by(self, new: NewSession) -> Session | None:
        for session in self._sessions.values():
            if session.stored.info.owner != calling().name:
                continue
            if new.request_id and session.stored.request_id == new.request_id:
                known = session.stored.fingerprint
                check_same(known, new.fingerprint, new.request_id)
                return session
        return None

    def _find(self, session_id: str) -> Session:
        session = self._sessions.get(session_id)
        if session_id in self._lost:
            raise self._lost[session_id]
        if session is None or session.is_over or not _is_seen(session):
            msg = (
                f"no session {session_id[:80]!r} on this server: it was never created, was "
                "deleted, or its lease ran out"
            )
            raise SessionNotFound(msg, session_id=session_id[:80])
        return session

    def _usable(self, session_id: str) -> Session:
        """Find a session that the caller may use; an operator sees more than those."""
        session = self._find(session_id)
        info = session.stored.info
        if not calling().uses(info.owner, info.shared_with):
            raise _not_yours(session, "it is not shared with you")
        return session

    def _owned(self, session_id: str) -> Session:
        """Find a session whose parameters are the caller's to change."""
        session = self._find(session_id)
        if not calling().owns(session.stored.info.owner):
            raise _not_yours(session, "its parameters are its owner's to change")
        return session

    def _check_room(self) -> None:
        name = calling().name
        own = sum(s.stored.info.owner == name for s in self._sessions.values())
        self._dependencies.quotas.check(SESSIONS, own + self._being_made[name], 1)
        held = len(self._sessions) + self._being_made.total()
        limit = self._dependencies.limits.sessions
        if held >= limit:
            msg = (
                f"{held} sessions are the limit of this server (sessions): delete some "
                "(client.sessions(), `curvd sessions`, `curvd delete`), or open them in a "
                "with-statement, or with lease_s="
            )
            raise LimitExceeded(msg, sessions=held, limit=limit)


def _is_seen(session: Session) -> bool:
    """Tell whether a session exists for the caller."""
    info = session.stored.info
    return calling().sees(info.owner, info.shared_with)


def _check_endable(session: Session) -> None:
    """Refuse whoever is neither its owner nor an operator."""
    if not (calling().is_operator or calling().owns(session.stored.info.owner)):
        raise _not_yours(session, "its end is up to its owner")


def _not_yours(session: Session, why: str) -> PermissionDenied:
    owner = session.stored.info.owner
    msg = f"session {session.id} belongs to {owner!r}: {why}"
    return PermissionDenied(msg, session_id=session.id, owner=owner)
