"""A device whose operators are known matrices, and the server's middle around it."""

import contextlib
import hashlib
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np

from curvd.contract.enums import LossName, Stage, Tier
from curvd.contract.infos import PlanReport, TensorInfo
from curvd.contract.layout import ParameterLayout
from curvd.contract.server_info import DeviceInfo, WorkerInfo
from curvd.contract.specs import DatasetSpec, LossSpec, ModelSpec
from curvd.errors import BuilderNotFound, Cancelled, CurvatureUnverified
from curvd.tensors import chunks
from curvd_server.config import LimitsConfig
from curvd_server.device.batcher import Batcher
from curvd_server.sessions.session import SessionDependencies
from curvd_server.sessions.store import NewSession, SessionStore
from curvd_server.storage.blob_store import BlobStore
from curvd_server.storage.catalogue import Catalogue
from curvd_server.storage.registry import Architecture, Registry
from curvd_server.system import advance, enter_stage
from curvd_server.system.host_memory import HostMemory

MSE = LossSpec(name=LossName.MSE)


def report(**changes):
    """A plan report that means nothing."""
    values = dict.fromkeys(PlanReport.__slots__, 0) | {
        "tier": Tier.FINAL,
        "mode": "fake",
        "blocks": (),
        "compiled": False,
    }
    return PlanReport(**(values | changes))


def worker(rank, **changes):
    """What is known of a worker."""
    values = {
        "device": f"fake:{rank}",
        "host": "here",
        "pid": 1,
        "shards": 2,
        "ready": True,
        "restarts": 0,
        "lost": "",
    }
    return WorkerInfo(rank=rank, **(values | changes))


class FakeOperator:
    """Multiplies by the sum of the parameters; a gate can hold it up."""

    def __init__(self, problem, spec):
        self.problem, self.spec = problem, spec
        self.report = report(kept_bytes=problem.device.kept_bytes)
        self.closed, self.spent_s, self.is_in_doubt = False, 0.0, False
        self.started, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self.seen = []

    shares = True
    is_remote = False

    def apply(self, columns, *, counts=(), cancelled):
        self.seen.append(len(columns))
        self.started.set()
        while not self.gate.wait(0.001):
            if cancelled():
                raise Cancelled("stopped between two mini-batches")
        return columns * self.problem.factor

    def eigenvalues(self, *, cancelled):
        return None

    def inverse(self, columns, shift, *, cancelled):
        return None

    def close(self):
        self.closed = True


class FakeProblem:
    """An objective whose Hessian is its parameters' sum times the identity."""

    batches = 1

    def __init__(self, device, state):
        self.device, self.state = device, dict(state)
        shapes = {n: a.shape for n, a in sorted(self.state.items())}
        self.layout = ParameterLayout.of(shapes)

    @property
    def factor(self):
        return sum(float(a.sum()) for a in self.state.values())

    def with_parameters(self, values):
        return FakeProblem(self.device, self.state | dict(values))

    def sharing(self, other):
        return FakeProblem(self.device, other.state)

    def check(self, *, cancelled):
        pass

    def gradient(self, *, cancelled):
        return self.factor, np.full(self.layout.size, self.factor)

    def build(self, spec, *, budget_bytes, cancelled, tier=Tier.FINAL):
        self.device.built.append((spec, budget_bytes))
        self.device.building.set()
        enter_stage(Stage.VERIFYING, "fake", total=2)
        advance()
        while not self.device.held_up_by.wait(0.001):
            if cancelled():
                raise Cancelled("stopped between two steps")
        operator = FakeOperator(self, spec)
        operator.is_in_doubt = self.device.is_busy
        operator.report = replace(
            operator.report, tier=tier if self.device.has_tiers else Tier.FINAL
        )
        self.device.operators.append(operator)
        return operator

    def improve(self, operator, *, budget_bytes, cancelled):
        self.device.improved.append((operator.spec, budget_bytes))
        enter_stage(Stage.TUNING, total=4)
        while not self.device.improving.wait(0.001):
            if cancelled():
                raise Cancelled("stopped between two steps")
        if self.device.fails_to_improve:
            raise CurvatureUnverified("no mode is right", parameters="a")
        final = FakeOperator(self, operator.spec)
        self.device.operators.append(final)
        return final

    def choose_again(self, operator, *, budget_bytes, cancelled):
        self.device.chosen_again.append((operator.spec, budget_bytes))
        if not self.device.is_quiet:
            return None
        if not self.device.has_better_plans:
            operator.is_in_doubt = False
            return None
        made = FakeOperator(self, operator.spec)
        made.report = replace(made.report, revision=operator.report.revision + 1)
        self.device.operators.append(made)
        return made

    def move(self, operator):
        moved = FakeOperator(self, operator.spec)
        moved.report, moved.is_in_doubt = operator.report, operator.is_in_doubt
        self.device.operators.append(moved)
        return moved


