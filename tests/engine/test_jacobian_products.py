"""Products with Jacobians of data points are those of torch.func, by every plan."""

import numpy as np
import pytest
import torch
from engine.test_gradient_norms import CASES, loaded
from support.places import everywhere, here
from torch import nn
from torch.nn import functional as F

from curvd.contract import DatasetSpec, Dtype, JacobianOf, LossSpec, Stop
from curvd.errors import CurvatureUnverified, InvalidSpec
from curvd_server.engine.data_points import Points
from curvd_server.engine.data_points import jacobian as jacobian_module
from curvd_server.engine.data_points.gradient_gram import gradient_gram
from curvd_server.engine.data_points.gradient_squares import gradient_squares
from curvd_server.engine.data_points.influence import Scores, gradients_of
from curvd_server.engine.data_points.jacobian import Jacobian
from curvd_server.engine.data_points.jacobian_products import (
    jacobian_product,
    rows_of_points,
)
from curvd_server.engine.data_points.laplace import (
    likelihood_of,
    log_likelihood,
    noise_of,
    output_rows,
)
from curvd_server.engine.data_points.output_rows import OutputRows
from curvd_server.engine.objective import Problem, on_inputs, part_of, with_data
from curvd_server.linalg.base import drain

JACOBIANS = ["mlp", "weights", "sum", "decay", "images", "tokens"]


def points_of(problem, **options):
    return Points(problem, compute=lambda job: job(lambda: False), **options)


