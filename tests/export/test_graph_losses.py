"""Losses of the caller's own, and whole sessions in one call."""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import curvd  # noqa: E402
from curvd.contract.enums import LossName, Reduction  # noqa: E402
from curvd.graph.losses import evaluated, recognised  # noqa: E402

N, BATCH = 7, 3
"""Leaves a ragged last mini-batch."""


@pytest.fixture(scope="module")
def client(live_target):
    with curvd.connect(live_target) as client:
        yield client


@pytest.fixture
def module():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def draw(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def labels(classes, *shape):
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(2))


def log_cosh(z, y):
    """A convex loss that has no name, as a mean over elements."""
    return torch.log(torch.cosh(z - y)).mean()


def dense(module, objective, x, y):
    """The Hessian of the whole objective by differences of its gradient."""
    parameters = list(module.parameters())
    start = nn.utils.parameters_to_vector(parameters).detach()

    def gradient(at):
        nn.utils.vector_to_parameters(at, parameters)
        rows = torch.autograd.grad(objective(module(x), y), parameters)
        return nn.utils.parameters_to_vector(rows)

    step, rows = 1e-5, []
    for k in range(len(start)):
        e = torch.zeros_like(start)
        e[k] = step
        rows.append((gradient(start + e) - gradient(start - e)) / (2 * step))
    nn.utils.vector_to_parameters(start, parameters)
    return torch.stack(rows).numpy()


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def weighted(z, y):
    """Squared errors of the targets that are there; the others are NaN-free zeros."""
    there = (y > 0).to(z.dtype)
    return (there * (z - y).square()).sum(), there.sum()


@pytest.mark.parametrize(
    ("loss", "normaliser", "objective"),
    [
        (log_cosh, "points", log_cosh),
        (lambda z, y: (z - y).pow(4).sum(), "sum", lambda z, y: (z - y).pow(4).sum()),
        (weighted, "counted", lambda z, y: weighted(z, y)[0] / weighted(z, y)[1]),
        (nn.HuberLoss(delta=0.7), "points", nn.HuberLoss(delta=0.7)),
    ],
    ids=["mean", "sum", "counted", "huber"],
)
def test_a_custom_loss_is_over_the_whole_dataset(
    client, module, loss, normaliser, objective
):
    x, y = draw(N, 4), draw(N, 3, seed=2)
    spec = curvd.export_loss(loss, module(x), y, normaliser=normaliser)
    session = client.session_for(module, spec, (x, y), batch_size=BATCH)
    assert session.info.loss.name == LossName.CUSTOM
    value, _ = session.gradient()
    assert value == pytest.approx(objective(module(x), y).item(), rel=1e-12)
    got = session.hessian() @ np.eye(session.layout.size)
    assert relative(got, dense(module, objective, x, y)) <= 1e-6
    session.delete()


def test_the_ggn_of_a_custom_loss_is_the_one_of_its_name(client, module):
    x, y = draw(N, 4), draw(N, 3, seed=2)
    custom = curvd.export_loss(lambda z, y: (z - y).square().mean(), module(x), y)
    products = []
    for loss in (custom, "mse"):
        session = client.session_for(module, loss, (x, y), batch_size=BATCH)
        ggn, fisher = session.ggn(), session.empirical_fisher()
        eye = np.eye(session.layout.size)
        products.append([ggn @ eye, ggn @ eye[0], session.hessian() @ eye])
        # The empirical Fisher squares gradients, and the two sum up differently scaled.
        scale = 1.0 if loss == "mse" else 3.0
        products[-1].append(fisher @ eye * scale)
        with pytest.raises(curvd.InvalidSpec) if loss == custom else noop():
            session.fisher() @ eye[0]
        session.delete()
    for got, want in zip(*products, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


class noop:
    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def test_constants_of_a_loss_travel_with_it(client, module):
    x, y = draw(N, 4), labels(3, N)
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)

    def loss(z, y):
        return F.cross_entropy(z, y, weight=weight, reduction="sum"), weight[y].sum()

    session = client.session_for(module, loss, (x, y), batch_size=BATCH)
    named = functools.partial(F.cross_entropy, weight=weight)
    other = client.session_for(module, named, (x, y), batch_size=BATCH)
    assert session.info.loss.name == LossName.CUSTOM
    assert other.info.loss.class_weights == (0.5, 2.0, 1.0)
    v = np.linspace(-1, 1, session.layout.size)
    np.testing.assert_allclose(
        session.hessian() @ v, other.hessian() @ v, rtol=1e-9, atol=1e-13
    )


