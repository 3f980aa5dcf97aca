"""Tokens that an issuer signs (JWT, RFC 7519), for servers whose callers log in elsewhere.

A TOML file says whose tokens they are, and a JWK set (RFC 7517) beside it has the issuer's
public keys. Nothing is fetched. What may be wrong with a token, and how it has been used
against others, is RFC 8725's: algorithms are named by the server's operator and belong to
a key's kind, so neither ``none`` nor a public key as a secret gets anybody in; issuer,
audience and expiry are asked for; keys that a token brings or points to are not looked at.

What a signature proves does not change, so a token that has been verified is known by its
hash until it expires or the keys change.
"""

from __future__ import annotations

import hashlib
import json
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import jwt

from curvd.errors import InvalidSpec, Unauthenticated
from curvd_server.system import ROLES, USER, Identity
from curvd_server.transport.token_file import check_name
from curvd_server.transport.watched_file import WatchedFile, text_of

Key = dict[str, Any]
"""A public key as a JWK set has it (RFC 7517, 4)."""

_KINDS: Mapping[str, str] = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), "RSA"),
    **dict.fromkeys(("ES256", "ES384", "ES512"), "EC"),
    "EdDSA": "OKP",
}
"""Algorithms that may be named -> kind of key (``kty``). None has a shared secret."""
_SECRET = ("d", "k", "p", "q")
"""Members of a key that only its owner has."""
_MOST_KNOWN = 4096
"""Verified tokens that are remembered."""
_MOST_LEEWAY_S = 600.0


class Why(StrEnum):
    """Why a token does not let its bearer in; one word for the log."""

    MALFORMED = "malformed"
    ALGORITHM = "algorithm"
    CRITICAL = "critical"
    KEY = "key"
    SIGNATURE = "signature"
    ISSUER = "issuer"
    AUDIENCE = "audience"
    EXPIRED = "expired"
    EARLY = "early"
    CLAIMS = "claims"


_SAID: Mapping[Why, str] = {
    Why.MALFORMED: "it is no JSON Web Token that is signed and whole",
    Why.ALGORITHM: "its algorithm is none of this server's, or not that of its key",
    Why.CRITICAL: "it has extensions that must be understood (crit), and are not",
    Why.KEY: "its key (kid) is none of the issuer's",
    Why.SIGNATURE: "its signature is not the issuer's",
    Why.ISSUER: "another issuer has made it (iss)",
    Why.AUDIENCE: "it is for another audience (aud)",
    Why.EXPIRED: "it has expired (exp): log in again",
    Why.EARLY: "it is not valid yet (nbf, iat)",
    Why.CLAIMS: "it lacks exp, iss, aud or the caller's name, or one of these is none",
}
"""What its bearer is told. Nothing of a token is in it."""
_FAULTS: Mapping[type[jwt.PyJWTError], Why] = {
    jwt.InvalidSignatureError: Why.SIGNATURE,
    jwt.InvalidAlgorithmError: Why.ALGORITHM,
    jwt.InvalidKeyError: Why.ALGORITHM,
    jwt.PyJWKError: Why.ALGORITHM,
    jwt.InvalidIssuerError: Why.ISSUER,
    jwt.InvalidAudienceError: Why.AUDIENCE,
    jwt.MissingRequiredClaimError: Why.CLAIMS,
}
"""What PyJWT says; all else is `MALFORMED`."""
_UNREADABLE = (jwt.PyJWTError, ValueError, TypeError, LookupError, RecursionError)
"""What comes of reading what strangers write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuerConfig:
    """What the TOML file says."""

    issuer: str
    """What ``iss`` must be."""
    audience: str
    """What must be in ``aud``."""
    jwks: Path
    """The file with the issuer's keys; a path from the TOML file's folder."""
    algorithms: tuple[str, ...]
    """Those that tokens may be signed with."""
    leeway_s: float = 30.0
    """How far clocks may be apart."""
    name: str = "sub"
    """Claim that names the caller; parts of a path have dots between."""
    groups: str = ""
    """Claim with the caller's groups; empty: he has none."""
    roles: str = ""
    """Claim that roles are read from; empty: everybody is a user."""
    role_values: Mapping[str, tuple[str, ...]]
    """Role -> values of that claim, any of which gives it; a user is everybody."""


