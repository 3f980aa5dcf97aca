"""Targets mean to our own transport what they mean to grpcio."""

import pytest

from curvd._transport.dial import Address


@pytest.mark.parametrize(
    ("target", "host", "port", "path"),
    [
        ("node7:50551", "node7", 50551, ""),
        ("[::1]:50551", "::1", 50551, ""),
        ("dns:node7:50551", "node7", 50551, ""),
        ("dns:///node7:50551", "node7", 50551, ""),
        ("dns://10.0.0.1/node7:50551", "node7", 50551, ""),
        ("dns:node7", "node7", 443, ""),
        ("ipv4:10.0.0.1:50551", "10.0.0.1", 50551, ""),
        ("ipv6:[::1]:50551", "::1", 50551, ""),
        ("unix:/run/curvd", "", 0, "/run/curvd"),
        ("unix:///run/curvd", "", 0, "/run/curvd"),
        ("unix-abstract:curvd", "", 0, "\0curvd"),
    ],
)
def test_a_target_is_taken_apart(target, host, port, path):
    address = Address.of(target)
    assert (address.host, address.port, address.path) == (host, port, path)


def test_the_server_is_named_as_it_is_reached():
    assert Address.of("node7:1").authority == "node7:1"
    assert Address.of("[::1]:1").authority == "[::1]:1"
    assert Address.of("unix:/run/curvd").authority == "localhost"