def columns(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def reference(case, module):
    """[N, P] by torch.func, and [N C, P]."""
    _, x, y, _, loss = CASES[case]
    parameters = {n: p.detach() for n, p in module.named_parameters()}

    def losses(parameters):
        def one(a, b):
            out = torch.func.functional_call(module, parameters, (a[None],))
            return loss(out, b[None])

        return torch.func.vmap(one)(x, y)

    def outputs(parameters):
        return torch.func.functional_call(module, parameters, (x,))

    def flat(rows):
        lead = rows[next(iter(rows))].ndim - parameters[next(iter(rows))].ndim
        return torch.cat([r.flatten(lead) for r in rows.values()], -1)

    J = flat(torch.func.jacrev(losses)(parameters))
    Z = flat(torch.func.jacrev(outputs)(parameters))
    return J, Z.reshape(-1, J.shape[1])


def product(problem, operand, *, of="losses", transposed=False, rows=3, **options):
    points = points_of(problem, **options)
    which = drain(rows_of_points(points, JacobianOf(of), None))
    query = jacobian_product(points, which, operand, transposed=transposed, rows=rows)
    return drain(query)


@pytest.mark.parametrize("case", JACOBIANS)
def test_products_are_those_of_torch_func_in_both_directions(case):
    module, problem = loaded(case)
    J, Z = reference(case, module)
    for of, rows in (("losses", J), ("outputs", Z)):
        V, W = columns((2, J.shape[1])), columns((2, len(rows)), seed=1)
        pushed = product(problem, V, of=of)
        pulled = product(problem, W, of=of, transposed=True)
        np.testing.assert_allclose(pushed.result, V @ rows.T, rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(pulled.result, W @ rows, rtol=1e-10, atol=1e-11)
        inner = (pushed.result * W).sum(), (pulled.result * V).sum()
        assert float(inner[0]) == pytest.approx(float(inner[1]), rel=1e-11)


@pytest.mark.parametrize("case", ["mlp", "tokens", "images"])
@pytest.mark.parametrize("count", [1, 3])
def test_every_plan_has_the_same_product(case, count):
    module, problem = loaded(case)
    J, _ = reference(case, module)
    batch, jacobian = problem.data[0], Jacobian(problem, JacobianOf.LOSSES)
    J = J[: len(batch.targets)]
    V, W = columns((count, J.shape[1])), columns((len(J), count), seed=1)
    for plan in (jacobian._forward, jacobian._transposed, jacobian._rows_times):
        np.testing.assert_allclose(plan(batch, V), J @ V.T, rtol=1e-10, atol=1e-11)
    for plan in (jacobian._reverse, jacobian._reverse_together, jacobian._times_rows):
        np.testing.assert_allclose(plan(batch, W), W.T @ J, rtol=1e-10, atol=1e-11)


def test_products_are_those_of_central_differences():
    module, problem = loaded("mlp")
    _, x, y, *_ = CASES["mlp"]
    start = nn.utils.parameters_to_vector(module.parameters()).detach()
    v, step, ends = columns(start.shape), 1e-5, []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(start + sign * step * v, module.parameters())
        ends.append(F.cross_entropy(module(x), y, reduction="none").detach())
    found = product(problem, v[None]).result[0]
    np.testing.assert_allclose(found, (ends[0] - ends[1]) / (2 * step), rtol=1e-7)


def test_the_sum_of_rows_is_the_gradient_and_their_squares_the_empirical_fisher():
    module, problem = loaded("tokens")
    J, _ = reference("tokens", module)
    ones = torch.ones(1, len(J), dtype=torch.float64)
    total = product(problem, ones, transposed=True).result[0] / problem.normaliser
    np.testing.assert_allclose(total, problem.gradient()[1], rtol=1e-10, atol=1e-12)
    squares = drain(gradient_squares(points_of(problem), rows=3))
    np.testing.assert_allclose(
        squares.squares, J.square().sum(0), rtol=1e-10, atol=1e-20
    )
    assert (squares.data_points, squares.normaliser) == (len(J), problem.normaliser)


@pytest.mark.parametrize("held", [1, 4, 7, 100])
@pytest.mark.parametrize("case", ["mlp", "tokens", "branches"])
def test_a_gram_matrix_does_not_depend_on_how_many_rows_are_held(case, held):
    module, problem = loaded(case)
    if case == "branches":
        parts = [
            torch.autograd.grad(
                F.cross_entropy(module(a[None]), b[None]), list(module.parameters())
            )
            for a, b in zip(*CASES[case][1:3], strict=True)
        ]
        J = torch.stack([torch.cat([p.flatten() for p in part]) for part in parts])
    else:
        J, _ = reference(case, module)
    found = drain(gradient_gram(points_of(problem), rows=3, held=held))
    np.testing.assert_allclose(found.gram, J @ J.T, rtol=1e-10, atol=1e-11)


def test_a_gram_matrix_that_is_stopped_is_of_the_first_data_points():
    module, problem = loaded("mlp")
    J, _ = reference("mlp", module)
    for held in (3, 100):
        found = drain(gradient_gram(points_of(problem, limit=5), rows=3, held=held))
        assert found.stopped is Stop.PRODUCTS and len(found.gram)
        known = J[: len(found.gram)]
        np.testing.assert_allclose(found.gram, known @ known.T, rtol=1e-10)


def test_a_product_that_is_stopped_is_of_the_first_rows():
    module, problem = loaded("mlp")
    J, _ = reference("mlp", module)
    V, W = columns((1, J.shape[1])), columns((1, len(J)), seed=1)
    few = product(problem, V, limit=5)
    np.testing.assert_allclose(few.result, V @ J[:5].T, rtol=1e-10)
    some = product(problem, W, limit=5, transposed=True)
    assert some.result.isnan().all(), "a part of a sum is no sum"
    whole = product(problem, W, limit=len(J), transposed=True)
    np.testing.assert_allclose(whole.result, W @ J, rtol=1e-10)
    assert few.stopped is some.stopped is Stop.PRODUCTS


def test_no_columns_are_no_work():
    _, problem = loaded("tokens")
    size = problem.layout.size
    found = product(problem, columns((0, size)), of="outputs")
    assert found.result.shape == (0, 10 * 3 * 5) and found.row_shape == (3, 5)
    assert product(problem, columns((0, 10)), transposed=True).result.shape == (0, size)


def test_float32_is_right_to_its_rounding():
    module, problem = loaded("mlp", Dtype.FLOAT32)
    J, _ = reference("mlp", module)
    V = columns((2, J.shape[1]))
    found = product(problem, V.float()).result
    np.testing.assert_allclose(found, V @ J.T, rtol=1e-4, atol=1e-5)


def test_a_plan_that_differs_from_the_backward_pass_is_not_taken(monkeypatch):
    module, problem = loaded("mlp")
    J, _ = reference("mlp", module)
    V = columns((2, J.shape[1]))
    right = Jacobian._forward
    monkeypatch.setattr(Jacobian, "_forward", lambda *a: 1.001 * right(*a))
    jacobian = Jacobian(problem, JacobianOf.LOSSES)
    batch = problem.data[0]
    found = jacobian.push(batch, V)
    np.testing.assert_allclose(found, J[: len(batch.targets)] @ V.T, rtol=1e-10)
    assert jacobian.plans["push"] != "forward"
    monkeypatch.setattr(Jacobian, "_transposed", lambda *a: 1.001 * right(*a))
    with pytest.raises(CurvatureUnverified, match="differs from the backward pass"):
        Jacobian(problem, JacobianOf.OUTPUTS).push(batch, V)


def test_rows_that_are_much_slower_are_tried_on_a_few_data_points_only(monkeypatch):
    module, problem = loaded("images")
    J, _ = reference("images", module)
    batch, seen = problem.data[0], []
    right = Jacobian._rows_times

    def slow(self, batch, V):
        seen.append(len(batch.targets))
        return right(self, batch, V)

    def seconds(plan, batch, operand):
        return (5.0 if plan.__name__ == "slow" else 1.0), plan(batch, operand)

    monkeypatch.setattr(Jacobian, "_rows_times", slow)
    monkeypatch.setattr(jacobian_module, "_timed", seconds)
    V = columns((1, J.shape[1]))
    found = Jacobian(problem, JacobianOf.LOSSES).push(batch, V)
    np.testing.assert_allclose(found, J[:4] @ V.T, rtol=1e-10)
    assert seen == [1]


def test_what_cannot_be_vectorised_is_multiplied_all_the_same():
    _, problem = loaded("branches")
    size = problem.layout.size
    dense = product(problem, torch.eye(size, dtype=torch.float64)).result.T
    pulled = product(problem, torch.eye(10, dtype=torch.float64), transposed=True)
    np.testing.assert_allclose(dense, pulled.result, rtol=1e-10, atol=1e-12)


def test_an_unknown_parameter_is_refused():
    _, problem = loaded("mlp")
    with pytest.raises(InvalidSpec, match="no parameter 'none'"):
        drain(rows_of_points(points_of(problem), JacobianOf.LOSSES, ("none",)))


def placed(case):
    """The module, and the problem where the test computes, in float32."""
    make, x, y, loss, _ = CASES[case]
    torch.manual_seed(0)
    module = make().double().eval()
    spec = DatasetSpec(inputs=("x",), target="y", batch_size=4)
    arrays = {"x": x.numpy(), "y": y.numpy()}
    options = {"dtype": Dtype.FLOAT32, "device": here()}
    return module, Problem.load(module, {}, arrays, spec, LossSpec(**loss), **options)


@everywhere
@pytest.mark.parametrize("case", ["mlp", "images"])
def test_jacobians_multiply_on_every_device(case):
    module, problem = placed(case)
    J, Z = reference(case, module)
    for of, rows in (("losses", J), ("outputs", Z)):
        V, W = columns((2, J.shape[1])), columns((2, len(rows)), seed=1)
        pushed = product(problem, V.float().to(problem.device), of=of).result
        assert pushed.device.type == problem.device.type
        np.testing.assert_allclose(pushed.cpu(), V @ rows.T, rtol=1e-3, atol=1e-3)
        w = W.float().to(problem.device)
        pulled = product(problem, w, of=of, transposed=True).result
        np.testing.assert_allclose(pulled.cpu(), W @ rows, rtol=1e-3, atol=1e-3)
    points = points_of(problem)
    gram = drain(gradient_gram(points, rows=3, held=5)).gram
    np.testing.assert_allclose(gram, J @ J.T, rtol=1e-3, atol=1e-3)
    squares = drain(gradient_squares(points, rows=3)).squares
    np.testing.assert_allclose(squares.cpu(), J.square().sum(0), rtol=1e-3, atol=1e-4)


@everywhere
def test_influence_and_laplace_are_computed_on_every_device():
    module, problem = placed("mlp")
    J, Z = reference("mlp", module)
    points, rows = points_of(problem), [9, 2, 5]
    G = drain(gradients_of(points, problem, rows))
    np.testing.assert_allclose(G.cpu(), J[rows], rtol=1e-3, atol=1e-4)
    scores = drain(Scores(points, problem, 3).along(G))
    np.testing.assert_allclose(scores.cpu(), J[rows] @ J.T, rtol=1e-3, atol=1e-3)
    part = next(points.parts(4))
    z, R = drain(output_rows(points, OutputRows(problem), part))
    assert z.device.type == R.device.type == problem.device.type
    np.testing.assert_allclose(R.cpu().flatten(0, 1), Z[:12], rtol=1e-3, atol=1e-4)
    noise = drain(noise_of(points, problem, range(2), seed=1, rows=3))
    assert noise.shape == (2, problem.layout.size) and noise.isfinite().all()
    few = part_of(problem, 6, seed=0)
    assert sum(len(b.targets) for b in few.data) == 6 == few.normaliser
    likelihood = likelihood_of(problem, 1.0)
    total, _ = drain(log_likelihood(points, likelihood, 3))
    x, y = CASES["mlp"][1:3]
    expected = -F.cross_entropy(module(x), y, reduction="sum").item()
    assert total == pytest.approx(expected, rel=1e-4)
    other = with_data(problem, {"x": x[:3].numpy(), "y": y[:3].numpy()})
    alone = on_inputs(problem, {"x": x[:3].numpy()})
    for problem in (other, alone):
        outputs = problem.outputs(problem.parameters, problem.data[0])
        np.testing.assert_allclose(
            outputs.detach().cpu(), module(x[:3]).detach(), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("case", ["mlp", "tokens", "images", "branches", "misled"])
def test_rows_of_outputs_are_right_whether_they_can_be_vectorised_or_not(case):
    module, problem = loaded(case)
    x = CASES[case][1]
    rows = OutputRows(problem)
    z, R = rows(problem.data[0])
    assert rows.vectorised is (case != "branches")
    outputs = module(x[:4])
    np.testing.assert_allclose(z, outputs.detach(), rtol=1e-12)
    for n, row in enumerate(outputs.reshape(4, -1)):
        for c, value in enumerate(row):
            grads = torch.autograd.grad(
                value, list(module.parameters()), retain_graph=True, allow_unused=True
            )
            parts = [
                torch.zeros_like(p) if g is None else g
                for g, p in zip(grads, module.parameters(), strict=True)
            ]
            expected = torch.cat([p.flatten() for p in parts])
            np.testing.assert_allclose(R[n, c], expected, rtol=1e-9, atol=1e-12)
