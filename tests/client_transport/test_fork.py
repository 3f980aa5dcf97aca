"""Children that were forked from a process with a client, over either transport.

They run in a process of their own (`support.forking`): this one has a server's threads.
"""

import json
import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import grpc
import pytest
import trustme
from support import fake_service, forking

import curvd
from curvd._transport.process import keep_from_children


@pytest.fixture(params=["direct", "grpcio"])
def outcome(request, target):
    """Run a scenario against a fake; what it printed."""

    def run(scenario, *more, target=target, **env):
        command = [sys.executable, "-m", "support.forking", scenario, target]
        ran = subprocess.run(
            [*command, request.param, *more],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "GRPC_VERBOSITY": "NONE", **env},
            stdout=subprocess.PIPE,
            check=True,
            timeout=2 * forking.PATIENCE_S,
        )
        return json.loads(ran.stdout)

    return run


def test_six_children_multiply_at_once_and_each_gets_its_own_answers(outcome):
    assert outcome("storm") == [300] * 6 + [3]


def test_children_may_be_forked_while_threads_are_within_calls(outcome):
    # grpcio's own handlers run if no thread is in its core just then, and may keep the
    # parent's calls waiting for longer than its server bears its pings.
    assert outcome("busy", GRPC_ENABLE_FORK_SUPPORT="false") == [10] * 12


def test_a_call_that_was_under_way_is_finished_by_both(outcome):
    assert outcome("within_a_call") == [True, True, 3]


def test_a_child_forked_within_a_call_may_use_the_client(outcome):
    assert outcome("callback") == [5, 3]


def test_a_child_that_leaves_takes_nothing_from_its_parent(outcome, service):
    assert outcome("leaving") == [3, 3] * 3
    assert "DeleteSession" in service.names()  # by the parent, at its end


def test_grandchildren_have_connections_of_their_own(outcome):
    assert outcome("twice") == [5, [5, 5], 3]


def test_a_fork_that_python_is_not_told_of_is_noticed(outcome):
    assert outcome("from_c") == [20] * 3 + [3]


def test_threads_of_a_child_may_begin_together(outcome):
    assert outcome("threads") == [10] * 8


def test_an_asyncio_client_goes_on_in_the_event_loop_of_a_child(outcome):
    *found, inherited, last = outcome("asyncio_too")
    assert found == [[True] * 2] + [[True] * 3] * 3
    assert inherited.startswith("FailedPrecondition: this event loop was inherited")
    assert last == [True] * 2


@pytest.mark.parametrize("outcome", ["grpcio"], indirect=True)
def test_a_proxy_that_only_grpcio_speaks_to_is_refused_after_a_fork(outcome):
    behind, beside = outcome("proxied")
    assert behind.startswith("FailedPrecondition: grpcio does not survive fork")
    assert beside == 1


@pytest.mark.parametrize("outcome", ["grpcio"], indirect=True)
def test_workers_of_a_data_loader_multiply(outcome):
    pytest.importorskip("torch")
    assert outcome("workers") == [True, True]


@pytest.mark.parametrize("outcome", ["direct"], indirect=True)
def test_a_pickled_session_connects_anew(outcome):
    assert outcome("spawned") == [True, True, True]


def test_tls_connections_survive_their_children(outcome, service, tmp_path):
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
    (tmp_path / "ca.pem").write_bytes(authority.cert_pem.bytes())
    credentials = grpc.ssl_server_credentials([(issued.private_key_pem.bytes(), chain)])
    with fake_service.serving(service, credentials=credentials) as target:
        target = target.replace("127.0.0.1", "localhost")
        found = outcome("storm", str(tmp_path / "ca.pem"), "6", "50", target=target)
    assert found == [50] * 6 + [3]


def test_a_child_that_lives_on_does_not_hold_a_connection_open():
    ours, server = socket.socketpair()
    keep_from_children(ours)
    waits, ends = os.pipe()
    child = os.fork()
    if not child:
        os.read(waits, 1)
        os._exit(0)
    ours.close()
    server.settimeout(forking.PATIENCE_S)
    assert server.recv(1) == b""
    os.write(ends, b"!")
    os.waitpid(child, 0)
    for end in (waits, ends):
        os.close(end)
    server.close()


def test_a_client_that_is_dropped_is_gone_at_once():
    client = curvd.connect("127.0.0.1:1")
    connection = weakref.ref(client._connection)
    del client
    assert connection() is None
