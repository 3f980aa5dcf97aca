"""Vectors that stay on the server, and few bits for those that do not."""

import numpy as np
import pytest
from support.fake_service import MATRIX, P

import curvd
from curvd.tensors.random_probes import probes

V = np.random.default_rng(1).standard_normal((P, 3))


def test_a_vector_is_put_listed_fetched_and_discarded(session):
    stored = session.put("v", V)
    assert (stored.name, stored.shape, stored.version) == ("v", (3, P), 1)
    np.testing.assert_array_equal(session.get(stored), V)
    np.testing.assert_array_equal(session.get("v"), V)
    session.put("one", V[:, 0])
    assert [s.name for s in session.vectors()] == ["v", "one"]
    np.testing.assert_array_equal(session.get("one"), V[:, 0])
    session.discard(stored)
    with pytest.raises(curvd.VectorNotFound, match="no vector 'v'; known: 'one'"):
        session.get("v")
    with pytest.raises(curvd.VectorNotFound):
        session.discard("v")


def test_a_chain_moves_nothing_but_the_end(session, service):
    H = session.hessian()
    v = session.put("v", V)
    w = H.multiply(v, store="w")
    assert (w.name, w.shape, w.version) == ("w", (3, P), 1)
    sent = service.sent_bytes
    x = H.multiply(w, store="x")
    assert service.sent_bytes == sent
    np.testing.assert_allclose(session.get(x), MATRIX @ MATRIX @ V)
    assert H.last.version == 1


def test_an_operand_by_reference_comes_back_columns_last(session):
    H, v = session.hessian(), session.put("v", V)
    np.testing.assert_allclose(H @ v, MATRIX @ V)
    probe = session.probe("rademacher", seed=3, columns=2)
    columns = probes("rademacher", 3, range(2), P)
    np.testing.assert_allclose(H @ probe, MATRIX @ columns.T)
    np.testing.assert_allclose(H @ session.probe(seed=3), MATRIX @ columns[0])


@pytest.mark.parametrize(("wire", "digits"), [("BF16", 8), ("F16", 11)])
def test_few_bits_both_ways(session, wire, digits):
    product = session.hessian().multiply(V, wire=wire)
    exact = MATRIX @ V
    assert np.abs(product - exact).max() < 4 * np.abs(exact).max() * 2.0**-digits
    assert product.dtype == np.float64
    session.put("v", V, wire=wire)
    assert np.abs(session.get("v") - V).max() < 4 * 2.0**-digits
    assert np.abs(session.get("v", wire=wire) - V).max() < 4 * 2.0**-digits


@pytest.mark.parametrize("streamed", [False, True])
def test_an_operand_too_large_for_few_bits_is_named(session, request, streamed):
    if streamed:
        request.getfixturevalue("streams")
    with pytest.raises(curvd.InvalidSpec, match="does not fit F16"):
        session.hessian().multiply(V * 1e6, wire="F16")


def test_wrong_wishes_are_refused_before_a_byte_is_sent(session, service):
    before, H = len(service.calls), session.hessian()
    with pytest.raises(curvd.InvalidSpec, match="wire='F8' is not offered; known: F64"):
        H.multiply(V, wire="F8")
    with pytest.raises(curvd.InvalidSpec, match="needs a name"):
        H.multiply(V, store="")
    with pytest.raises(curvd.InvalidSpec, match="at least 1 column"):
        session.probe(columns=0)
    with pytest.raises(curvd.InvalidSpec, match=r"must be in \[0, 2\*\*63\)"):
        session.probe(seed=-1)
    with pytest.raises(curvd.InvalidSpec, match="unknown distribution"):
        session.probe("cauchy")
    assert len(service.calls) == before


def test_a_discard_whose_answer_is_lost_is_done(session, service):
    session.put("v", V)
    service.fail("DeleteVector", curvd.Unavailable("away"), after_out=0)
    session.discard("v")
    assert session.vectors() == []
