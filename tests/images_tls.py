"""Certificates and a token for the composed server, and who gets in by them.

`images_tls.py issue FOLDER` writes a server's chain and key, its authority and a token;
`images_tls.py ask SERVER FOLDER` multiplies with them, and checks that whoever lacks one is
refused.
"""

import os
import secrets
import sys
from pathlib import Path

import images_client
import trustme

import curvd

PATIENT = curvd.ClientConfig(
    retry=curvd.RetryConfig(give_up_s=images_client.PATIENCE_S)
)


def issue(folder: Path) -> None:
    folder.mkdir()
    authority, other = trustme.CA(), trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    token = secrets.token_urlsafe().encode()
    files = {
        "server.pem": b"".join(pem.bytes() for pem in issued.cert_chain_pems),
        "server.key": issued.private_key_pem.bytes(),
        "ca.pem": authority.cert_pem.bytes(),
        "other.pem": other.cert_pem.bytes(),
        "token": token,
        "clients.token": token,
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o444)
    for name in ("server.key", "token"):
        (folder / name).chmod(0o400)
    folder.chmod(0o755)


def is_refused(
    expected: type[curvd.CurvdError], target: str, **how: str | bool
) -> None:
    try:
        with curvd.connect(target, **how) as client:
            client.server_info()
    except expected as error:
        print(f"{type(error).__name__}: {error}")
    else:
        raise AssertionError(f"let in with {sorted(how)}")


def ask(target: str, folder: Path) -> None:
    ca, token = str(folder / "ca.pem"), (folder / "clients.token").read_text()
    with curvd.connect(target, tls=ca, token=token, config=PATIENT) as client:
        images_client.check_closed_form(client)
    is_refused(curvd.Unauthenticated, target, tls=ca)
    is_refused(curvd.Unauthenticated, target, tls=ca, token="another")
    is_refused(curvd.CannotConnect, target, tls=str(folder / "other.pem"), token=token)
    is_refused(curvd.CannotConnect, target)


if __name__ == "__main__":
    os.environ.pop("CURVD_TOKEN", None)
    what, *words = sys.argv[1:]
    match what:
        case "issue":
            issue(Path(words[0]))
        case "ask":
            ask(words[0], Path(words[1]))