@pytest.mark.parametrize(
    ("loss", "normaliser", "match"),
    [
        (F.mse_loss, "sum", "disagree; declare another normaliser"),
        (lambda z, y: (z - y).square().sum(), "points", "disagree"),
        (F.mse_loss, "counted", "returns one|got Tensor"),
        (weighted, "points", "got tuple"),
        (lambda z, y: (z - y).square(), "points", r"returns \[7, 3\]"),
        (F.mse_loss, "none", "unknown normaliser 'none'"),
    ],
)
def test_a_normaliser_that_is_not_true_is_refused(module, loss, normaliser, match):
    x, y = draw(N, 4), draw(N, 3, seed=2)
    with pytest.raises(curvd.InvalidSpec, match=match):
        curvd.export_loss(loss, module(x), y, normaliser=normaliser)


def test_a_loss_with_many_constants_is_refused(module):
    table = torch.randn(3, 10_000)
    with pytest.raises(curvd.InvalidGraph, match="constants of the loss have 120000"):
        curvd.export_loss(
            lambda z, y: ((z - y) @ table.double()[:, :3]).square().mean(),
            *(draw(N, 3), draw(N, 3)),
        )


NAMED = [
    (nn.CrossEntropyLoss(), {"name": "cross_entropy"}),
    (
        nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1, reduction="sum"),
        {
            "name": "cross_entropy",
            "ignore_index": 1,
            "label_smoothing": 0.1,
            "reduction": "sum",
        },
    ),
    (F.cross_entropy, {"name": "cross_entropy"}),
    (nn.NLLLoss(), {"name": "nll"}),
]


@pytest.mark.parametrize(("loss", "want"), NAMED)
def test_common_losses_are_known_by_name(loss, want):
    from curvd.graph.losses import recognised

    assert recognised(loss, draw(N, 3), labels(3, N)) == curvd.LossSpec(**want)


@pytest.mark.parametrize(
    ("loss", "want"),
    [
        (nn.MSELoss(reduction="sum"), {"name": "mse", "reduction": "sum"}),
        (nn.SmoothL1Loss(beta=0.5), {"name": "smooth_l1", "beta": 0.5}),
        (
            nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0])),
            {"name": "bce_with_logits", "class_weights": (1.0, 2.0, 3.0)},
        ),
        (
            functools.partial(F.mse_loss, reduction="sum"),
            {"name": "mse", "reduction": "sum"},
        ),
    ],
)
def test_common_losses_of_numbers_are_known_by_name(loss, want):
    from curvd.graph.losses import recognised

    assert recognised(loss, draw(N, 3), draw(N, 3).sigmoid()) == curvd.LossSpec(**want)


def test_a_loss_whose_class_axis_a_server_would_mistake_becomes_a_graph():
    from curvd.graph.losses import recognised

    outputs, targets = draw(N, 3, 3), labels(3, N, 3)
    assert recognised(nn.CrossEntropyLoss(), outputs, targets).name == LossName.CUSTOM
    wide = draw(N, 3, 4)
    found = recognised(nn.CrossEntropyLoss(), wide, labels(3, N, 4))
    assert found.name == LossName.CROSS_ENTROPY


def test_an_unknown_loss_is_exported_as_what_it_is():
    from curvd.graph.losses import recognised

    found = recognised(log_cosh, draw(N, 3), draw(N, 3, seed=2))
    assert (found.name, found.reduction) == (LossName.CUSTOM, Reduction.MEAN)
    total = recognised(
        lambda z, y: log_cosh(z, y) * z.numel(), draw(N, 3), draw(N, 3, seed=2)
    )
    assert total.reduction is Reduction.SUM
    exact = recognised(log_cosh, draw(N, 3), draw(N, 3))
    assert exact.reduction is Reduction.MEAN
    with pytest.raises(curvd.InvalidSpec, match="both a mean and a sum"):
        recognised(lambda z, y: 0 * z.sum(), draw(N, 3), draw(N, 3))
    with pytest.raises(curvd.InvalidSpec, match=r"neither a mean nor a sum.*weight"):
        recognised(lambda z, y: (z - y).norm(), draw(N, 3), draw(N, 3, seed=2))


