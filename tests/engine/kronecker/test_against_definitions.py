"""Blocks are what their definition says, for every way in which a model uses a weight."""

from __future__ import annotations

import pytest
import torch
from support import kronecker_truth as truth
from torch import Tensor, nn
from torch.nn import functional as F

from curvd.contract import DatasetSpec, Dtype, FactorBlockKind, LossSpec, OperatorSpec
from curvd.errors import InvalidSpec
from curvd_server.engine.kronecker import KroneckerOperator, build
from curvd_server.engine.objective import Problem

HUGE = 1 << 30
N = 6


def problem_of(net: nn.Module, x: Tensor, y: Tensor, **options) -> Problem:
    data = DatasetSpec(inputs=("x",), target="y", batch_size=4)
    loss = LossSpec(name="cross_entropy")
    arrays = {"x": x, "y": y}
    return Problem.load(net, {}, arrays, data, loss, dtype=Dtype.FLOAT64, **options)


def operator_of(net: nn.Module, x: Tensor, y: Tensor, **options) -> KroneckerOperator:
    options = {"kind": "kfac", "fisher": "type-2"} | options
    spec = OperatorSpec(**options)
    return build(problem_of(net, x, y), spec, budget_bytes=HUGE)


def dense_of(operator: KroneckerOperator) -> Tensor:
    size = operator.problem.layout.size
    return operator.apply(torch.eye(size, dtype=torch.float64))


def square_of(operator: KroneckerOperator, at: Tensor) -> Tensor:
    """The rows and columns of some elements, without a product for each other one."""
    rows = torch.zeros(len(at), operator.problem.layout.size, dtype=torch.float64)
    rows[torch.arange(len(at)), at] = 1.0
    return operator.apply(rows)[:, at].mT


def block_of(operator: KroneckerOperator, parameter: str):
    return next(b for b in operator.report.blocks if parameter in b.parameters)


def made(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double()


def targets() -> Tensor:
    return torch.tensor([0, 1, 2, 0, 2, 1])


def numbers(*shape: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, *shape, generator=g, dtype=torch.float64)


def tokens(*shape: int, vocabulary: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, vocabulary, (N, *shape), generator=g)


def close(found: Tensor, exact: Tensor) -> bool:
    return float((found - exact).norm()) <= 1e-11 * float(exact.norm())


CONVOLUTIONS = {
    "plain": {"padding": 1},
    "strided": {"stride": (2, 1), "padding": (1, 0)},
    "dilated": {"dilation": 2, "padding": 1},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "padding": 1, "bias": False},
}