class Issuer:
    """Tells who calls by tokens that an issuer has signed.

    Args:
        path: The TOML file.
        clock: Seconds since the epoch.
        monotonic: Seconds that nobody can set.

    Raises:
        InvalidSpec: If a file cannot be read, others may write to it, or it makes no sense.
    """

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._clock = read(path), clock
        self._file = WatchedFile(self._config.jwks, read_keys, "keys", len, monotonic)
        self._keys = self._file.get()
        # By hash: who it is, and when that ends. Of the keys above, so both go together.
        self._verified: dict[bytes, tuple[Identity, float]] = {}

    def reload(self) -> None:
        """Read the keys again; if they cannot be used, those before go on."""
        self._file.reload()

    def identity(self, token: str) -> Identity:
        """Say who calls.

        Args:
            token: What he brought, perhaps nothing.

        Returns:
            Who it is.

        Raises:
            Unauthenticated: If the token does not prove that; nothing of it is repeated.
        """
        self._take(self._file.get())
        known = hashlib.sha256(token.encode(errors="replace")).digest()
        identity, expires_s = self._verified.get(known, (None, 0.0))
        if identity is None:
            identity, expires_s = self._verify(token)
            if len(self._verified) >= _MOST_KNOWN:
                self._verified.pop(next(iter(self._verified)))
            self._verified[known] = identity, expires_s
        if self._clock() >= expires_s + self._config.leeway_s:
            del self._verified[known]
            raise _refused(Why.EXPIRED)
        return identity

    def _take(self, keys: Mapping[str, Key]) -> None:
        """Forget what other keys have verified: one of them may be known to others now."""
        if keys is not self._keys:
            self._keys = keys
            self._verified.clear()

    def _verify(self, token: str) -> tuple[Identity, float]:
        config = self._config
        try:
            header = jwt.get_unverified_header(token)
            key = self._key(header)
            claims = jwt.decode(
                token,
                jwt.PyJWK(key, header["alg"]),
                algorithms=[header["alg"]],
                audience=config.audience,
                issuer=config.issuer,
                options={
                    "require": ["exp", "iss", "aud"],
                    # Moments are compared below, by a clock that tests can set.
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
        except _UNREADABLE as error:
            whys = (why for kind, why in _FAULTS.items() if isinstance(error, kind))
            raise _refused(next(whys, Why.MALFORMED)) from None
        return self._caller(claims), self._times(claims)

    def _key(self, header: Mapping[str, Any]) -> Key:
        """Find the key that a token names, if its algorithm is that key's."""
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in self._config.algorithms:
            raise _refused(Why.ALGORITHM)
        if "crit" in header:
            raise _refused(Why.CRITICAL)
        if not isinstance(kid, str):
            raise _refused(Why.KEY)
        if kid not in self._keys:  # they may have been rotated this very moment
            self._take(self._file.look())
        if kid not in self._keys:
            raise _refused(Why.KEY)
        key = self._keys[kid]
        is_pinned = key.get("alg", algorithm) == algorithm
        if key["kty"] != _KINDS[algorithm] or not is_pinned:
            raise _refused(Why.ALGORITHM)
        return key

    def _times(self, claims: Mapping[str, Any]) -> float:
        """Compare moments with now; the token is good until the one returned."""
        now_s, leeway_s = self._clock(), self._config.leeway_s
        found: dict[str, Any] = {n: claims.get(n) for n in ("exp", "nbf", "iat")}
        for value in found.values():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and abs(value) < 1e15):
                raise _refused(Why.CLAIMS)
        for name in ("nbf", "iat"):
            if found[name] is not None and now_s < found[name] - leeway_s:
                raise _refused(Why.EARLY)
        return float(found["exp"])

    def _caller(self, claims: Mapping[str, Any]) -> Identity:
        config = self._config
        name = _claim(claims, config.name)
        if not isinstance(name, str):
            raise _refused(Why.CLAIMS)
        held = set(_words(_claim(claims, config.roles)))
        roles = {r for r, values in config.role_values.items() if held & set(values)}
        try:
            check_name(name)
        except ValueError:
            raise _refused(Why.CLAIMS) from None
        groups = filter(_is_name, _words(_claim(claims, config.groups)))
        return Identity(name, frozenset({USER, *roles}), frozenset(groups))


def read(path: Path) -> IssuerConfig:
    """Read what is to be known of an issuer.

    Args:
        path: The TOML file.

    Returns:
        What it says.

    Raises:
        InvalidSpec: If it cannot be read, others may write to it, or a key or a value is
            none; the message names it.
    """
    try:
        found = tomllib.loads(text_of(path, "issuer", why="let themselves in"))
    except tomllib.TOMLDecodeError as error:
        msg = f"{path} is no TOML: {error}"
        raise InvalidSpec(msg, file=path) from error
    known = IssuerConfig.__dataclass_fields__
    needed = {"issuer": str, "audience": str, "jwks": str, "algorithms": list}
    kinds: dict[str, Any] = {
        **needed,
        "leeway_s": (int, float),
        "name": str,
        "groups": str,
        "roles": str,
    }
    kinds["role_values"] = dict
    if unknown := sorted(found.keys() - known.keys()):
        msg = (
            f"{path} sets what does not exist: {unknown[0]}; known: {', '.join(known)}"
        )
        raise InvalidSpec(msg, file=path)
    if missing := sorted(needed.keys() - found.keys()):
        msg = f"{path} lacks {missing[0]}: who issues tokens, for whom, with which keys"
        raise InvalidSpec(msg, file=path)
    for name, value in found.items():
        if (
            not isinstance(value, kinds[name])
            or isinstance(value, bool)
            or value in ("", [])
        ):
            msg = f"{name} in {path} cannot be {value!r}"
            raise InvalidSpec(msg, file=path)
    bad = [a for a in found["algorithms"] if a not in _KINDS]
    if bad:
        msg = (
            f"algorithm {bad[0]!r} in {path} is none of {', '.join(_KINDS)}: a server can "
            "only hold public keys"
        )
        raise InvalidSpec(msg, file=path)
    if not 0 <= (leeway_s := found.get("leeway_s", 30.0)) <= _MOST_LEEWAY_S:
        msg = f"leeway_s in {path} must be in [0, {_MOST_LEEWAY_S:g}], got {leeway_s}"
        raise InvalidSpec(msg, file=path)
    values: dict[str, Any] = found.get("role_values", {})
    for role, given in values.items():
        if role not in ROLES or not _are_texts(given):
            msg = (
                f"role_values in {path} has lists of texts for {', '.join(ROLES)}, got "
                f"{role} = {given!r}"
            )
            raise InvalidSpec(msg, file=path)
    return IssuerConfig(**{
        **found,
        "jwks": path.parent / found["jwks"],
        "algorithms": tuple(found["algorithms"]),
        "role_values": {role: tuple(given) for role, given in values.items()},
    })


def read_keys(path: Path) -> Mapping[str, Key]:
    """Read the issuer's public keys.

    Args:
        path: A JWK set.

    Returns:
        The keys for signatures by their names (``kid``).

    Raises:
        InvalidSpec: If it cannot be read, others may write to it, it has a key that is
            secret, two of one name, or none that can be used.
    """
    text = text_of(path, "issuer's keys", why="let themselves in")
    try:
        listed = json.loads(text)["keys"]
        given = [dict(key) for key in listed]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        msg = f"{path} is no JWK set: expected an object with a list of keys ({error})"
        raise InvalidSpec(msg, file=path) from None
    keys: dict[str, Key] = {}
    for key in given:
        kid, kind = key.get("kid"), key.get("kty")
        if kind == "oct" or any(member in key for member in _SECRET):
            msg = (
                f"{path} has a key that is secret ({kind}, kid {kid!r}): a server needs the "
                "issuer's public keys, and must not have others"
            )
            raise InvalidSpec(msg, file=path)
        if not isinstance(kid, str) or key.get("use", "sig") != "sig":
            continue
        if kid in keys:
            msg = f"{path} has two keys of the name (kid) {kid!r}"
            raise InvalidSpec(msg, file=path)
        try:
            jwt.PyJWK(key)
        except jwt.PyJWTError:
            continue  # of a kind that nobody here knows; others may be known
        keys[kid] = key
    if not keys:
        msg = f"{path} has no public key for signatures with a name (kid) that is known here"
        raise InvalidSpec(msg, file=path)
    return keys


def _refused(why: Why) -> Unauthenticated:
    return Unauthenticated(f"the token does not let you in: {_SAID[why]}", why=why)


def _claim(claims: Mapping[str, Any], path: str) -> Any:
    """Find a claim by its name, or by a path of names; None if there is none."""
    if path in claims:
        return claims[path]
    found: Any = claims
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _words(value: Any) -> list[str]:
    """Read a claim that has several values: a list, or a text with blanks (RFC 8693)."""
    if isinstance(value, str):
        return value.split()
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


def _is_name(group: str) -> bool:
    """Tell whether a thing can be shared with a group; others give nobody anything."""
    try:
        check_name(group)
    except ValueError:
        return False
    return True


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v for v in value)