@pytest.mark.parametrize("size", [1e-12, 1e-20, 1e-30, 1e-100, 1e30])
def test_a_loss_of_any_size_is_a_mean_a_sum_or_counted(size):
    """Whether its factor or its targets are so small."""
    from curvd.graph.losses import recognised

    z, y = draw(N, 3), draw(N, 3, seed=2).abs()
    ways = {
        "points": lambda z, y: size * log_cosh(z, y),
        "sum": lambda z, y: size * log_cosh(z, y) * z.numel(),
        "counted": lambda z, y: (size * (y * z.square()).sum(), size * y.sum()),
    }
    for normaliser, loss in ways.items():
        found = recognised(loss, z, y)
        is_sum = found.reduction is Reduction.SUM
        assert is_sum == (normaliser == "sum")
        with pytest.raises(curvd.InvalidSpec, match=r"another normaliser|returns"):
            wrong = "points" if normaliser == "sum" else "sum"
            curvd.export_loss(loss, z, y, normaliser=wrong)
    weighed = recognised(lambda z, y: (y * z.square()).mean(), z, size * y)
    assert weighed.reduction is Reduction.MEAN
    with pytest.raises(curvd.InvalidSpec, match=r"neither a mean nor a sum.*weight"):
        recognised(lambda z, y: size * (z - y).norm(), z, y)
    joined = lambda z, y: size * (log_cosh(z, y) + 1e-6 * z.mean().square())  # noqa: E731
    with pytest.raises(curvd.InvalidSpec, match=r"neither a mean nor a sum.*weight"):
        recognised(joined, z, y)


def hinge(z, y):
    """Vanish where each output is beyond its target by one."""
    return torch.relu(1 - z * y.sign()).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e-20])
def test_a_loss_that_vanishes_at_the_outputs_is_looked_at_elsewhere(size, dtype):
    from curvd.graph.losses import recognised

    y = draw(N, 3).to(dtype)
    z = 10 * y.sign() + y
    mean = recognised(lambda z, y: size * hinge(z, y), z, y)
    total = recognised(lambda z, y: size * hinge(z, y) * z.numel(), z, y)
    assert (mean.reduction, total.reduction) == (Reduction.MEAN, Reduction.SUM)
    with pytest.raises(curvd.InvalidSpec, match="neither a mean nor a sum"):
        recognised(lambda z, y: torch.relu(1 - (z * y.sign()).mean()).square(), z, y)


def test_a_saturated_loss_is_no_other_for_its_rounding():
    """What is left of it is the difference of large numbers."""
    from curvd.graph.losses import recognised

    y = labels(3, N)
    z = 40.0 * nn.functional.one_hot(y, 3).double() + 0.1 * draw(N, 3)
    for size in (1.0, 1e-20):
        own = lambda z, y: (  # noqa: E731
            size * (z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]).mean()  # noqa: B023
        )
        assert recognised(own, z, y).reduction is Reduction.MEAN


def test_one_data_point_tells_a_mean_from_a_sum():
    from curvd.graph.losses import recognised

    z, y = draw(1, 3), draw(1, 3, seed=2)
    mean = recognised(log_cosh, z, y)
    total = recognised(lambda z, y: log_cosh(z, y) * z.numel(), z, y)
    assert (mean.reduction, total.reduction) == (Reduction.MEAN, Reduction.SUM)


@pytest.mark.parametrize("size", [1e-12, 1e-30])
def test_a_session_of_a_small_loss_has_its_curvature(client, size):
    module, x, y = nn.Linear(4, 3).double(), draw(N, 4), draw(N, 3, seed=2)
    loss = lambda z, y: size * log_cosh(z, y)  # noqa: E731
    parameters = list(module.parameters())
    v = draw(sum(p.numel() for p in parameters), seed=3)
    with client.session_for(module, loss, (x, y), batch_size=4) as session:
        value, row = session.gradient()
        product = session.hessian() @ v.numpy()
    total = loss(module(x), y)
    rows = torch.autograd.grad(total, parameters, create_graph=True)
    flat = nn.utils.parameters_to_vector(rows)
    second = torch.autograd.grad(flat @ v, parameters)
    assert value == pytest.approx(float(total.detach()), rel=1e-10)
    scale = float(flat.detach().abs().max())
    np.testing.assert_allclose(row, flat.detach(), rtol=1e-9, atol=1e-12 * scale)
    want = torch.cat([part.reshape(-1) for part in second])
    scale = float(want.abs().max())
    np.testing.assert_allclose(product, want, rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2)])
def test_outputs_that_are_nan_are_named(shape):
    from curvd.graph.losses import recognised

    z, y = torch.zeros(shape), torch.zeros(shape)
    z[2] = float("nan")
    with pytest.raises(curvd.InvalidSpec, match="outputs are NaN at data point"):
        recognised(lambda z, y: (z - y).abs().mean(), z, y)