TRANSPOSED = {
    "plain": {},
    "strided": {"stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2)},
    "dilated": {"dilation": 2, "padding": 3, "stride": 2},
    "cut": {"padding": 3, "stride": 2},  # more than the kernel reaches over
    "groups": {"groups": 2, "padding": 1, "stride": 2},
    "without a bias": {"groups": 4, "bias": False},
}


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("options", TRANSPOSED.values(), ids=TRANSPOSED)
def test_transposed_convolutions_of_every_kind(options, reduce, kind):
    net = made(lambda: _spatial(options, nn.ConvTranspose2d))
    x, y = numbers(4, 6, 5), targets()
    sharing = "reduce" if reduce else "expand"
    operator = operator_of(net, x, y, sharing=sharing, kind=kind)
    block = block_of(operator, "0.weight")
    assert (block.kind, block.reason) == (FactorBlockKind.KRONECKER, "")
    assert block.groups == options.get("groups", 1)
    at = truth.flat_indices(net, net[0])
    if kind == "ekfac":  # its eigenvalues are those of the Fisher's block along vectors
        here = at.flatten()
        F_ = _fisher(net, net[0], x, y)
        found = square_of(operator, here)
        assert float(found.trace()) == pytest.approx(float(F_.trace()), rel=1e-10)
        return
    A, G = truth.factors(net, net[0], x, y, reduce=reduce)
    exact = truth.dense(operator.problem.layout.size, at, A, G)
    where = at.flatten()
    found = square_of(operator, where)
    assert close(found, exact[where[:, None], where[None]])


def _fisher(net: nn.Module, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The exact block of a layer, in the order of `truth.flat_indices`."""
    names = [
        n for n, p in net.named_parameters() if any(p is q for q in layer.parameters())
    ]
    block = truth.ggn_block(net, names, x, y)
    order = truth.flat_indices(net, layer).flatten()
    return block[order[:, None], order[None]]


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_of_every_kind(options, reduce):
    net = made(lambda: _spatial(options))
    x, y = numbers(4, 6, 5), targets()
    operator = operator_of(net, x, y, sharing="reduce" if reduce else "expand")
    exact = torch.zeros(())
    for layer in (net[0], net[3]):
        A, G = truth.factors(net, layer, x, y, reduce=reduce)
        size = operator.problem.layout.size
        exact = exact + truth.dense(size, truth.flat_indices(net, layer), A, G)
    assert close(dense_of(operator), exact)
    assert block_of(operator, "0.weight").groups == options.get("groups", 1)


def _spatial(options, kind=nn.Conv2d) -> nn.Module:
    layer = kind(4, 4, 3, **options)
    outputs = layer(torch.zeros(1, 4, 6, 5)).numel()
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(outputs, 3))


class OneAxis(nn.Module):
    """A convolution of one axis, as two of which one is trivial."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        self.flat = flat
        self.layer = nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.flat:
            h = self.layer(x)
        else:
            weight = self.layer.weight[:, :, None]
            h = F.conv2d(
                x[:, :, None], weight, self.layer.bias, (1, 2), (0, 1), groups=2
            )
        return self.head(torch.tanh(h).flatten(1))


def test_a_convolution_of_one_axis_is_one_of_two_axes():
    x, y = numbers(2, 6), targets()
    flat, wide = (
        dense_of(operator_of(made(lambda f=f: OneAxis(flat=f)), x, y))
        for f in (True, False)
    )
    assert close(flat, wide)


class Pooled(nn.Module):
    """An embedding, averaged over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids)).mean(1))


@pytest.mark.parametrize("reduce", [False, True])
def test_an_embedding_is_a_layer_of_one_hot_inputs(reduce):
    net, x, y = made(Pooled), tokens(7), targets()
    operator = operator_of(net, x, y, sharing="reduce" if reduce else "expand")
    size, exact = operator.problem.layout.size, torch.zeros(())
    for layer in (net.table, net.head):
        A, G = truth.factors(net, layer, x, y, reduce=reduce)
        exact = exact + truth.dense(size, truth.flat_indices(net, layer), A, G)
    assert close(dense_of(operator), exact)
    assert block_of(operator, "table.weight").diagonal_inputs == (not reduce)


@pytest.mark.parametrize("kind", ["embedding", "linear"])
def test_corrected_eigenvalues_are_the_diagonal_of_the_fisher_in_the_basis(kind):
    if kind == "embedding":
        net, x, y = made(Pooled), tokens(7), targets()
        layer = net.table
    else:
        net, x, y = made(Reused), numbers(4), targets()
        layer = net.twice
    operator = operator_of(net, x, y, kind="ekfac")
    A, G = truth.factors(net, layer, x, y)
    exact = truth.corrected(net, layer, x, y, A, G)
    at = truth.flat_indices(net, layer).flatten()
    found = dense_of(operator)[at[:, None], at[None]]
    if kind == "embedding":
        # The factor of the inputs is a diagonal: its eigenvectors are known in one order.
        vectors = torch.linalg.eigh(G[0])[1].contiguous()
        Q = torch.kron(torch.eye(5, dtype=torch.float64), vectors)
        assert close(torch.diag(Q.T @ found @ Q), _diagonal(net, layer, x, y, Q))
    else:
        assert close(found, exact)


def _diagonal(net: nn.Module, layer: nn.Module, x: Tensor, y: Tensor, Q: Tensor):
    total = torch.zeros(())
    for columns in truth.observed(net, layer, x, y):
        for column in columns:
            D = sum(a[0].mT @ g[0] for a, g in column).flatten()
            total = total + (Q.T @ D).square()
    return total / len(x)


class Reused(nn.Module):
    """One layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


@pytest.mark.parametrize("reduce", [False, True])
def test_a_layer_that_is_used_twice_has_one_block_of_all_its_rows(reduce):
    net, x, y = made(Reused), numbers(4), targets()
    operator = operator_of(net, x, y, sharing="reduce" if reduce else "expand")
    A, G = truth.factors(net, net.twice, x, y, reduce=reduce)
    at = truth.flat_indices(net, net.twice)
    size = operator.problem.layout.size
    found = dense_of(operator)[:20, :20]
    assert close(found, truth.dense(size, at, A, G)[:20, :20])


class Plain(nn.Module):
    """Three layers, called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)
        self.c = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Written(Plain):
    """The same weights, transposed, sliced, applied from the left and with added biases."""

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = self.a.weight.split(3)
        h = torch.cat((x @ top.T, x @ bottom.T), -1) + self.a.bias
        h = self.b.weight @ torch.tanh(h).T  # data points last
        h = torch.tanh(h.T + self.b.bias)
        return torch.addmm(self.c.bias, h, self.c.weight.T)


def test_weights_are_followed_however_they_are_written():
    x, y = numbers(4), targets()
    plain = dense_of(operator_of(made(Plain), x, y))
    operator = operator_of(made(Written), x, y)
    found = dense_of(operator)
    # The bias of b is added behind a transpose, so it is by itself.
    for rest in (slice(30, 54), slice(54, 58), slice(58, None)):
        assert close(found[rest, rest], plain[rest, rest])
    halves = [b for b in operator.report.blocks if "a.weight" in b.parameters]
    assert [(b.inputs, b.outputs) for b in halves] == [(4, 3), (4, 3)]
    for rows in (slice(0, 12), slice(12, 24)):  # a split weight has a block for each
        assert close(found[rows, rows], plain[rows, rows])


class Positions(nn.Module):
    """A table of positions, a scale of a norm, and a layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(x + self.table)).mean(1))


