"""Updates beside an optimiser: what arrives is the state between two steps."""

import copy
import sys
import threading
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from support.client_fixtures import QUICK  # noqa: E402
from torch import nn  # noqa: E402
from torch.optim.swa_utils import AveragedModel  # noqa: E402

import curvd  # noqa: E402
from curvd import parameters  # noqa: E402
from curvd.tensors import chunks  # noqa: E402

UPDATES = [
    pytest.param("sync", 1000, id="sync"),
    pytest.param("async", 100, id="async"),
]


@pytest.fixture(autouse=True)
def in_quick_turns():
    """A thread that steps all the time lets the others go on."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


class Counting(nn.Module):
    """Every step of its optimiser adds one to every element of every parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1 << 15))
        self.bias = nn.Parameter(torch.zeros(1 << 13, dtype=torch.float64))
        for parameter in self.parameters():
            parameter.grad = -torch.ones_like(parameter)


class Training(threading.Thread):
    """Steps all the time, until it is stopped."""

    def __init__(self, module):
        super().__init__()
        self.optimiser = torch.optim.SGD(module.parameters(), lr=1.0, foreach=False)
        self.steps, self._over = 0, threading.Event()

    def run(self):
        while not self._over.is_set():
            self.optimiser.step()
            self.steps += 1

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *raised):
        self._over.set()
        self.join()


def received(service):
    (held,) = service.uploads.values()
    service.uploads.clear()
    return chunks.load(iter([memoryview(bytes(held))]), max_bytes=1 << 30)


@pytest.mark.parametrize(("connect", "updates"), UPDATES, indirect=["connect"])
def test_updates_beside_an_optimiser_neither_fail_nor_are_torn(
    session, service, updates
):
    module, seen = Counting(), set()
    with Training(module) as training:
        for version in range(2, updates + 2):
            assert session.update_parameters(module) == version
            values = {
                float(v) for a in received(service).values() for v in np.unique(a)
            }
            assert len(values) == 1, "old values and new ones in one update"
            seen |= values
    assert training.steps > len(seen) > 10


def test_copies_in_a_row_let_a_step_in_between():
    module = Counting()
    with Training(module) as training:
        steps = training.steps
        while training.steps < steps + 20:
            with parameters.between_steps():
                before = training.steps
                assert torch.equal(module.weight, module.weight[:1].expand(1 << 15))
                assert training.steps <= before + 1  # the count is behind by one


class Failing(torch.optim.Optimizer):
    """Fails in its step, which then never says that it has ended."""

    def __init__(self, module, instead):
        super().__init__(module.parameters(), {})
        self.instead = instead

    def step(self, closure=None):
        return self.instead()


def test_a_step_that_failed_holds_nobody_up(session):
    def fail():
        raise ValueError("NaN")

    module = Counting()
    optimiser = Failing(module, fail)
    with parameters.between_steps():  # there are hooks from here on
        pass
    with pytest.raises(ValueError, match="NaN"):
        optimiser.step()
    other = threading.Thread(target=session.update_parameters, args=(module,))
    other.start()
    other.join()
    assert session.update_parameters(module) == 3


def test_a_step_may_update_the_session_itself(session):
    module = Counting()
    optimiser = Failing(module, lambda: session.update_parameters(module))
    assert optimiser.step() == 2


def test_a_step_that_began_before_there_were_hooks_is_waited_for(monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    from curvd.parameters import steps

    turns = steps._Turns()  # one that has not met this process's optimisers
    module, order = Counting(), []

    def slow():
        begun.set()
        go_on.wait()
        order.append("step")

    thread = threading.Thread(target=Failing(module, slow).step)
    thread.start()
    begun.wait()
    installed, install = threading.Event(), turns._install

    def tell():
        install()
        installed.set()

    turns._install = tell

    def take():
        with turns.between_steps():
            order.append("copy")

    taker = threading.Thread(target=take)
    taker.start()
    installed.wait()
    go_on.set()
    taker.join()
    thread.join()
    assert order == ["step", "copy"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own
def test_a_compiled_step_is_the_same_step():
    module = Counting()
    optimiser = torch.optim.SGD(module.parameters(), lr=1.0)
    with parameters.between_steps():
        pass
    step = torch.compile(optimiser.step, backend="eager")
    step()
    step()
    assert module.weight.unique().tolist() == [2.0]


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6.0).reshape(2, 3),
        torch.arange(6.0).reshape(2, 3),
        torch.arange(6.0).reshape(3, 2).T,
        torch.arange(6).reshape(2, 3).bfloat16(),
        torch.tensor(3.0),
    ],
    ids=["numpy", "torch", "strided", "bfloat16", "scalar"],
)
def test_a_copy_is_nobody_elses_and_row_major(value):
    was = copy.deepcopy(value)
    taken = parameters.copied(value)
    value += 1
    np.testing.assert_array_equal(taken, parameters.copied(was))
    assert taken.flags.c_contiguous


