"""The file that says who may call: a line for each token, without the token.

A token is 32 random bytes, so nobody can try them all, and one round of SHA-256 keeps it
as well as a slow hash would; a slow one (scrypt) is for words that people choose, and
would cost each call its time. A token is found by its hash: how long that takes depends
on the hash of a guess, which says nothing about the token itself.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import secrets
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from curvd.errors import InvalidSpec
from curvd_server.system import ROLES, USER, Identity
from curvd_server.transport.watched_file import WatchedFile, text_of

ANY = "*"
"""Name on a line of certificates that is about all of them."""
LONGEST_NAME = 128
_HASH = re.compile("sha256:([0-9a-f]{64})")
_CERTIFICATE = "certificate"
_WORDS = ("roles", "groups", "expires")
_UNITS = {"h": 3600, "d": 24 * 3600}


@dataclass(frozen=True, slots=True)
class Entry:
    """What one line says."""

    identity: Identity
    expires_s: float | None = None
    """Seconds since the epoch; None: never."""


@dataclass(frozen=True, slots=True)
class Known:
    """All that a file says."""

    tokens: Mapping[str, Entry]
    """By the SHA-256 of the token, hexadecimal."""
    certificates: Mapping[str, Entry]
    """By the name that a certificate carries, or `ANY`."""


class TokenFile:
    """A file of tokens, read again when it changes.

    Args:
        path: The file.
        clock: Seconds since the epoch.
        monotonic: Seconds that nobody can set.

    Raises:
        InvalidSpec: If it cannot be read, others may write to it, or a line is malformed.
    """

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._file = WatchedFile(
            path, read, "tokens", lambda known: len(known.tokens), monotonic
        )

    def token(self, token: str) -> Entry | None:
        """Find the line of a token that a caller brought."""
        return self._file.get().tokens.get(_hash_of(token))

    def certificate(self, name: str) -> Entry | None:
        """Find the line of the name that a caller's certificate carries.

        Args:
            name: The name.

        Returns:
            The line; that about all certificates if it has none of its own.
        """
        known = self._file.get().certificates
        if name in known:
            return known[name]
        if ANY not in known:
            return None
        every = known[ANY]
        identity = Identity(name, every.identity.roles, every.identity.groups)
        return Entry(identity, every.expires_s)

    def is_over(self, entry: Entry) -> bool:
        """Tell whether a line has expired."""
        return entry.expires_s is not None and self._clock() >= entry.expires_s

    def reload(self) -> None:
        """Read the file again; if it cannot be used, what was read before goes on."""
        self._file.reload()


def read(path: Path) -> Known:
    """Read a file of tokens.

    Args:
        path: The file.

    Returns:
        What it says.

    Raises:
        InvalidSpec: If it cannot be read, others may write to it, or a line is malformed;
            the message names the line, and nothing that is secret.
    """
    text = text_of(path, "tokens", why="make themselves tokens")
    tokens: dict[str, Entry] = {}
    certificates: dict[str, Entry] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
            if words:
                key, entry = _entry(words)
                home = tokens if key else certificates
                _add(home, key or entry.identity.name, entry)
        except ValueError as error:
            msg = f"line {number} of {path}: {error}"
            raise InvalidSpec(msg, file=path, line=number) from None
    return Known(tokens, certificates)


def new_token() -> str:
    """Make a token.

    Returns:
        32 random bytes, as text.
    """
    return f"curvd_{secrets.token_urlsafe(32)}"


def line_of(
    name: str,
    token: str,
    *,
    roles: Iterable[str] = (),
    groups: Iterable[str] = (),
    expires_s: float | None = None,
) -> str:
    """Write the line of a token.

    Args:
        name: Whose it is.
        token: The token, of which only the hash is written.
        roles: What they may do.
        groups: Whom things are shared with at once.
        expires_s: Seconds since the epoch.

    Returns:
        The line.

    Raises:
        InvalidSpec: If a name or a role is none.
    """
    words = [name, f"sha256:{_hash_of(token)}"]
    for key, values in (("roles", roles), ("groups", groups)):
        if values := ",".join(values):
            words.append(f"{key}={values}")
    if expires_s is not None:
        moment = datetime.datetime.fromtimestamp(expires_s, datetime.UTC)
        words.append(f"expires={moment.isoformat(timespec='seconds')}")
    try:
        _entry(words)
    except ValueError as error:
        raise InvalidSpec(str(error), name=name) from None
    return shlex.join(words)


def append(path: Path, line: str) -> None:
    """Add a line to a file of tokens, which is made for its owner alone if need be.

    Args:
        path: The file.
        line: The line.

    Raises:
        InvalidSpec: If the file cannot be written, or is no text.
    """
    try:
        with open(path, "a+", encoding="utf-8", opener=_private) as file:
            file.seek(0)
            text = file.read()
            whole = "" if not text or text.endswith("\n") else "\n"
            file.write(f"{whole}{line}\n")
    except UnicodeDecodeError as error:
        msg = f"{str(path)!r} is no file of tokens: it is no UTF-8 ({error.reason})"
        raise InvalidSpec(msg, file=path) from error
    except OSError as error:
        msg = f"cannot write to {str(path)!r}: {error.strerror}"
        raise InvalidSpec(msg, file=path) from error


def seconds_of(duration: str) -> float:
    """Read how long a token is good.

    Args:
        duration: Hours or days: ``12h``, ``90d``.

    Returns:
        Seconds.

    Raises:
        InvalidSpec: If it is something else.
    """
    found = re.fullmatch(r"([1-9]\d{0,5})([hd])", duration)
    if found is None:
        msg = f"a token is good for hours or days, such as 12h or 90d, got {duration!r}"
        raise InvalidSpec(msg, expires=duration)
    return float(int(found[1]) * _UNITS[found[2]])


def check_name(name: str) -> str:
    """Refuse what is no name of a caller.

    Args:
        name: The name.

    Returns:
        The name.

    Raises:
        ValueError: If it is empty, too long, not printable, or looks like a group.
    """
    if not 1 <= len(name) <= LONGEST_NAME or not name.isprintable():
        msg = f"a name has 1 to {LONGEST_NAME} printable characters, got {name[:200]!r}"
        raise ValueError(msg)
    if name[0] in "@*":
        msg = f"a name does not begin with '@' or '*', got {name!r}"
        raise ValueError(msg)
    return name


def _entry(words: list[str]) -> tuple[str, Entry]:
    """Read one line: the hash of its token, empty for certificates, and the rest."""
    if len(words) < 2:
        msg = "expected NAME sha256:HASH or NAME certificate, then options"
        raise ValueError(msg)
    name, what, *options = words
    found = _HASH.fullmatch(what)
    if found is None and what != _CERTIFICATE:
        # It may be the token itself, which must not be repeated.
        msg = (
            "the second word must be sha256: and 64 hexadecimal digits, or certificate"
        )
        raise ValueError(msg)
    if name != ANY or found is not None:
        check_name(name)
    given = _options(options)
    roles = given.get("roles", USER).split(",")
    if unknown := [role for role in roles if role not in ROLES]:
        msg = f"unknown role {unknown[0]!r}; known: {', '.join(ROLES)}"
        raise ValueError(msg)
    groups = (
        [check_name(g) for g in given["groups"].split(",")] if "groups" in given else []
    )
    identity = Identity(name, frozenset(roles), frozenset(groups))
    expires_s = _moment(given["expires"]) if "expires" in given else None
    return (found[1] if found else ""), Entry(identity, expires_s)


def _options(words: list[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in _WORDS or not equals or key in given:
            msg = f"expected each of {'=, '.join(_WORDS)}= once at most, got {word[:80]!r}"
            raise ValueError(msg)
        given[key] = value
    return given


def _moment(text: str) -> float:
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        msg = (
            f"expires must be a moment such as 2027-01-31T12:00:00Z, got {text[:80]!r}"
        )
        raise ValueError(msg) from None
    if moment.tzinfo is None:
        msg = f"expires must say its time zone, such as {text}Z"
        raise ValueError(msg)
    return moment.timestamp()


def _add(entries: dict[str, Entry], key: str, entry: Entry) -> None:
    if key in entries:
        msg = "the same token or certificate has a line already"
        raise ValueError(msg)
    entries[key] = entry


def _hash_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