class Looked(Positions):
    """The same table, looked up once for all data points."""

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(5, device=x.device)
        table = F.embedding(ids, self.table)
        return self.head(torch.tanh(self.norm(x + table)).mean(1))


@pytest.mark.parametrize("make", [Positions, Looked])
def test_what_is_no_product_of_matrices_has_its_exact_block(make):
    net, x, y = made(make), numbers(5, 4), targets()
    operator = operator_of(net, x, y)
    found = dense_of(operator)
    start = 0
    for name, p in net.named_parameters():
        if not name.startswith("head"):
            here = slice(start, start + p.numel())
            assert close(found[here, here], truth.ggn_block(net, [name], x, y))
        start += p.numel()
    scale = block_of(operator, "norm.weight")
    assert scale.kind is FactorBlockKind.DENSE
    assert scale.reason == "consumed by native_layer_norm"
    table = block_of(operator, "table")
    if make is Looked:
        assert "rows belong to several data points" in table.reason


def test_a_large_tensor_without_a_product_has_its_exact_diagonal(monkeypatch):
    from curvd_server.engine.kronecker import weights

    net, x, y = made(Looked), numbers(5, 4), targets()
    monkeypatch.setattr(weights, "LARGEST_DENSE", 10)
    operator = operator_of(net, x, y)
    block = block_of(operator, "table")
    assert block.kind is FactorBlockKind.DIAGONAL
    found = dense_of(operator)[:20, :20]
    exact = truth.ggn_block(net, ["table"], x, y)
    assert close(found, torch.diag(torch.diag(exact)))


