"""Addresses that a server listens at."""

import errno
import socket

import pytest

from curvd.errors import InvalidSpec
from curvd_server.transport.addresses import bound


def taken(monkeypatch, times):
    """Let so many ports that are free at one address be taken at the next."""
    create, left = socket.create_server, [times]

    def server(address, **options):
        if address[1] and left[0]:
            left[0] -= 1
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return create(address, **options)

    monkeypatch.setattr(socket, "create_server", server)


async def test_a_port_that_any_address_of_a_name_has_free_is_found(monkeypatch):
    taken(monkeypatch, 3)
    sockets = await bound("localhost:0")
    ports = {sock.getsockname()[1] for sock in sockets}
    for sock in sockets:
        sock.close()
    assert len(ports) == 1


async def test_a_port_that_is_asked_for_and_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InvalidSpec, match="the address is taken"):
            await bound(f"127.0.0.1:{port}")
