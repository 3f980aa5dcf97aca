"""The server dies, or the line goes dead, in the middle: the same call completes."""

import contextlib
import socket
import threading
import time

import numpy as np
import pytest
from support.forked import Forked

pytest.importorskip("torch")
import curvd

PARAMETERS = 5_000_000
BYTES = 4 * PARAMETERS
PATIENT = curvd.ClientConfig(
    retry=curvd.RetryConfig(first_s=0.05, longest_s=0.2, give_up_s=60.0)
)
INPUTS, OUTPUTS = 4, PARAMETERS // 5
WIDTHS = [INPUTS, OUTPUTS]


class Relay:
    """Forwards bytes between a client and a server, until told otherwise."""

    def __init__(self):
        self.port = 0
        """Where the server is."""
        self.passed = {"up": 0, "down": 0}
        self.reached = threading.Event()
        """A limit was reached: what follows waits."""
        self._limits = {}
        self._lines = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def hold(self, way, nbytes):
        """Hold one way up after so many more bytes, and say so."""
        self.reached.clear()
        self._limits[way] = self.passed[way] + nbytes

    def go_on(self):
        """Hold up nothing more."""
        self._limits.clear()

    def cut(self):
        """Break all lines; what was held up is lost."""
        for line in self._lines:
            line.dead = True
            line.close()
        self.go_on()

    def fall_silent(self):
        """Swallow what comes over the lines that there are, without a word."""
        for line in self._lines:
            line.dead = True

    def close(self):
        """Accept no more."""
        self._listener.close()
        self.cut()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with contextlib.suppress(OSError):
                    server = socket.create_connection(("127.0.0.1", self.port))
                    self._lines.append(Line(self, client, server))
                    continue
                client.close()


class Line:
    """One connection through the relay."""

    def __init__(self, relay, client, server):
        self._relay, self._ends, self.dead = relay, (client, server), False
        for arguments in (("up", client, server), ("down", server, client)):
            threading.Thread(target=self._run, args=arguments, daemon=True).start()

    def close(self):
        """Hang up on both."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _run(self, way, source, sink):
        relay = self._relay
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                while relay.passed[way] + len(data) > relay._limits.get(way, 1 << 60):
                    relay.reached.set()
                    if self.dead:
                        break
                    time.sleep(0.005)
                if not self.dead:
                    sink.sendall(data)
                    relay.passed[way] += len(data)
        if not self.dead:
            self.close()
        source.close()


class Server:
    """A process that can be killed, and begun anew on the same data."""

    def __init__(self, folder):
        self._folder = folder
        self.process, self.port = None, 0
        self.start()

    def start(self):
        self.process = Forked(
            "from curvd.cli.commands import main; main()",
            *("serve", "--listen", "127.0.0.1:0", "--data-dir", self._folder),
            *("--log-level", "error"),
        )
        line = self.process.stdout.readline()
        self.port = int(line.rpartition(":")[2])

    def stored_bytes(self):
        """What is on its disk."""
        files = (p for p in self._folder.rglob("*") if p.is_file())
        return sum(path.stat().st_size for path in files)

    def kill(self):
        self.process.kill()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def relay(server):
    relay = Relay()
    relay.port = server.port
    yield relay
    relay.close()


def state():
    rng = np.random.default_rng(0)
    return {
        "1.weight": rng.standard_normal((OUTPUTS, INPUTS), dtype="f4"),
        "1.bias": rng.standard_normal(OUTPUTS, dtype="f4"),
    }


def session_of(client):
    model = client.register_model("mlp", {"widths": WIDTHS}, state())
    dataset = client.register_dataset(
        {"x": np.ones((1, INPUTS), "f4"), "y": np.zeros((1, OUTPUTS), "f4")},
        inputs="x",
        target="y",
        batch_size=1,
    )
    return client.create_session(model, dataset, loss="mse")


def kill_in_the_middle(server, relay, call, ready=lambda: True):
    """Run a call in a thread; kill the server when the relay holds it up."""
    results = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    assert relay.reached.wait(300)
    while not ready():
        time.sleep(0.01)
    server.kill()
    relay.cut()
    before = dict(relay.passed)
    server.start()
    relay.port = server.port
    thread.join(300)
    assert results, "the call did not complete"
    return results[0], {way: relay.passed[way] - n for way, n in before.items()}


def test_an_upload_goes_on_after_the_server_was_killed(server, relay):
    with curvd.connect(relay.target, config=PATIENT) as client:
        relay.hold("up", BYTES * 2 // 3)
        model, passed = kill_in_the_middle(
            server,
            relay,
            lambda: client.register_model("mlp", {"widths": WIDTHS}, state()),
            ready=lambda: server.stored_bytes() > BYTES // 2,
        )
        # What the server had written down was not sent again.
        assert passed["up"] < BYTES // 2
        assert client.register_model("mlp", {"widths": WIDTHS}, state()) == model


def test_a_download_goes_on_after_the_server_was_killed(server, relay):
    with curvd.connect(relay.target, config=PATIENT) as client:
        H = session_of(client).hessian()
        v = np.random.default_rng(1).standard_normal(PARAMETERS, dtype="f4")
        whole = H @ v
        relay.hold("down", BYTES * 2 // 3)
        product, passed = kill_in_the_middle(server, relay, lambda: H @ v)
        np.testing.assert_array_equal(product, whole)
        assert passed["down"] < BYTES // 2
        assert passed["up"] > BYTES  # the new server had to compute it again


def test_a_broken_line_costs_neither_the_operand_nor_the_computation(server, relay):
    with curvd.connect(relay.target, config=PATIENT) as client:
        H = session_of(client).hessian()
        v = np.random.default_rng(1).standard_normal(PARAMETERS, dtype="f4")
        whole = H @ v
        before = dict(relay.passed)
        relay.hold("down", BYTES // 2)
        results = []
        thread = threading.Thread(target=lambda: results.append(H @ v))
        thread.start()
        assert relay.reached.wait(300)
        relay.cut()
        thread.join(300)
        np.testing.assert_array_equal(results[0], whole)
        passed = {way: relay.passed[way] - n for way, n in before.items()}
        assert passed["up"] < BYTES * 1.1
        assert passed["down"] < BYTES * 1.6


def test_a_line_that_goes_dead_is_noticed_and_replaced(server, relay):
    config = curvd.ClientConfig(
        keepalive_s=10.0, keepalive_timeout_s=1.0, retry=PATIENT.retry
    )
    with curvd.connect(relay.target, config=config) as client:
        session = session_of(client)
        relay.fall_silent()
        # Nobody hangs up, and no byte comes: only unanswered pings tell.
        assert session.refresh().version == 1


def test_a_server_that_stays_away_is_given_up(server, relay):
    retry = curvd.RetryConfig(first_s=0.05, longest_s=0.1, give_up_s=0.5)
    with curvd.connect(relay.target, config=curvd.ClientConfig(retry=retry)) as client:
        assert client.healthy()
        server.kill()
        with pytest.raises(curvd.Unavailable, match="no curvd server answers"):
            client.server_info()
        server.start()