def test_a_side_that_is_too_large_keeps_the_diagonal_of_its_factor(monkeypatch):
    from curvd_server.engine.kronecker import reading

    net, x, y = made(Plain), numbers(4), targets()
    monkeypatch.setattr(reading, "LARGEST_SIDE", 5)
    operator = operator_of(net, x, y)
    A, G = truth.factors(net, net.b, x, y)
    exact = truth.dense(
        operator.problem.layout.size,
        truth.flat_indices(net, net.b),
        torch.diag_embed(A.diagonal(dim1=1, dim2=2)),
        G,
    )
    here = slice(30, 58)
    assert close(dense_of(operator)[here, here], exact[here, here])
    block = block_of(operator, "b.weight")
    assert block.diagonal_inputs and not block.diagonal_outputs


class Tied(nn.Module):
    """An embedding that is the output layer, too, of a net for the next token."""

    def __init__(self, *, padding: int | None = None, twice: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 4, padding_idx=padding)
        self.body, self.twice = nn.Linear(4, 4), twice

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.body(self.table(ids).mean(1)))
        if self.twice:  # a third place, in the layout of the embedding
            h = torch.tanh(F.pad(h[:, :3], (0, 0)) @ self.table.weight) + h
        return h @ self.table.weight.T


def whole_gradients(net: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The table's gradient along each column of each data point, by plain autograd."""
    found = []
    for n in range(len(x)):
        z = net(x[n : n + 1])[0]
        for column in truth.roots(z.detach(), y[n]).T:
            (D,) = torch.autograd.grad(z, net.table.weight, column, retain_graph=True)
            found.append(D / len(x) ** 0.5)
    return found


TIES = {"plain": {}, "padded": {"padding": 1}, "in three places": {"twice": True}}


@pytest.mark.parametrize("largest", [2048, 3])
@pytest.mark.parametrize("options", TIES.values(), ids=TIES)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_weight_of_two_layouts_has_factors_of_its_whole_gradients(
    options, sharing, largest, monkeypatch
):
    from curvd_server.engine.kronecker import reading, weights

    monkeypatch.setattr(weights, "LARGEST_DENSE", 10)
    monkeypatch.setattr(reading, "LARGEST_WHOLE", largest)
    net, x, y = made(lambda: Tied(**options)), tokens(5, vocabulary=3), targets()
    Ds = whole_gradients(net, x, y)
    L, R = (sum(M) for M in zip(*((D @ D.T, D.T @ D) for D in Ds), strict=True))
    F_ = sum(torch.outer(D.flatten(), D.flatten()) for D in Ds)
    if largest == 3:  # the side of 4 keeps its diagonal
        R = torch.diag(torch.diag(R))
    operator = operator_of(net, x, y, sharing=sharing)
    found = dense_of(operator)[:12, :12]
    assert close(found, torch.kron(L, R) / L.trace())
    assert float(found.trace()) == pytest.approx(float(F_.trace()), rel=1e-12)
    block = block_of(operator, "table.weight")
    assert block.whole_gradients and block.kind is FactorBlockKind.KRONECKER
    assert (block.inputs, block.outputs) == (3, 4)
    assert (block.diagonal_inputs, block.diagonal_outputs) == (False, largest == 3)
    assert not block_of(operator, "body.weight").whole_gradients
    corrected = operator_of(net, x, y, kind="ekfac", sharing=sharing)
    left, right = torch.linalg.eigh(L)[1], torch.linalg.eigh(R)[1]
    Q = torch.kron(left.contiguous(), right.contiguous())
    exact = Q @ torch.diag(torch.diag(Q.T @ F_ @ Q)) @ Q.T
    # A basis of equal eigenvalues is free: what is compared is F's diagonal in ours.
    ours = dense_of(corrected)[:12, :12]
    values, vectors = torch.linalg.eigh(ours)
    if "padding" in options:  # null vectors of L are a basis of any kind
        assert float(ours.trace()) == pytest.approx(float(F_.trace()), rel=1e-10)
        assert float(values[0]) > -1e-12 and vectors.shape == (12, 12)
    else:
        assert close(ours, exact)


def test_a_small_tied_weight_has_its_exact_block():
    net, x, y = made(Tied), tokens(5, vocabulary=3), targets()
    operator = operator_of(net, x, y)
    exact = truth.ggn_block(net, ["table.weight"], x, y)
    assert close(dense_of(operator)[:12, :12], exact)
    block = block_of(operator, "table.weight")
    assert block.kind is FactorBlockKind.DENSE and "one layout" in block.reason


def test_a_tied_weight_with_a_bias_has_its_exact_diagonal(monkeypatch):
    """A bias belongs to one of the layouts alone."""
    from curvd_server.engine.kronecker import weights

    class WithBias(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(3))

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + self.bias

    monkeypatch.setattr(weights, "LARGEST_DENSE", 10)
    net, x, y = made(WithBias), tokens(5, vocabulary=3), targets()
    operator = operator_of(net, x, y)
    exact = truth.ggn_block(net, ["table.weight"], x, y)
    at = [i for i, n in enumerate(operator.problem.layout.names) if n == "table.weight"]
    start = operator.problem.layout.parameters[at[0]].offset
    found = dense_of(operator)[start : start + 12, start : start + 12]
    assert close(found, torch.diag(torch.diag(exact)))


class Recurrent(nn.Module):
    """A transformer's layer with positions first or data points first."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.layer = nn.TransformerEncoderLayer(
            4, 2, 4, dropout=0.0, batch_first=batch_first
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_first:
            return self.head(self.layer(x).mean(1))
        return self.head(self.layer(x.transpose(0, 1)).mean(0))


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_data_points_are_found_among_the_rows_wherever_they_are(kind, sharing):
    x, y = numbers(5, 4), targets()
    first, second = (
        dense_of(
            operator_of(
                made(lambda f=f: Recurrent(batch_first=f)),
                x,
                y,
                kind=kind,
                sharing=sharing,
            )
        )
        for f in (True, False)
    )
    assert float((first - second).norm()) < 1e-9 * float(first.norm())


def test_one_data_point_and_no_shared_weights_is_the_gauss_newton_matrix_in_blocks():
    net, x, y = made(Plain), numbers(4)[:1], targets()[:1]
    found = dense_of(operator_of(net, x, y))
    start = 0
    for layer in ("a", "b", "c"):
        names = [f"{layer}.weight", f"{layer}.bias"]
        exact = truth.ggn_block(net, names, x, y)
        here = slice(start, start + len(exact))
        assert close(found[here, here], exact)
        start += len(exact)


def test_chosen_parameters_have_factors_of_their_own():
    net, x, y = made(Plain), numbers(4), targets()
    operator = operator_of(net, x, y, parameters=("b.bias", "c.weight"))
    found = dense_of(operator)
    _, G = truth.factors(net, net.b, x, y)
    assert close(found[:4, :4], G[0])
    A, G = truth.factors(net, net.c, x, y)
    exact = torch.kron(G[0], A[0, :4, :4])  # outputs slowest, as a weight is laid out
    assert close(found[4:, 4:], exact)


class Padded(nn.Module):
    """A layer beside a parameter that holds nothing."""

    def __init__(self):
        super().__init__()
        self.none, self.layer = nn.Parameter(torch.empty(0)), nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) + self.none.sum()


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_a_parameter_without_elements_is_in_no_block(kind):
    net, x = made(Padded), numbers(4)
    whole = operator_of(net, x, targets(), kind=kind)
    alone = operator_of(net.layer, x, targets(), kind=kind)
    assert close(dense_of(whole), dense_of(alone))


def test_batch_statistics_are_refused():
    net = made(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    problem = problem_of(net, numbers(4), targets(), mode="batch_statistics")
    with pytest.raises(InvalidSpec, match="make a session with mode='eval'"):
        build(problem, OperatorSpec(kind="kfac"), budget_bytes=HUGE)
