"""What moves in training beside the state dict: it travels, or the update is refused."""

import asyncio
import copy
import dataclasses
import pickle
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from support.differences import draw, labels, seeded  # noqa: E402
from torch import nn  # noqa: E402

import curvd  # noqa: E402
from curvd.graph import twins  # noqa: E402

N = 7
X, Y, LOSS = draw(N, 4), labels(3, N), nn.CrossEntropyLoss()


@pytest.fixture(scope="module")
def client(live_target):
    with curvd.connect(live_target) as client:
        yield client


@dataclasses.dataclass
class Schedule:
    """Where some keep what moves."""

    temperature: float = 1.0


class Net(nn.Module):
    """A layer whose result is multiplied by a number that is kept in one way or another."""

    __slots__ = ("slotted",)
    of_class = 1.0

    def __init__(self, factor=lambda m: 1.0):
        super().__init__()
        self.slotted = 1.0
        self.a, self.drop, self.factor = nn.Linear(4, 3), nn.Dropout(0.5), factor
        self.register_buffer("k", torch.tensor(1.0), persistent=False)
        self.plain, self.number, self.on = torch.tensor(1.0), 1.0, False
        self.held, self.schedule, self.calls = {"k": [1.0]}, Schedule(), 0

    def forward(self, x):
        return self.drop(torch.tanh(self.a(x))) * self.factor(self)


def net(factor=lambda m: 1.0):
    return seeded(lambda: Net(factor)).eval()


def gradient(module):
    loss = LOSS(module(X), Y)
    return nn.utils.parameters_to_vector(
        torch.autograd.grad(loss, list(module.parameters()))
    )


def test_a_buffer_that_is_not_persistent_travels(client):
    module = net(lambda m: m.k)
    with client.session_for(module, LOSS, (X, Y), batch_size=3) as session:
        module.k.fill_(3.0)
        session.update_parameters(module)
        np.testing.assert_allclose(session.gradient()[1], gradient(module), rtol=1e-9)


def in_place(module):
    module.plain.fill_(3.0)


MOVED = {
    "number": (
        lambda m: m.number,
        lambda m: setattr(m, "number", 3.0),
        "was 1.0 and is",
    ),
    "tensor": (lambda m: m.plain, in_place, r"plain was 1\.0 and is 3\.0"),
    "flag": (
        lambda m: 2.0 if m.on else 1.0,
        lambda m: setattr(m, "on", True),
        "on was False and is True",
    ),
    "nested": (
        lambda m: m.held["k"][0],
        lambda m: m.held["k"].__setitem__(0, 3.0),
        "held",
    ),
    "dataclass": (
        lambda m: m.schedule.temperature,
        lambda m: setattr(m.schedule, "temperature", 3.0),
        "schedule",
    ),
    "layer": (
        lambda m: 1.0,
        lambda m: setattr(m, "drop", nn.Tanh()),
        r"drop\.__class__ was <Dropout> and is <Tanh>",
    ),
    "forward": (
        lambda m: 1.0,
        lambda m: setattr(m, "forward", lambda x: m.a(x).tanh() * 2),
        "forward was not there",
    ),
    "hook": (
        lambda m: 1.0,
        lambda m: m.a.register_forward_hook(lambda m, x, z: 2 * z),
        r"a\._forward_hooks",
    ),
    "class's number": (
        lambda m: m.of_class,
        lambda m: setattr(type(m), "of_class", 3.0),  # put back by the test
        r"of_class was 1\.0 and is 3\.0",
    ),
    "slot": (
        lambda m: m.slotted,
        lambda m: setattr(m, "slotted", 3.0),
        r"slotted was 1\.0 and is 3\.0",
    ),
    "hook on a gradient": (
        lambda m: 1.0,
        lambda m: m.a.weight.register_hook(lambda g: 2 * g),
        r"a\.weight\._backward_hooks",
    ),
    "hook on an accumulated gradient": (
        lambda m: 1.0,
        lambda m: m.a.weight.register_post_accumulate_grad_hook(
            lambda p: p.grad.mul_(2)
        ),
        r"a\.weight\._post_accumulate_grad_hooks",
    ),
    "hook before a backward pass": (
        lambda m: 1.0,
        lambda m: m.a.register_full_backward_pre_hook(lambda m, g: (2 * g[0],)),
        r"a\._backward_pre_hooks",
    ),
}


