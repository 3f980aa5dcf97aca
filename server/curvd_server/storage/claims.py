"""Whose blobs are: who has sent all bytes of which, and may still need them.

A blob lies on the disk once, however many have sent it. Each of them has a claim to it, which
ends when the last thing of his goes that refers to the blob, or when nothing of his refers to
it in time; the claims of others end nothing and prove nothing. A file goes with the last claim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


class Claims:
    """The claims to the blobs of one store, whose lock is held by whoever asks.

    Args:
        referrers: What refers to blobs from before: digest -> names of owners.
        sent_s: When they have sent them, as far as that is known; seconds since the epoch.
    """

    def __init__(self, referrers: Mapping[str, set[str]], sent_s: float) -> None:
        self._names = {
            digest: dict.fromkeys(names, sent_s) for digest, names in referrers.items()
        }
        self._held: Counter[tuple[str, str]] = Counter()
        self._due: set[tuple[str, str]] = set()

    def add(self, digest: str, name: str, sent_s: float) -> None:
        """Note that somebody has sent all of a blob.

        Args:
            digest: The digest of the blob.
            name: Who; empty: nobody in particular.
            sent_s: When; seconds since the epoch.
        """
        self._names.setdefault(digest, {})[name] = sent_s

    def has(self, digest: str, name: str) -> bool:
        """Tell whether a blob is somebody's; nobody in particular has whatever is there."""
        return not name or name in self._names.get(digest, ())

    def of_blob(self, digest: str) -> dict[str, float]:
        """Tell whose a blob is, and since when; a copy."""
        return dict(self._names.get(digest, ()))

    def of_caller(self, name: str) -> dict[str, float]:
        """Tell which blobs are somebody's, and since when."""
        found = self._names.items()
        return {digest: names[name] for digest, names in found if name in names}

    def drop(self, digest: str, name: str) -> None:
        """End a claim, if there is one."""
        names = self._names.get(digest, {})
        names.pop(name, None)
        if not names:
            self._names.pop(digest, None)

    def hold(self, digest: str, name: str) -> None:
        """Have a blob stay, which need not be there yet, until `let_go`."""
        self._held[digest, name] += 1

    def let_go(self, digest: str, name: str) -> None:
        """Take back one `hold`."""
        self._held[digest, name] -= 1
        if not self._held[digest, name]:
            del self._held[digest, name]

    def is_held(self, digest: str, name: str) -> bool:
        """Tell whether a caller holds a blob."""
        return (digest, name) in self._held

    def held(self) -> set[str]:
        """Tell which blobs somebody holds."""
        return {digest for digest, _ in self._held}

    def put_off(self, digest: str, name: str) -> None:
        """Note that a claim ends, or did, as soon as nobody holds the blob any more."""
        self._due.add((digest, name))

    def due(self) -> set[tuple[str, str]]:
        """Take what was put off and waits for nobody now: digests and names."""
        held = self.held()
        due = {item for item in self._due if item[0] not in held}
        self._due -= due
        return due
