"""The remote operator in SciPy's hands."""

import sys

import numpy as np
import pytest
from support.fake_service import MATRIX, P

import curvd

scipy_linalg = pytest.importorskip("scipy.sparse.linalg")


@pytest.fixture(params=["F32", "F64"])
def operator(request, target):
    with curvd.connect(target) as client:
        yield client.create_session("m", "d", loss="mse", dtype=request.param).hessian()


def test_eigsh_finds_the_eigenvalues(operator):
    found = scipy_linalg.eigsh(operator.to_scipy(), k=3, v0=np.ones(P), tol=1e-5)[0]
    exact = sorted(np.linalg.eigvalsh(MATRIX), key=abs)[-3:]
    np.testing.assert_allclose(sorted(found), sorted(exact), rtol=1e-4)


def test_operands_are_cast_and_products_cast_back(operator):
    A = operator.to_scipy()
    assert (A.shape, A.dtype) == ((P, P), np.float64)
    for x in (np.ones(P), np.ones((P, 1)), np.ones((P, 3)), np.ones(P, np.float32)):
        product = A @ x
        assert product.dtype == x.dtype
        np.testing.assert_allclose(product, MATRIX @ x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(A.T @ x, product)
    assert operator.to_scipy(np.float32).dtype == np.float32


def test_algebra_is_scipys(operator):
    A = 2 * operator.to_scipy() + scipy_linalg.aslinearoperator(np.eye(P))
    np.testing.assert_allclose(
        A @ np.ones(P), (2 * MATRIX + np.eye(P)) @ np.ones(P), rtol=1e-4
    )


def test_what_would_lose_an_imaginary_part_is_refused(operator):
    with pytest.raises(
        curvd.InvalidVector, match="a product of complex128 is not defined"
    ):
        operator.to_scipy() @ np.ones(P, complex)


def test_without_scipy_the_extra_is_named(operator, monkeypatch):
    monkeypatch.delitem(sys.modules, "curvd.integrations.scipy", raising=False)
    monkeypatch.delattr(curvd, "linop", raising=False)
    for name in [n for n in sys.modules if n.partition(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*'\.\[scipy\]'"):
        operator.to_scipy()