@pytest.mark.parametrize(("factor", "move", "match"), MOVED.values(), ids=MOVED)
def test_what_is_a_constant_of_the_graph_and_moves_is_refused(
    client, factor, move, match, monkeypatch
):
    monkeypatch.setattr(Net, "of_class", 1.0)
    module = net(factor)
    with client.session_for(module, LOSS, (X, Y), batch_size=3) as session:
        session.update_parameters(module)
        session.update_parameters(module)  # of which a quick look tells the same
        move(module)
        for one in (session, session.on((X, Y))):
            with pytest.raises(
                curvd.InvalidSpec, match=rf"{match}.*new session.*register_buffer"
            ):
                one.update_parameters(module)
        assert session.refresh().version == 3


def test_layers_that_are_tied_afterwards_are_a_change(client):
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    with client.session_for(module, LOSS, (X, Y), batch_size=3) as session:
        session.update_parameters(module)
        module[2].weight = module[0].weight
        with pytest.raises(curvd.InvalidSpec, match="tied was"):
            session.update_parameters(module)


@pytest.mark.parametrize(
    ("remove", "name"),
    [
        (lambda m: setattr(m[0], "bias", None), "0.bias"),
        (lambda m: setattr(m[1], "weight", None), "1.weight"),
        (lambda m: setattr(m[1], "running_mean", None), "1.running_mean"),
    ],
)
def test_a_tensor_that_is_gone_is_a_change(client, remove, name):
    """A module is whole, so that a missing name is no update of the others."""
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().eval()
    with client.session_for(module, LOSS, (X, Y), batch_size=3) as session:
        session.update_parameters(module)
        remove(module)
        with pytest.raises(
            curvd.InvalidSpec, match=f"{name} was there and is not there"
        ):
            session.update_parameters(module)


def test_hooks_that_only_look_on_are_let_through(client):
    module, seen = net(lambda m: 1.0), []
    with client.session_for(module, LOSS, (X, Y), batch_size=3) as session:
        module.a.weight.register_hook(seen.append)
        module.a.weight.register_post_accumulate_grad_hook(seen.append)
        session.update_parameters(module)
        assert session.refresh().version == 2


def test_the_asyncio_client_refuses_it_too(live_target):
    module = net(lambda m: m.number)

    async def main():
        async with curvd.aio.connect(live_target) as client:
            session = await client.session_for(module, LOSS, (X, Y), batch_size=3)
            module.number = 3.0
            with pytest.raises(curvd.InvalidSpec, match=r"number was 1\.0 and is 3\.0"):
                await session.update_parameters(module)
            await session.delete()

    asyncio.run(main())


def test_what_decides_nothing_may_move(client):
    module = net(lambda m: m.number)
    with client.session_for(module, LOSS, (X, Y), batch_size=3) as session:
        module.train()  # the session is of the mode that was exported
        module.calls += 1
        module.a.weight.requires_grad_(False)
        assert session.update_parameters(module) == 2
        assert module.training
        assert module.drop.training


def test_what_calls_the_module_itself_may_be_among_it(client):
    module = net(lambda m: m.number)
    module.by_another_name = module.a.forward
    module.factor = lambda _: module.by_another_name(X[:1]).mean()
    with client.session_for(module, LOSS, (X, Y), batch_size=3) as session:
        module.train().calls += 1
        assert session.update_parameters(module) == 2
        module.factor = lambda _: 2 * module.by_another_name(X[:1]).mean()
        with pytest.raises(
            curvd.InvalidSpec, match="factor is <function> as before, but another"
        ):
            session.update_parameters(module)
        assert module.training


def test_a_watch_takes_passing_buffers_along(client):
    module = net(lambda m: m.k)
    with client.session_for(module, LOSS, (X, Y), batch_size=3) as session:
        watch = curvd.watch(session, module, every=1, metrics="loss", optimizer=())
        with watch:
            module.k.fill_(3.0)
            watch.step()
            assert watch.wait(60)
            (reading,) = watch.readings
        assert reading.values["loss"] == pytest.approx(
            LOSS(module(X), Y).item(), rel=1e-9
        )


