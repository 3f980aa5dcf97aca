"""Streams that are over: what may still come for them (RFC 9113, section 5.1)."""

from __future__ import annotations

_REMEMBERED = 128


class Closed:
    """Remembers how the last streams ended.

    After both ends said that they are done, more data is an error. After this end cut a
    stream off, whatever the peer sent before it knew is to be ignored.
    """

    def __init__(self) -> None:
        self._excused: dict[int, bool] = {}
        self._forgotten = 0

    def add(self, number: int, *, excused: bool) -> None:
        """Remember a stream.

        Args:
            number: The number of the stream.
            excused: Whether this end cut it off.
        """
        if len(self._excused) >= _REMEMBERED:
            self._forgotten = next(iter(self._excused))
            del self._excused[self._forgotten]
        self._excused[number] = excused

    def knows(self, number: int) -> bool:
        """Whether there was a stream of that number, as far as that is remembered.

        Args:
            number: The number of a stream that is neither open nor yet to come.
        """
        return number in self._excused or number <= self._forgotten

    def excuses(self, number: int) -> bool:
        """Whether what still comes for a stream is to be ignored.

        Args:
            number: The number of a stream that is neither open nor yet to come.
        """
        return self._excused.get(number, number <= self._forgotten)
