"""Why a server cannot be reached, where trying again cannot help.

A transport that fails says little: grpcio hides what TLS said, and a server that speaks
TLS just hangs up on a client that does not. So a client that has had no answer yet looks
for itself, with a connection of its own, at each step of the way in: the name, the
socket, TLS, and the first bytes of HTTP/2.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl

from curvd._transport.dial import Address, client_context, dial
from curvd.config import ClientConfig, TlsConfig, Transport, proxy_of
from curvd.errors import CannotConnect, Unauthenticated
from curvd.http2 import frames

_ANSWER_S = 5.0
"""How long the server's first bytes are waited for."""
_CA = "tls=TlsConfig(ca=…) (--tls-ca)"
_NAME = "tls=TlsConfig(server_name=…) (--tls-server-name)"
_CERT = "tls=TlsConfig(cert=…, key=…) (--tls-client-cert, --tls-client-key)"
_TLS_THERE = f"the server speaks TLS, this client plain text: pass tls=, such as {_CA}"
_PLAIN_THERE = "the server speaks plain text, this client TLS: leave tls= (--tls) out"
_EXPIRED, _NOT_YET_VALID = 10, 9
_NAME_DIFFERS, _IP_DIFFERS = 62, 64


def diagnosis(
    target: str, config: ClientConfig, timeout_s: float | None
) -> CannotConnect | None:
    """Look for a reason why no call can succeed.

    Args:
        target: Where the server should be.
        config: How it was called; files are read already.
        timeout_s: Seconds that there are; None: as many as it takes.

    Returns:
        The reason, and what to change; None if there is none, or none that lasts: a
        server that is not there may come back.
    """
    if config.transport is Transport.GRPCIO and (
        proxy_of(target) or re.match("dns://[^/]", target)
    ):
        return None  # ways that only grpcio knows
    address = Address.of(target)
    patience_s = _ANSWER_S if timeout_s is None else min(_ANSWER_S, timeout_s)
    if patience_s <= 0:
        return None
    try:
        why = _reason(address, config.tls, patience_s)
    except socket.gaierror as error:
        said = error.strerror
        why = f"the host {address.host!r} is unknown ({said}): check the target"
    except PermissionError as error:
        if not address.path:
            return None  # of a firewall, which may open
        why = f"{error.strerror}: a Unix socket is for its owner only"
    except OSError:
        return None
    if why is None:
        return None
    msg = f"cannot connect to {target}: {why}"
    return CannotConnect(msg, target=target)


def advised(error: Unauthenticated, token: str | None) -> Unauthenticated:
    """Say what a client that was not let in has to change.

    Args:
        error: What the server said.
        token: What it was sent.

    Returns:
        The same with the option.
    """
    what = (
        "this client sends none: pass token= (--token-file, CURVD_TOKEN)"
        if token is None
        else "the token of this client (token=) is not the server's: it may be an old one"
    )
    better = Unauthenticated(f"{error}; {what}")
    better.metadata, better.__cause__ = error.metadata, error.__cause__
    return better


def _reason(address: Address, tls: TlsConfig | None, patience_s: float) -> str | None:
    answer: bytes | None = None
    try:
        answer = _answer(address, tls, patience_s)
    except ssl.SSLCertVerificationError as error:
        assert tls is not None
        return _unverified(error, address, tls)
    except ssl.SSLError as error:
        assert tls is not None
        if (why := _refused(error, tls)) is not None:
            return why
    if answer is not None and answer.startswith(b"HTTP/"):
        return "a server of HTTP/1 answers there, which is not curvd's: check the port"
    if _is_http2(answer):
        return None
    if tls is None and _speaks_tls(address, patience_s):
        return _TLS_THERE
    if answer is not None and len(answer) == frames.HEAD_BYTES:
        return f"what answers there ({answer!r}…) is no server of curvd: check the port"
    if tls is None:
        return None
    if _is_http2(_answer(address, None, patience_s)):
        return _PLAIN_THERE
    # A server that is being stopped does not accept the second one.
    if answer == b"" and _answer(address, tls, patience_s) == b"":
        return f"the server hangs up after the handshake of TLS: {_certificate(tls)}"
    return None


def _answer(address: Address, tls: TlsConfig | None, patience_s: float) -> bytes | None:
    """Greet a server, and see how it begins.

    Args:
        address: Where it is.
        tls: Whom to trust; None: plain text.
        patience_s: How long each step may take.

    Returns:
        Its first bytes, none if it hangs up; None if it is silent.

    Raises:
        ssl.SSLError: If TLS fails on either side.
        OSError: If nobody is there.
    """
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(dial(address, patience_s))
        if tls is not None:
            name = tls.server_name or address.host or "localhost"
            sock = client_context(tls).wrap_socket(sock, server_hostname=name)
            stack.enter_context(sock)
        try:
            if tls is None:
                sock.sendall(frames.PREFACE + frames.settings({}))
            # Else nothing is sent: unread bytes would make the server's end of the
            # connection forget the alert about our certificate.
            return sock.recv(frames.HEAD_BYTES)
        except TimeoutError:
            return None
        except (ConnectionError, ssl.SSLEOFError):
            return b""


def _is_http2(answer: bytes | None) -> bool:
    return answer is not None and answer[:1] + answer[3:4] == b"\0\4"  # SETTINGS


def _speaks_tls(address: Address, patience_s: float) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(OSError), dial(address, patience_s) as sock:
        try:
            context.wrap_socket(sock).close()
            return True
        except ssl.SSLError as error:
            # Its word in TLS, even if that is a refusal; not the text of another protocol.
            return "ALERT" in (error.reason or "")
    return False


def _unverified(
    error: ssl.SSLCertVerificationError, address: Address, tls: TlsConfig
) -> str:
    said = error.verify_message
    if error.verify_code in (_NAME_DIFFERS, _IP_DIFFERS):
        name = tls.server_name or address.host
        return (
            f"the server's certificate is for another name than {name!r} ({said}): "
            f"connect by the name that it carries, or pass {_NAME}"
        )
    if error.verify_code in (_EXPIRED, _NOT_YET_VALID):
        return f"{said}: renew the server's certificate, or set this machine's clock"
    whom = "the system's CAs" if tls.ca is None else "the CA of this client"
    return (
        f"the server's certificate is not signed by {whom} ({said}): "
        f"pass the server's CA, {_CA}"
    )


def _refused(error: ssl.SSLError, tls: TlsConfig) -> str | None:
    """Read the alert with which a server refused; None if it was none."""
    reason = error.reason or ""
    said = re.sub(r"^(TLSV1|TLSV13|SSLV3)_ALERT_", "", reason).replace("_", " ").lower()
    if "ALERT" not in reason:
        return None
    if "PROTOCOL_VERSION" in reason:
        return f"the server speaks other versions of TLS ({said})"
    if "UNRECOGNIZED_NAME" in reason:
        return f"the server does not go by that name ({said}): pass {_NAME}"
    if not re.search("CERTIFICATE|UNKNOWN_CA|HANDSHAKE_FAILURE|ACCESS_DENIED", reason):
        return None
    return f"{_certificate(tls)} ({said})"


def _certificate(tls: TlsConfig) -> str:
    if tls.cert is None:
        return f"it wants a certificate of its clients, pass {_CERT}"
    return f"it does not accept this client's certificate, see {_CERT}"
