"""Finds out who calls: by a token, ours or an issuer's, by a certificate, or nobody."""

from __future__ import annotations

import datetime
import hmac
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from curvd.errors import Unauthenticated
from curvd_server.system import EVERYBODY, USER, Identity
from curvd_server.transport.token_file import Entry, TokenFile, check_name

if TYPE_CHECKING:  # of an extra, which few have
    from curvd_server.transport.issuer import Issuer

_ADMITTED: ContextVar[Identity | None] = ContextVar("admitted", default=None)
"""Whose token the call under way has brought; None: none was needed until now."""
_SCHEME = b"bearer"
_ALTERNATIVES, _COMMON = "x509_subject_alternative_name", "x509_common_name"
"""What grpcio calls the names of a certificate."""


class Callers:
    """Those who may call one server.

    Args:
        token: What every call must bring, which tells nobody apart; None: nothing.
        tokens: Names and tokens of those who may call; None: there is no such file.
        certificates: Whether clients have certificates, so that their names are known.
        issuer: Reads the tokens of an issuer; None: there is none.
    """

    def __init__(
        self,
        token: str | None = None,
        tokens: TokenFile | None = None,
        *,
        certificates: bool = False,
        issuer: Issuer | None = None,
    ) -> None:
        self._expected = None if token is None else token.encode().lstrip(b" ")
        self._tokens, self._certificates = tokens, certificates
        self._issuer = issuer

    @property
    def asks(self) -> bool:
        """Whether calls have to bring something."""
        ways = (self._expected, self._tokens, self._issuer)
        return any(way is not None for way in ways)

    @property
    def tells_apart(self) -> bool:
        """Whether callers have names."""
        named = self._tokens is not None or self._issuer is not None
        return named or self._certificates

    def reload(self) -> None:
        """Read the file of tokens again, or the issuer's keys."""
        if self._tokens is not None:
            self._tokens.reload()
        if self._issuer is not None:
            self._issuer.reload()

    def admit(self, authorization: str | bytes) -> None:
        """Let a call in by what it brings, before anything of it is read.

        Args:
            authorization: The value of its header; empty if it has none.

        Raises:
            Unauthenticated: If that does not let it in.
        """
        _ADMITTED.set(None)
        given = _as_bytes(authorization)
        if self._expected is not None:
            if not hmac.compare_digest(_token_in(given), self._expected):
                msg = "this server needs a token: send authorization: Bearer <token>"
                raise Unauthenticated(msg)
        elif self._issuer is not None:
            _ADMITTED.set(
                self._issuer.identity(_token_in(given).decode(errors="replace"))
            )
        elif self._tokens is not None and (given or not self._certificates):
            entry = self._tokens.token(_token_in(given).decode(errors="replace"))
            if entry is None:
                msg = (
                    "this server needs a token that it knows: send authorization: "
                    "Bearer <token>"
                )
                raise Unauthenticated(msg)
            self._check_time(entry, "token")
            _ADMITTED.set(entry.identity)

    def identify(self, authentication: Mapping[str, Any]) -> Identity:
        """Say who makes a call that was let in.

        Args:
            authentication: What the transport knows of the client, as grpcio writes it.

        Returns:
            Who it is.

        Raises:
            Unauthenticated: If the client's certificate has no name, or is none that may
                call without a token.
        """
        if not self.tells_apart:
            return EVERYBODY
        admitted = _ADMITTED.get()
        if admitted is not None:
            return admitted
        name = name_in(
            _texts(authentication.get(_ALTERNATIVES, ())),
            _texts(authentication.get(_COMMON, ())),
        )
        if self._tokens is None:
            return Identity(name, frozenset({USER}))
        entry = self._tokens.certificate(name)
        if entry is None:
            msg = (
                f"the certificate of {name!r} alone does not let you in: send "
                "authorization: Bearer <token>, or have the server's operator add a line "
                "for the certificate to its tokens"
            )
            raise Unauthenticated(msg)
        self._check_time(entry, "certificate")
        return entry.identity

    def _check_time(self, entry: Entry, what: str) -> None:
        assert self._tokens is not None
        if self._tokens.is_over(entry):
            assert entry.expires_s is not None
            moment = datetime.datetime.fromtimestamp(entry.expires_s, datetime.UTC)
            msg = (
                f"this {what} of {entry.identity.name!r} was good until "
                f"{moment.isoformat(timespec='seconds')}: ask the server's operator for "
                "another"
            )
            raise Unauthenticated(msg)


def name_in(alternatives: Iterable[str], common: Iterable[str]) -> str:
    """Find the name that a certificate gives its holder.

    Args:
        alternatives: Its subject's alternative names, in order.
        common: The common name in its subject.

    Returns:
        The first alternative name that is no address, or else the common name.

    Raises:
        Unauthenticated: If it has none that can be used.
    """
    names = [name for name in alternatives if not _is_address(name)]
    found = [*names, *common]
    try:
        return check_name(found[0] if found else "")
    except ValueError as error:
        msg = f"the client's certificate does not say who calls: {error}"
        raise Unauthenticated(msg) from None


def authentication_of(certificate: Mapping[str, Any]) -> dict[str, Sequence[bytes]]:
    """Write the names in a certificate as grpcio does.

    Args:
        certificate: As `ssl.SSLSocket.getpeercert` gives it; empty if there is none.

    Returns:
        What `Callers.identify` reads.
    """
    alternatives = [value for _, value in certificate.get("subjectAltName", ())]
    pairs = [pair for pairs in certificate.get("subject", ()) for pair in pairs]
    common = [value for key, value in pairs if key == "commonName"][:1]
    return {
        _ALTERNATIVES: [name.encode() for name in alternatives],
        _COMMON: [name.encode() for name in common],
    }


def _token_in(authorization: bytes) -> bytes:
    """Find the token behind its scheme, which has no case (RFC 9110, 11.1)."""
    scheme, _, token = authorization.partition(b" ")
    return token.lstrip(b" ") if scheme.lower() == _SCHEME else b""


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _texts(values: Iterable[bytes]) -> list[str]:
    return [value.decode(errors="replace") for value in values]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
