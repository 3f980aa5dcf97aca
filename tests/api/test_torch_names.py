"""torch's names for what operators do, with both clients, as torch means them."""

import pytest
from support.client_fixtures import Blocking
from support.fake_service import MATRIX

import curvd

torch = pytest.importorskip("torch")

MATRICES = {
    "operator": (lambda H: H, MATRIX),
    "sum": (lambda H: H + H * 2 - H * 0.5, 2.5 * MATRIX),
    "submatrix": (lambda H: H[3:9, 2:7], MATRIX[3:9, 2:7]),
}


def made(kind, H):
    """Write something with an operator of either client."""
    if isinstance(H, Blocking):
        return Blocking(MATRICES[kind][0](H.inner), H.loop)
    return MATRICES[kind][0](H)


@pytest.mark.parametrize("kind", MATRICES)
def test_products_and_shapes_are_those_of_a_matrix(session, kind):
    operator, matrix = made(kind, session.hessian()), torch.tensor(MATRICES[kind][1])
    v = torch.randn(matrix.size(1), dtype=torch.float64)
    V = torch.randn(matrix.size(1), 3, dtype=torch.float64)
    for name, x in (("mv", v), ("mm", V), ("matmul", v), ("matmul", V)):
        product = getattr(operator, name)(x)
        torch.testing.assert_close(product, getattr(matrix, name)(x))
    assert operator.dim() == matrix.dim()
    assert operator.size() == matrix.size()
    assert [operator.size(d) for d in (0, 1, -1)] == [
        matrix.size(d) for d in (0, 1, -1)
    ]


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("name", ["eigvalsh", "inv", "slogdet", "numpy", "eigh"])
def test_what_torch_has_besides_says_what_there_is(session, kind, name):
    operator = made(kind, session.hessian())
    assert hasattr(torch.ones(2, 2), name) or hasattr(torch.linalg, name)
    assert not hasattr(operator, name)
    with pytest.raises(AttributeError, match=rf"has no '{name}': \w+\("):
        getattr(operator, name)
    with pytest.raises(AttributeError, match=r"has no 'nonsense'$"):
        _ = operator.nonsense


def test_an_inverse_is_there_where_it_has_a_closed_form(session):
    with pytest.raises(curvd.InvalidSpec, match="and solve"):
        session.hessian().inverse()


def test_the_norm_is_torchs(tanh_session):
    G = tanh_session.ggn()
    exact = float(torch.linalg.norm(torch.tensor(G.to_dense())))
    found = G.norm(samples=200, relative_error=0.02)
    assert found.value == pytest.approx(exact, abs=2 * found.half_width)
