"""Lists come in pages, each of which fits into a message."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

from curvd.errors import InvalidSpec

_USUAL, _LARGEST = 100, 1000
_BYTES = 2 << 20
"""A page that would be larger ends sooner."""


class Sized(Protocol):
    """A message of protobuf."""

    def ByteSize(self) -> int:
        """Tell its bytes on the wire."""


M = TypeVar("M", bound=Sized)


class Page(Generic[M]):
    """One page of a list.

    Args:
        page_size: What the caller asks for; 0: the usual number.
    """

    def __init__(self, page_size: int) -> None:
        self.limit = min(page_size or _USUAL, _LARGEST)
        """How many it has at most."""
        self.messages: list[M] = []
        self.token = ""
        """Where the next page goes on; empty: this one is the last, as far as it knows."""
        self._latest, self._bytes = "", 0

    def add(self, name: int | str, message: M) -> bool:
        """Take one more, if it fits.

        Args:
            name: Where the next page goes on if this is the last that fits.
            message: What is listed.

        Returns:
            Whether it was taken; if not, the page is full.
        """
        self._bytes += message.ByteSize()
        has_room = len(self.messages) < self.limit and self._bytes <= _BYTES
        if self.messages and not has_room:
            self.token = self._latest
            return False
        self.messages.append(message)
        self._latest = str(name)
        return True

    def fill(self, found: Iterable[tuple[int | str, M]]) -> None:
        """Take as many as fit; no more are read than those and one more.

        Args:
            found: Names and messages.
        """
        for name, message in found:
            if not self.add(name, message):
                return


def ordinal(page_token: str) -> int:
    """Read where a page of numbered things goes on.

    Args:
        page_token: What the page before said; empty: at the first one.

    Raises:
        InvalidSpec: If no page has said that.
    """
    if not page_token:
        return 0
    if not (page_token.isascii() and page_token.isdecimal()) or len(page_token) > 18:
        msg = (
            f"page_token is {page_token[:80]!r}, which no page has named: take "
            "next_page_token of the page before, or none for the first page"
        )
        raise InvalidSpec(msg, page_token=page_token[:80])
    return int(page_token)