def test_a_watch_reads_nothing_once_a_constant_has_moved_and_says_so(client):
    module = net(lambda m: m.number)
    with client.session_for(module, LOSS, (X, Y), batch_size=3) as session:
        watch = curvd.watch(session, module, every=1, metrics="loss", optimizer=())
        with watch:
            module.number = 3.0
            watch.step()
            assert watch.wait(60)
        assert watch.readings == ()
        assert watch.skipped == 1
        assert "was 1.0 and is 3.0" in str(watch.last_error)
        with pytest.raises(curvd.InvalidSpec, match=r"was 1\.0 and is 3\.0"):
            curvd.watch(session, module, every=1, metrics="loss", optimizer=())


def test_a_session_is_pickled_without_its_module(live_target):
    module = net(lambda m: 1.0)
    with curvd.connect(live_target) as client:
        with client.session_for(module, LOSS, (X, Y), batch_size=3) as session:
            session.update_parameters(module)
            there, other = pickle.loads(pickle.dumps((client, session)))
            with there:
                found, expected = other.gradient()[1], session.gradient()[1]
            np.testing.assert_array_equal(found, expected)
            assert other.id == session.id


class Rotated(nn.Module):
    """Turns pairs of features by complex numbers that it holds."""

    def __init__(self, *, persistent):
        super().__init__()
        self.a = nn.Linear(4, 4).double()
        turns = torch.polar(torch.ones(2), torch.tensor([0.3, 1.1])).to(
            torch.complex128
        )
        self.register_buffer("turns", turns, persistent=persistent)

    def forward(self, x):
        pairs = torch.view_as_complex(self.a(x).unflatten(1, (2, 2)))
        return torch.view_as_real(pairs * self.turns).flatten(1)[:, :3]


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("give", [lambda m: m, lambda m: m.state_dict()])
def test_complex_buffers_travel_with_an_update(client, persistent, give):
    module = seeded(lambda: Rotated(persistent=persistent))
    with client.session_for(module, LOSS, (X, Y), batch_size=3) as session:
        with torch.no_grad():
            module.a.weight.mul_(1.5)
            if persistent:
                module.turns.mul_(1j)
        session.update_parameters(give(module))
        value, _ = session.gradient()
    assert value == pytest.approx(LOSS(module(X), Y).item(), rel=1e-12)


class Bound(nn.Module):
    """Keeps one of its own methods, counts, and lies under itself in a list."""

    def __init__(self):
        super().__init__()
        self.layer, self.steps = nn.Linear(4, 3), 0
        self.way, self.held = self.called, [self]

    def called(self, x):
        self.steps += 1
        return self.layer(x)

    def forward(self, x):
        return self.way(x)


def test_a_training_goes_on_beside_updates_of_a_module_that_reaches_itself(client):
    """Each update exports it again, because it counts."""
    module = Bound().double().eval()
    inside, parameters = module.held, list(module.parameters())
    optimiser = torch.optim.SGD(parameters, lr=0.01)
    errors, over = [], threading.Event()

    def train():
        while not over.is_set():
            try:
                optimiser.zero_grad()
                LOSS(module(X), Y).backward()
                optimiser.step()
            except Exception as error:
                errors.append(error)

    with client.session_for(module, LOSS, (X, Y), batch_size=3) as session:
        trainer = threading.Thread(target=train)
        trainer.start()
        try:
            for _ in range(8):
                session.update_parameters(module)
        finally:
            over.set()
            trainer.join(60)
        session.update_parameters(module)
        value, _ = session.gradient()
    assert value == pytest.approx(float(LOSS(module(X), Y).detach()), rel=1e-12)
    assert not errors
    assert module.held is inside and module.way.__self__ is module
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))


def test_a_twin_s_own_parameters_have_memory_and_ties_and_no_gradients():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    module[1].bias.requires_grad_(False)
    module(torch.rand(2, 4)).sum().backward()
    twin = twins.without_gradients(twins.twin_apart(module))
    assert twin[0].weight is twin[1].weight
    for mine, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        assert mine is not theirs and theirs.grad is None
        assert mine.data_ptr() == theirs.data_ptr()
        assert mine.requires_grad == theirs.requires_grad
    assert module[0].weight.grad is not None


