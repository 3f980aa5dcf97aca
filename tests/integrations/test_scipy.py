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


TYPES = [bool, "u1", "i1", "i8", "f2", "f4", "f8", np.longdouble]


@pytest.mark.parametrize("given", TYPES, ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_have_the_values_and_the_type_of_scipys_own(operator, dtype, given):
    A = operator.to_scipy(dtype)
    theirs = scipy_linalg.aslinearoperator(MATRIX.astype(dtype))
    assert (A.shape, A.dtype) == (theirs.shape, theirs.dtype)
    x = (np.arange(P) % 3).astype(given)
    doors = (lambda A, x: A @ x, lambda A, x: A.T @ x, lambda A, x: (A + A) @ x)
    for operand in (x, x[:, None], np.stack([x, 2 * x, x], 1)):
        for door in doors:
            product, right = door(A, operand), door(theirs, operand)
            assert product.dtype == np.result_type(dtype, operand.dtype)
            np.testing.assert_allclose(product, right, rtol=1e-4, atol=1e-4)


def test_sums_and_submatrices_take_integers(operator):
    whole = operator.to_dense()
    total = (operator + 2 * curvd.Identity()).to_scipy()
    block = operator[[0, 4, 5], 2:9].to_scipy()
    np.testing.assert_allclose(
        total @ np.arange(P), whole @ np.arange(P) + 2 * np.arange(P), rtol=1e-5
    )
    found = block @ np.arange(7)
    assert found.dtype == np.float64
    np.testing.assert_allclose(
        found, whole[[0, 4, 5], 2:9] @ np.arange(7), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        block.T @ np.arange(3),
        whole[[0, 4, 5], 2:9].T @ np.arange(3),
        rtol=1e-4,
        atol=1e-5,
    )


def test_an_operator_in_integers_is_refused(operator):
    with pytest.raises(curvd.InvalidSpec, match="floating type, got int64"):
        operator.to_scipy(int)


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
