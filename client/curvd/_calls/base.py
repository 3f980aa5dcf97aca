"""Every call as parts to send and parts to receive, without I/O.

The blocking and the asyncio client carry parts between a `Call` and a channel, and
differ in ``for`` and ``async for`` only; everything that could be wrong is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
from google.protobuf.message import Message

from curvd.contract import Part, Rpc
from curvd.tensors import Buffer

T = TypeVar("T")


class Call(Generic[T]):
    """One call, over as many exchanges and attempts as it takes.

    Per attempt `restart`, then until `done`: send `parts`, `feed` what comes back, and
    `conclude`.

    Args:
        rpc: Which method.
    """

    def __init__(self, rpc: Rpc) -> None:
        self.rpc = rpc
        self.done = False
        self.attempts = 0
        self.metadata: tuple[tuple[str, str], ...] = ()
        """What its headers have beside what all calls have."""
        self.failure: Exception | None = None
        """What went wrong while parts were made; it must not disappear in gRPC."""
        self.progressed: Callable[[], None] = lambda: None
        """Called when an exchange brought the call nearer to its end."""
        self.allocate: Callable[[int], Buffer] = lambda n: np.empty(n, np.uint8)
        """Where the memory for results comes from."""

    def restart(self) -> None:
        """Get ready for a new attempt."""
        self.attempts += 1
        self.failure = None

    def parts(self) -> Iterator[Part]:
        """Make the request of the next exchange.

        Yields:
            Its parts.
        """
        try:
            yield from self._request()
        except Exception as error:
            self.failure = error

    def recovers(self, error: BaseException) -> bool:
        """Tell whether another attempt will go another way, and get ready for it.

        Args:
            error: What the attempt raised.

        Returns:
            True if it is no reason to give up.
        """
        return False

    def feed(self, part: Any) -> Iterator[Any]:
        """Take one part of the response.

        Args:
            part: A message, the bytes of a chunk, or both.

        Yields:
            What can be handed to the caller already.
        """
        raise NotImplementedError

    def buffer_for(self, nbytes: int) -> memoryview | None:
        """Find the place where the next chunk of the response belongs.

        Args:
            nbytes: Its size.

        Returns:
            The place, to be handed to `feed` when it is filled; None: any will do.
        """
        return None

    def conclude(self) -> None:
        """Take note that the response is complete."""
        raise NotImplementedError

    def result(self) -> T:
        """Hand out what was asked for, once the call is done."""
        raise NotImplementedError

    def _request(self) -> Iterator[Part]:
        raise NotImplementedError


class Unary(Call[T]):
    """A message for a message.

    Args:
        rpc: Which method.
        request: What to send.
        read: Makes the result from the response.
    """

    def __init__(self, rpc: Rpc, request: Message, read: Callable[[Any], T]) -> None:
        super().__init__(rpc)
        self._message, self._read = request, read
        self._response: Part | None = None

    def _request(self) -> Iterator[Part]:
        yield self._message

    def feed(self, part: Part) -> Iterator[Any]:
        """Keep the response."""
        self._response = part
        yield from ()

    def conclude(self) -> None:
        """Nothing can be missing."""
        self.done = True

    def result(self) -> T:
        """Read the response."""
        return self._read(self._response)