class FakeDevice:
    """Remembers what was asked of it."""

    name = "fake"
    builders = ("two",)
    torch_version = "none"
    kept_bytes = 10
    known_workers = ()
    """What it says of its workers; none has a part in anything."""

    def __init__(self):
        self.loads, self.built, self.operators, self.tried = 0, [], [], []
        self.building, self.held_up_by = threading.Event(), threading.Event()
        self.held_up_by.set()
        self.has_tiers = self.fails_to_improve = False
        self.improved, self.improving = [], threading.Event()
        self.chosen_again, self.is_quiet, self.has_better_plans = [], True, True
        self.is_busy = False
        """Whether plans that are chosen now are in doubt."""

    def describe(self):
        return DeviceInfo(
            name="fake", description="", total_bytes=1 << 40, free_bytes=1
        )

    def workers(self):
        return self.known_workers, sum(w.restarts + 1 for w in self.known_workers)

    def architecture(self, spec):
        if spec.builder != "two":
            raise BuilderNotFound(f"no builder {spec.builder!r}", builder=spec.builder)
        return two_tensors(spec)

    async def try_model(self, spec):
        return None

    async def try_graphs(self, model, loss, *, rows):
        self.tried.append((model, loss, rows))

    def load(self, model, state, arrays, data, loss, mode, dtype, params):
        self.loads += 1
        self.params = params
        return FakeProblem(self, state)


def two_tensors(spec):
    """The one architecture there is: ``a`` [2] and ``b`` [3], and ``c`` tied to ``b``."""
    tensors = {
        "a": TensorInfo("a", "F64", (2,)),
        "b": TensorInfo("b", "F64", (3,)),
        "c": TensorInfo("c", "F64", (3,)),
    }
    return Architecture(tensors, {"c": "b"})


def masked(spec):
    """The same with buffers: a mask, and the statistics of a BatchNorm."""
    names = ("mask", "norm.running_mean", "norm.running_var")
    extra = {n: TensorInfo(n, "F64", (2, 2)) for n in names}
    two = two_tensors(spec)
    return Architecture({**two.tensors, **extra}, two.ties, frozenset(extra))


def file_of(arrays):
    """A safetensors file, and its digest."""
    data = b"".join(chunks.chunks(arrays))
    return data, hashlib.sha256(data).hexdigest()


def put(blobs, arrays):
    """Keep arrays as a blob; return its digest."""
    data, digest = file_of(arrays)
    with blobs.upload(digest, offset=0, total_bytes=len(data)) as upload:
        upload.write(memoryview(data))
        assert upload.finish()
    return digest


class Middle:
    """Everything between the services and the device, on a fake device."""

    def __init__(self, directory: Path, clock=lambda: 1000.0, monotonic=None, **limits):
        self.limits = LimitsConfig(**limits)
        self.catalogue = Catalogue(directory / "catalogue.sqlite")
        total = self.limits.memory_bytes or 1 << 40
        self.memory = HostMemory(total)
        self.blobs = BlobStore(
            directory / "blobs", memory=self.memory, referrers=self.catalogue.referrers
        )
        self.device = FakeDevice()
        self.registry = Registry(self.catalogue, self.blobs, two_tensors)
        self.batcher = Batcher(
            run_columns=32, run_bytes=1 << 20, pending_columns=64, pending_bytes=1 << 20
        )
        self.sessions = SessionStore(
            SessionDependencies(
                catalogue=self.catalogue,
                blobs=self.blobs,
                device=self.device,
                batcher=self.batcher,
                limits=self.limits,
                memory=self.memory,
                clock=clock,
                monotonic=monotonic or clock,
            )
        )

    def new(self, **changes):
        """A request for a session of the one model and the one dataset."""
        state = {"a": np.ones(2), "b": np.ones(3)}
        model = self.registry.model(ModelSpec(builder="two"), put(self.blobs, state))
        data = put(self.blobs, {"x": np.ones((4, 2)), "y": np.ones(4)})
        spec = DatasetSpec(inputs=("x",), target="y", batch_size=2)
        dataset = self.registry.dataset(spec, data)
        fields = {"model_id": model.id, "dataset_id": dataset.id, "loss": MSE}
        return NewSession(**(fields | changes))

    def close(self):
        self.batcher.close()
        self.catalogue.close()


@contextlib.contextmanager
def middle(directory, **options):
    """A `Middle` that is closed at the end."""
    it = Middle(directory, **options)
    try:
        yield it
    finally:
        it.close()


def looks_at_values(config):
    """A builder that cannot build without memory."""
    from torch import nn

    layer = nn.Linear(2, 1)
    assert layer.weight.sum().item() < 100
    return layer