@pytest.mark.parametrize("mode", ["eval", "batch_statistics"])
def test_one_call_makes_a_session(client, mode):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    running = module[1].running_mean.clone()
    x, y = torch.randn(N, 4), labels(3, N)
    session = client.session_for(
        module, nn.CrossEntropyLoss(), (x, y), batch_size=4, mode=mode
    )
    assert session.info.dtype == curvd.Dtype.FLOAT32
    assert session.info.mode == mode
    assert module[1].training
    assert torch.equal(module[1].running_mean, running)
    assert (session.hessian() @ np.ones(session.layout.size, np.float32)).any()
    assert session.update_parameters(module.state_dict()) == 2
    session.delete()


def test_a_session_of_a_module_takes_what_other_sessions_take(client, module):
    data = draw(N, 4), labels(3, N)
    open_with = functools.partial(client.session_for, module, data=data, batch_size=4)
    assert open_with("cross_entropy").info.loss.name == "cross_entropy"
    weighed = {"name": "cross_entropy", "class_weights": (1.0, 2.0, 3.0)}
    assert open_with(weighed).info.loss.class_weights == (1.0, 2.0, 3.0)
    with pytest.raises(
        curvd.InvalidSpec, match="unexpected keyword argument 'wieghts'"
    ):
        open_with({"name": "cross_entropy", "wieghts": (1.0,)})
    with pytest.raises(curvd.InvalidSpec, match="got a Tensor without targets"):
        client.session_for(module, "mse", data[0], batch_size=4)
    chosen = open_with("cross_entropy", params=("0.*",), name="mine")
    assert chosen.layout.names == ("0.weight", "0.bias")
    assert chosen.info.name == "mine"


def test_half_precision_needs_a_dtype(client):
    module, x = nn.Linear(4, 3).half(), torch.randn(N, 4).half()
    data, loss = (x, labels(3, N)), nn.CrossEntropyLoss()
    with pytest.raises(curvd.InvalidSpec, match=r"float16 as weight.*dtype='float32'"):
        client.session_for(module, loss, data, batch_size=4)
    session = client.session_for(module, loss, data, batch_size=4, dtype="float32")
    assert session.info.dtype is curvd.Dtype.FLOAT32


async def test_one_awaited_call_makes_a_session(live_target, module):
    x, y = draw(N, 4), labels(3, N)
    async with curvd.aio.connect(live_target) as client:
        session = await client.session_for(
            module, F.cross_entropy, (x, y), batch_size=4
        )
        assert session.info.dtype == curvd.Dtype.FLOAT64
        await session.delete()


def test_a_session_with_a_custom_loss_survives_a_restart(tmp_path, module):
    from curvd_server.app import serve_in_thread
    from curvd_server.config import ServerConfig

    config = ServerConfig(listen="127.0.0.1:0", data_dir=tmp_path)
    x, y = draw(N, 4), draw(N, 3, seed=2)
    products = []
    with serve_in_thread(config) as target, curvd.connect(target) as client:
        session = client.session_for(module, log_cosh, (x, y), batch_size=BATCH)
        v = np.linspace(-1, 1, session.layout.size)
        products.append(session.hessian() @ v)
    with serve_in_thread(config) as target, curvd.connect(target) as client:
        again = client.session(session.id)
        products.append(again.hessian() @ v)
    np.testing.assert_allclose(*products, rtol=1e-12)


def test_the_first_answer_of_the_ggn_of_a_custom_loss_is_right(client, module):
    x, y = draw(N, 4), draw(N, 3, seed=2)
    session = client.session_for(
        module, lambda z, y: (z - y).pow(4).mean(), (x, y), batch_size=BATCH
    )
    want = gauss_newton(module, lambda z, y: (z - y).pow(4).mean(), x, y)
    ggn = session.ggn()
    assert relative(ggn @ np.eye(session.layout.size)[0], want[0]) <= 1e-10
    assert relative(ggn.to_dense(), want) <= 1e-10
    session.delete()


def gauss_newton(module, loss, x, y):
    """Write ``J^T M J`` out, with J and M by torch.func."""
    names = {n: p.detach() for n, p in module.named_parameters()}

    def outputs(parameters):
        return torch.func.functional_call(module, parameters, (x,))

    parts = torch.func.jacrev(outputs)(names).values()
    J = torch.cat([part.flatten(2) for part in parts], -1).flatten(0, 1)
    M = torch.func.hessian(lambda z: loss(z, y))(outputs(names))
    return (J.T @ M.reshape(len(J), len(J)) @ J).numpy()


