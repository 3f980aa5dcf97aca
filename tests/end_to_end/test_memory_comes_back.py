"""What a session held is free when it ends, by whatever end of whichever query.

Each query came to its end before it is held up, is left, or fails. The collector of garbage
is off: nothing may wait for it.
"""

import contextlib
import gc
import threading
import time
import weakref

import numpy as np
import pytest

pytest.importorskip("torch")
import curvd
from curvd.errors import DeadlineExceeded, Internal
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig
from curvd_server.device import torch_device, torch_problem
from curvd_server.device.joining import Joining
from curvd_server.system.host_memory import SNAPSHOTS

pytestmark = pytest.mark.usefixtures("untimed")

POINTS, INPUTS = 60, 4
LONGEST_S = 60.0

QUERIES = {
    "products": lambda s: s.hessian() @ np.ones((s.hessian().shape[0], 300)),
    "eigsh": lambda s: s.hessian().eigsh(2, warm_start=True),
    "trace": lambda s: s.hessian().trace(samples=8),
    "diagonal": lambda s: s.hessian().diagonal(samples=8),
    "frobenius_norm": lambda s: s.hessian().frobenius_norm(samples=8),
    "spectral_density": lambda s: s.hessian().spectral_density(probes=2, steps=5),
    "logdet": lambda s: s.ggn(damping=1.0).logdet(),
    "solve": lambda s: s.ggn().solve(np.ones(s.ggn().shape[0]), damping=1.0),
    "dampings": lambda s: s.ggn().solve(np.ones(s.ggn().shape[0]), dampings=[1, 2]),
    "sketch": lambda s: s.ggn().sketch(rank=3),
    "kfac": lambda s: s.kfac(damping=1.0).eigsh(2),
    "ekfac": lambda s: s.ekfac(damping=1.0) @ np.ones((s.ggn().shape[0], 300)),
    "gradient_norms": lambda s: s.gradient_norms(),
    "gradient_gram": lambda s: s.gradient_gram(),
    "gradient_squares": lambda s: s.gradient_squares(),
    "jacobian": lambda s: s.jacobian_product(np.ones(s.ggn().shape[0])),
    "transposed": lambda s: s.jacobian_product(np.ones(POINTS), transposed=True),
    "influence": lambda s: s.influence([0, 1], damping=1.0),
    "influence of a part": lambda s: s.influence([0, 1], damping=1.0, part=20),
    "predictive": lambda s: s.predictive(np.ones((2, INPUTS)), prior=1.0),
    "posterior_samples": lambda s: s.posterior_samples(2, prior=1.0),
    "marginal_likelihood": lambda s: s.marginal_likelihood([1.0]),
}


class Hold:
    """Stops what the device does next, and lets it go on when its caller is gone."""

    def __init__(self):
        self.is_armed = self.fails = False
        self.reached = threading.Event()

    def arm(self, *, fails=False):
        self.reached.clear()
        self.is_armed, self.fails = True, fails

    def pass_through(self, cancelled):
        if not self.is_armed:
            return
        self.is_armed = False
        if self.fails:
            msg = "a defect"
            raise ZeroDivisionError(msg)
        self.reached.set()
        gone = threading.Event()
        while not cancelled():
            gone.wait(0.001)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server, a client of it, a model and a dataset."""
    rng = np.random.default_rng(0)
    state = {"1.weight": rng.normal(size=(3, INPUTS)), "1.bias": np.zeros(3)}
    points = {
        "x": rng.normal(size=(POINTS, INPUTS)),
        "y": rng.integers(0, 3, size=POINTS),
    }
    config = ServerConfig(
        listen="127.0.0.1:0", data_dir=tmp_path_factory.mktemp("data")
    )
    with serve_in_thread(config) as target, curvd.connect(target) as client:
        model = client.register_model("mlp", {"widths": [INPUTS, 3]}, state)
        data = client.register_dataset(points, inputs=["x"], target="y", batch_size=20)
        yield target, client, model, data


@pytest.fixture
def hold(monkeypatch):
    """Stops the device's next work."""
    held, computed = Hold(), Joining._computed

    def computing(self, operator, tickets, poll):
        held.pass_through(poll)
        return computed(self, operator, tickets, poll)

    monkeypatch.setattr(Joining, "_computed", computing)
    return held


@pytest.fixture
def parts(monkeypatch):
    """Weak references to what sessions bring onto the device; nothing collects garbage."""
    found = []

    class Seen(torch_problem.TorchProblem):
        def __init__(self, problem, tools):
            super().__init__(problem, tools)
            tensors = [*problem.parameters, *(b.targets for b in problem.data)]
            found.extend(map(weakref.ref, [self, *tensors]))

    for module in (torch_device, torch_problem):
        monkeypatch.setattr(module, "TorchProblem", Seen)
    gc.collect()
    gc.disable()
    yield found
    gc.enable()


def created(client, model, data, **more):
    return client.create_session(model, data, loss="cross_entropy", dtype="F64", **more)


def asked(client, model, data, query):
    """Open a session, and ask it once."""
    session = created(client, model, data)
    QUERIES[query](session)
    return session


def check_free(client, parts):
    """Wait until nothing is held, which the end of a call may take a moment longer for."""
    end_s = time.monotonic() + LONGEST_S

    def held():
        return client.server_info().status.memory_bytes.get(SNAPSHOTS, 0)

    while (held() or any(p() is not None for p in parts)) and time.monotonic() < end_s:
        pass
    assert parts and held() == 0
    assert [type(p()).__name__ for p in parts if p() is not None] == []


@pytest.mark.parametrize("query", QUERIES)
def test_under_queries_that_go_on(query, served, parts, hold):
    _, client, model, data = served
    session = created(client, model, data)
    QUERIES[query](
        session
    )  # so that what is held up next is the query, not its operator
    hold.arm()
    errors = []

    def ask():
        with contextlib.suppress(curvd.Cancelled):
            QUERIES[query](session)
            errors.append("it came to its end")

    asking = threading.Thread(target=ask)
    asking.start()
    assert hold.reached.wait(LONGEST_S)
    session.delete()
    asking.join(LONGEST_S)
    assert not errors and not asking.is_alive()
    check_free(client, parts)


@pytest.mark.parametrize("query", QUERIES)
def test_after_queries_whose_client_left(query, served, parts, hold):
    target, client, model, data = served
    session = asked(client, model, data, query)
    hold.arm()
    with curvd.connect(target, deadline_s=0.3) as hasty:
        with pytest.raises(DeadlineExceeded):
            QUERIES[query](hasty.session(session.id))
    session.delete()
    check_free(client, parts)


@pytest.mark.parametrize("query", QUERIES)
def test_after_queries_that_failed(query, served, parts, hold):
    _, client, model, data = served
    session = asked(client, model, data, query)
    hold.arm(fails=True)
    with pytest.raises(Internal, match=r"ZeroDivisionError"):
        QUERIES[query](session)
    session.delete()
    check_free(client, parts)


class Operand(np.ndarray):
    """An array that can be referred to weakly."""


@pytest.mark.parametrize("columns", [1, 3000])
def test_the_operand_of_a_product_that_failed_is_its_callers_alone(served, columns):
    """No circle of its error's frames keeps it."""
    _, client, model, data = served
    session = client.create_session(model, data, loss="cross_entropy", dtype="F64")
    operator = session.hessian()
    session.delete()
    held = np.ones((operator.shape[0], columns)).view(Operand)
    seen = weakref.ref(held)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(curvd.SessionNotFound):
            operator @ held
        del held
        assert seen() is None
    finally:
        gc.enable()