@pytest.mark.parametrize(
    "held",
    [
        lambda: {"data": [torch.zeros(1 << 20) for _ in range(8)]},
        lambda: {"data": [[float(k)] for k in range(30_000)]},
        lambda: {"data": np.zeros(1 << 22)},
    ],
)
def test_what_a_module_holds_beside_its_tensors_is_not_copied_if_it_is_much(held):
    """A trainer with its optimisers, say; the module itself is exported then."""
    module = Bound()
    assert twins.twin_apart(module) is not None
    module.trainer = held()
    assert twins.twin_apart(module) is None
    curvd.export(module.double().eval(), X)
    assert module.held[0] is module


class Converted(nn.Module):
    """Recurrent weights, statistics, a tie, and what trainers set: a number and a type."""

    def __init__(self):
        super().__init__()
        self.r, self.norm = nn.LSTM(4, 4, batch_first=True), nn.BatchNorm1d(4)
        self.o, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.o.weight
        self.register_buffer("k", torch.tensor(1.3), persistent=False)
        self.calls, self.kind, self.reads = 0, torch.float32, False

    def forward(self, x):
        h = self.norm(self.r(x[:, None])[0][:, -1])
        h = h.to(self.kind).to(x.dtype) if self.reads else h
        return self.tied(torch.tanh(self.o(h))) * self.k.to(self.o.weight.dtype)


@pytest.fixture(params=["a twin", "itself"])
def _exported(request, monkeypatch):
    """Have modules exported anew as twins, or themselves, as those that hold much are."""
    if request.param == "itself":
        monkeypatch.setattr(twins, "_OBJECTS", 0)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_module_that_its_trainer_converts_is_followed(client, _exported, dtype):
    """Its attributes move, too; values are those that it has now."""
    x, y = X.float(), labels(4, N)
    module = seeded(Converted).float().eval()
    if _exported == "itself":
        module.held = [module]
    with client.session_for(module, LOSS, (x, y), batch_size=3) as session:
        with torch.no_grad():
            module.o.weight.mul_(1.1)
            module.norm.running_mean.add_(0.3)
            module.k.fill_(1.7)
        module.to(dtype).calls, module.kind = 1, dtype
        there = dict(module.named_parameters())
        session.update_parameters(module)
        value, row = session.gradient()
        wide = copy.deepcopy(module).double()
        loss = LOSS(wide(x.double()), y)
        rows = torch.autograd.grad(loss, list(wide.parameters()))
        assert value == pytest.approx(loss.item(), rel=1e-6)
        expected = nn.utils.parameters_to_vector(rows)
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-6)
    assert all(there[n] is p for n, p in module.named_parameters())
    flat = zip(module.r._flat_weights, module.r.parameters(), strict=True)
    assert all(a is b for a, b in flat)
    assert module.k.dtype == dtype


def read_kind(module):
    module.kind = torch.bfloat16


def hook(module):
    module.o.weight.register_hook(lambda g: g)


@pytest.mark.parametrize(
    ("change", "match"),
    [(read_kind, r"kind was torch\.float32 and is torch\.bfloat16"), (hook, "hooks")],
)
def test_a_refused_module_of_another_type_is_said_to_be_that(client, change, match):
    x, y = X.float(), labels(4, N)
    module = seeded(Converted).float().eval()
    module.reads = True
    with client.session_for(module, LOSS, (x, y), batch_size=3) as session:
        change(module.to(torch.bfloat16))
        types = "torch.float32 and is torch.bfloat16"
        with pytest.raises(
            curvd.InvalidSpec, match=rf"the type of r\.\S+ was {types}.*{match}"
        ):
            session.update_parameters(module)


def test_what_changed_in_a_dictionary_is_named(client):
    module = net(lambda m: m.held["k"][0])
    module.held |= {f"other {i}": i for i in range(50)}
    with client.session_for(module, LOSS, (X, Y), batch_size=3) as session:
        module.held["k"] = [3.0]
        with pytest.raises(
            curvd.InvalidSpec, match=r"held\['k'\] was \[1\.0\] and is \[3\.0\]\. The"
        ):
            session.update_parameters(module)
