"""curvlinops' and SciPy's own algorithms run on a remote operator unchanged."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from curvd.integrations.curvlinops import to_curvlinops

curvlinops = pytest.importorskip("curvlinops")


@pytest.fixture(scope="module")
def dense(tanh_session):
    H = tanh_session.ggn()
    return H @ np.eye(H.shape[0])


def test_curvlinops_takes_it_for_one_of_its_own(tanh_session, dense):
    operator = to_curvlinops(tanh_session.ggn())
    assert operator.shape == dense.shape
    v = torch.randn(dense.shape[0], 2, dtype=torch.float64)
    np.testing.assert_allclose(operator @ v, dense @ v.numpy(), atol=1e-12)
    parts = [torch.randn(s, dtype=torch.float64) for s in tanh_session.layout.shapes]
    product = operator @ parts
    assert [tuple(p.shape) for p in product] == list(tanh_session.layout.shapes)
    twice = operator + operator
    np.testing.assert_allclose(twice @ v, 2 * dense @ v.numpy(), atol=1e-12)


def test_curvlinops_estimators_run_on_it(tanh_session, dense):
    operator, size = to_curvlinops(tanh_session.ggn()), dense.shape[0]
    torch.manual_seed(0)
    exact = np.trace(dense)
    assert float(curvlinops.hutchinson_trace(operator, size - 1)) == pytest.approx(
        exact, rel=0.5
    )
    assert float(
        curvlinops.hutchpp_trace(operator, 3 * (size // 3 - 1))
    ) == pytest.approx(exact, rel=0.3)
    assert float(curvlinops.xtrace(operator, 2 * (size // 2 - 1))) == pytest.approx(
        exact, rel=0.3
    )
    diagonal = curvlinops.xdiag(operator, 2 * (size // 2 - 1))
    np.testing.assert_allclose(
        diagonal, np.diag(dense), atol=0.1 * np.diag(dense).max()
    )
    square = float(curvlinops.hutchinson_squared_fro(operator, size - 1))
    assert square == pytest.approx(np.sum(dense**2), rel=0.6)


def test_curvlinops_inverses_and_scipy_run_on_it(tanh_session, dense):
    size = dense.shape[0]
    damped = to_curvlinops(tanh_session.ggn(damping=0.5))
    inverse = curvlinops.CGInverseLinearOperator(damped, tolerance=1e-10, eps=1e-40)
    b = torch.ones(size, dtype=torch.float64)
    exact = np.linalg.solve(dense + 0.5 * np.eye(size), b.numpy())
    np.testing.assert_allclose(inverse @ b, exact, rtol=1e-6)
    values = scipy.sparse.linalg.eigsh(damped.to_scipy(), k=2, which="LA")[0]
    np.testing.assert_allclose(values, np.linalg.eigvalsh(dense)[-2:] + 0.5, rtol=1e-8)
    ours = tanh_session.ggn(damping=0.5).to_scipy()
    x, status = scipy.sparse.linalg.cg(ours, b.numpy(), rtol=1e-10)
    assert status == 0
    np.testing.assert_allclose(x, exact, rtol=1e-6)
