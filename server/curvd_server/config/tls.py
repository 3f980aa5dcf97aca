"""Encryption of the port: the files, as grpcio wants them and as `ssl` does."""

from __future__ import annotations

import ssl
from dataclasses import MISSING, dataclass
from pathlib import Path

import grpc

from curvd.contract import setting
from curvd.errors import InvalidSpec
from curvd_server.config.files import content


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """Encryption, and whom to let in."""

    cert: Path = setting(MISSING, "PEM file with the server's certificate chain.")
    key: Path = setting(MISSING, "PEM file with the key of --tls-cert.")
    client_ca: Path | None = setting(
        None,
        "Let in only clients with a certificate that these authorities sign (mutual "
        "TLS).",
    )

    def context(self) -> ssl.SSLContext:
        """Read the files, for connections that grpcio does not see.

        Returns:
            What `ssl` wants.

        Raises:
            InvalidSpec: If a file cannot be read, or they do not fit each other.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["h2"])
        try:
            context.load_cert_chain(self.cert, self.key)
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except ssl.SSLError as error:
            msg = (
                f"the TLS files do not fit each other, or are no PEM: cert={self.cert}, "
                f"key={self.key}, client_ca={self.client_ca} ({error})"
            )
            raise InvalidSpec(msg, cert=self.cert, key=self.key) from error
        return context

    def credentials(self) -> grpc.ServerCredentials:
        """Read the files.

        Returns:
            What gRPC wants.

        Raises:
            InvalidSpec: If a file cannot be read.
        """
        pair = (content(self.key, "key"), content(self.cert, "cert"))
        if self.client_ca is None:
            return grpc.ssl_server_credentials([pair])
        roots = content(self.client_ca, "client_ca")
        return grpc.ssl_server_credentials([pair], roots, require_client_auth=True)
