"""The making of a session as a call without I/O, whether somebody looks it or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from curvd._calls.base import Call
from curvd.contract import (
    RPCS,
    Part,
    SessionInfo,
    StageProgress,
    convert_activities,
    convert_sessions,
)
from curvd.errors import Internal, InvalidSpec, Unimplemented
from curvd.v1 import session_service_pb2 as session_pb

ObserveOpening = Callable[[StageProgress], None]
"""Called with how far it is."""


class CreateSession(Call[SessionInfo]):
    """A message for a session; for progress and then the session, if somebody looks.

    Args:
        request: What the session is to be.
    """

    def __init__(self, request: session_pb.CreateSessionRequest) -> None:
        super().__init__(RPCS["CreateSession"])
        self._message = request
        self._observe: ObserveOpening | None = None
        self._session: Any = None

    def observed(self, observe: ObserveOpening | None) -> CreateSession:
        """Have it tell how far it is.

        Args:
            observe: Is told; None: nobody is.

        Returns:
            The same call.
        """
        self._observe = observe
        self.rpc = RPCS["CreateSession" if observe is None else "OpenSession"]
        return self

    def restart(self) -> None:
        """Ask again: the same request finds the session that it made."""
        super().restart()
        self._session = None

    def recovers(self, error: BaseException) -> bool:
        """Go on without progress at a server that does not know of it."""
        if self._observe is None or not isinstance(error, Unimplemented):
            return False
        self.observed(None)
        return True

    def feed(self, part: Part) -> Iterator[Any]:
        """Take the session, or how far it is."""
        message: Any = part
        if message.DESCRIPTOR.name == "CreateSessionResponse" or message.HasField(
            "session"
        ):
            self._session = message.session
        elif self._observe is not None and message.HasField("progress"):
            with contextlib.suppress(InvalidSpec):  # a stage of a newer server
                self._observe(convert_activities.progress_from_proto(message.progress))
        yield from ()

    def conclude(self) -> None:
        """Check that there is a session.

        Raises:
            Internal: If there is none.
        """
        if self._session is None:
            msg = f"the server's answer to {self.rpc.name} breaks the contract: no session"
            raise Internal(msg, rpc=self.rpc.name)
        self.done = True

    def result(self) -> SessionInfo:
        """Read the session."""
        return convert_sessions.session_from_proto(self._session)

    def _request(self) -> Iterator[Part]:
        if self._observe is None:
            yield self._message
        else:
            yield session_pb.OpenSessionRequest(session=self._message)