def test_without_a_copy_nothing_is_copied(session, service, monkeypatch):
    monkeypatch.setattr(parameters, "copied", None)
    values = {"0.bias": torch.ones(3)}
    assert session.update_parameters(values, copy=False) == 2
    np.testing.assert_array_equal(received(service)["0.bias"], 1.0)


NAMES = {"0.weight", "0.bias"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["0.weight", "0.bias"], ["0.weight", "0.bias"]),
        (["module.0.weight", "module.0.bias"], ["0.weight", "0.bias"]),
        (["module.module.0.bias"], ["0.bias"]),
        (["_orig_mod.0.weight"], ["0.weight"]),
        (["module._orig_mod.0.weight"], ["0.weight"]),
        (["_orig_mod.module.0.weight"], ["0.weight"]),
        (["0._orig_mod.weight", "0.bias"], ["0.weight", "0.bias"]),
        # What is not certain stays: the server names what it does not know.
        (["module.0.weight", "0.bias"], ["module.0.weight", "0.bias"]),
        (["module.1.running_mean"], ["module.1.running_mean"]),
        (["other.0.weight"], ["other.0.weight"]),
        ([], []),
    ],
)
def test_prefixes_of_wrappers_go_where_that_is_unambiguous(given, expected):
    assert list(parameters.plain_names(given, NAMES).values()) == expected


def test_a_layer_may_be_called_module():
    names = ["module.0.weight", "module.0.bias"]
    assert parameters.plain_names(names, set(names)) == dict(
        zip(names, names, strict=True)
    )


def test_two_names_of_one_parameter_are_refused(session):
    twice = {"0._orig_mod.bias": np.ones(3), "0.bias": np.zeros(3)}
    with pytest.raises(curvd.InvalidTensors, match=r"both are parameter '0\.bias'"):
        session.update_parameters(twice)


def test_what_an_average_counts_is_no_tensor_of_the_model():
    averaged = AveragedModel(nn.Linear(2, 1)).state_dict()
    assert parameters.wrappers.state_of(averaged).keys() == {
        "module.weight",
        "module.bias",
    }
    # A model of this form, whose buffer it is, has other names as well.
    own = {"n_averaged": 1, "module.a": 2, "head": 3}
    assert parameters.wrappers.state_of(own) is own


def parallel(net):
    """DataParallel, which would take a net to whatever device there is."""
    module = "torch.nn.parallel.data_parallel"
    with mock.patch(f"{module}._get_available_device_type", return_value=None):
        return nn.DataParallel(net)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: net,
        parallel,
        lambda net: torch.compile(net, backend="eager"),
        lambda net: parallel(torch.compile(net, backend="eager")),
        lambda net: torch.compile(parallel(net), backend="eager"),
        AveragedModel,
        lambda net: AveragedModel(parallel(net)),
    ],
    ids=[
        "plain",
        "parallel",
        "compiled",
        "parallel compiled",
        "compiled parallel",
        "averaged",
        "averaged parallel",
    ],
)
def test_a_wrapped_module_is_the_module(live_target, wrap):
    net = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))
    data = torch.randn(20, 8), torch.randint(0, 3, (20,))
    with (
        curvd.connect(live_target, config=QUICK) as client,
        client.session_for(
            wrap(net), nn.CrossEntropyLoss(), data, batch_size=10
        ) as session,
    ):
        assert session.layout.names == tuple(net.state_dict())
        first = session.info.parameters_digest
        with torch.no_grad():
            net[0].bias += 1
        session.update_parameters(net.state_dict())
        plain = session.info.parameters_digest
        assert plain != first
        session.update_parameters(wrap(net))
        assert session.info.parameters_digest == plain
        session.update_parameters(wrap(net).state_dict())
        assert session.info.parameters_digest == plain
        assert session.info.version == 4