class LogSquares(nn.Module):
    """Logarithms of probabilities [B, 3, 3], classes in the second axis."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.layer = nn.Linear(4, 9).double()

    def forward(self, x):
        return torch.log_softmax(self.layer(x).reshape(-1, 3, 3), 1)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.NLLLoss()], ids=repr)
def test_as_many_positions_as_classes_are_read_as_torch_reads_them(
    live_target, loss, check
):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(9, 4, generator=generator).double()
    y = torch.randint(0, 3, (9, 3), generator=generator)
    net = LogSquares()
    right = loss(net(x), y)
    gradients = torch.autograd.grad(right, list(net.parameters()))
    with curvd.connect(live_target) as client:
        session = client.session_for(net, loss, (x, y), batch_size=4, check=check)
        value, gradient = session.gradient()
        assert value == pytest.approx(float(right.detach()), rel=1e-12)
        flat = torch.cat([g.reshape(-1) for g in gradients])
        np.testing.assert_allclose(gradient, flat, rtol=1e-9, atol=1e-14)
        with pytest.raises(curvd.InvalidSpec, match="second axis or in the last"):
            client.session_for(net, "nll", (x, y), batch_size=4, check=False).gradient()


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 3.0])),
        nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), ignore_index=-1),
        nn.CrossEntropyLoss(),
        nn.NLLLoss(weight=torch.tensor([0.5, 2.0, 3.0]).double(), ignore_index=0),
        functools.partial(F.cross_entropy, ignore_index=2, reduction="sum"),
    ],
    ids=["weights", "ignored", "both", "ignored by default", "nll", "sum"],
)
def test_as_many_positions_as_classes_are_counted_as_torch_counts_them(
    live_target, loss
):
    """Means that are divided by weights, or by the number of targets that count."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(9, 4, generator=generator).double()
    y = torch.randint(0, 3, (9, 3), generator=generator)
    y[4:6, 1] = getattr(loss, "ignore_index", 0)
    if getattr(loss, "weight", None) is not None:
        loss = loss.double()
    net = LogSquares()
    right = loss(net(x), y)
    gradients = torch.autograd.grad(right, list(net.parameters()))
    with curvd.connect(live_target) as client:
        session = client.session_for(net, loss, (x, y), batch_size=4)
        value, gradient = session.gradient()
    assert value == pytest.approx(float(right.detach()), rel=1e-12)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    np.testing.assert_allclose(gradient, flat, rtol=1e-9, atol=1e-14)


def margin_targets(loss):
    """Classes; or labels up to the first -1, then anything."""
    if isinstance(loss, nn.MultiLabelMarginLoss):
        return torch.tensor([
            [0, 2, -1],
            [1, -1, 0],
            [2, 1, 0],
            [-1, 0, 1],
            [0, -1, -1],
        ])
    return torch.tensor([0, 2, 1, 1, 0])


@pytest.mark.parametrize(
    "loss",
    [
        nn.MultiMarginLoss(),
        nn.MultiMarginLoss(p=2, margin=0.7),
        nn.MultiMarginLoss(p=2, weight=torch.tensor([0.5, 2.0, 3.0]).double()),
        nn.MultiMarginLoss(reduction="sum"),
        nn.MultiLabelMarginLoss(),
        nn.MultiLabelMarginLoss(reduction="sum"),
    ],
    ids=repr,
)
def test_margin_losses_have_the_hessian_of_their_formula(client, module, loss):
    """Torch's kernels have no second derivative."""
    x, y = draw(5, 4), margin_targets(loss)
    right = loss(module(x), y)
    gradients = torch.autograd.grad(right, list(module.parameters()))
    session = client.session_for(module, loss, (x, y), batch_size=3)
    value, gradient = session.gradient()
    assert value == pytest.approx(float(right.detach()), rel=1e-12)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    np.testing.assert_allclose(gradient, flat, rtol=1e-9, atol=1e-14)
    found = session.hessian().to_dense()
    want = dense(module, loss, x, y)
    assert relative(found, want) <= 1e-5
    session.delete()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_huber_loss_of_delta_one_is_the_smooth_l1_loss_by_name(reduction):
    outputs, targets = torch.randn(6, 2), 3 * torch.randn(6, 2)
    alike = (
        nn.SmoothL1Loss(reduction=reduction),
        nn.HuberLoss(reduction=reduction),
        functools.partial(F.huber_loss, reduction=reduction),
    )
    spec, *others = (recognised(loss, outputs, targets) for loss in alike)
    assert spec.name is LossName.SMOOTH_L1 and others == [spec, spec]
    known = float(evaluated(spec, outputs, targets))
    assert known == pytest.approx(float(alike[1](outputs, targets)))
    other = recognised(nn.HuberLoss(delta=2.0), outputs, targets)
    assert other.name is LossName.CUSTOM, "a multiple of it, which has no name"
