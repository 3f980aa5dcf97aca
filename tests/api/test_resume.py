"""What has arrived of a result is not fetched again, and what is damaged is."""

import numpy as np
import pytest
from support.fake_service import GRADIENT, MATRIX, P

import curvd

AWAY = curvd.Unavailable("away")
V = np.random.default_rng(1).standard_normal((P, 5))
VECTOR_BYTES, COLUMNS_BYTES = P * 8, P * 5 * 8
CHUNK, LAST = 100, 16

pytestmark = pytest.mark.usefixtures("streams")


def test_a_vector_goes_on_at_its_byte_and_its_operand_is_not_sent_again(
    session, service
):
    service.fail("MatVec", AWAY, after_out=4)  # header, file's header, two chunks
    same(session.hessian() @ V[:, 0], V[:, 0] @ MATRIX)
    assert service.sent_bytes == VECTOR_BYTES + LAST  # the last was lost on its way
    first, again = [h for name, h, _ in service.calls if name == "MatVec"]
    assert again.resume.offset == 2 * CHUNK
    assert first.request_id == again.request_id
    assert service.chunk_bytes["MatVec"] == file_bytes(V[:, 0])


def test_an_answer_that_is_lost_is_asked_for_without_the_operand(session, service):
    service.fail("MatVec", AWAY, after_out=0)
    same(session.hessian() @ V[:, 0], V[:, 0] @ MATRIX)
    assert service.chunk_bytes["MatVec"] == file_bytes(V[:, 0])


def test_a_server_that_forgot_gets_the_operand_again_and_goes_on_nevertheless(
    session, service
):
    service.keeps = False
    service.fail("MatVec", AWAY, after_out=4)
    same(session.hessian() @ V[:, 0], V[:, 0] @ MATRIX)
    assert service.names().count("MatVec") == 3  # broken, forgotten, whole
    assert service.sent_bytes == VECTOR_BYTES + LAST
    assert service.chunk_bytes["MatVec"] == 2 * file_bytes(V[:, 0])


def test_a_result_that_was_computed_otherwise_is_fetched_from_the_beginning(
    session, service
):
    H = session.hessian()
    service.fail("MatVec", AWAY, after_out=4)
    changed = MATRIX[0] * 2

    def change():
        for key in service.kept:
            service.kept[key] = changed

    original = service._multiply

    def multiply(*args):
        if service.kept:
            change()
        yield from original(*args)

    service._multiply = multiply
    same(H @ V[:, 0], changed)


def test_columns_go_on_at_the_first_that_is_missing(session, service):
    service.fail("MatMat", AWAY, after_out=8)  # six chunks of 100: two columns of 216
    same(session.hessian() @ V, (V.T @ MATRIX).T)
    first, again = [h for name, h, _ in service.calls if name == "MatMat"]
    assert again.request_id == f"{first.request_id}.2"
    assert again.expected_version == 1
    assert service.chunk_bytes["MatMat"] == file_bytes(V.T) + file_bytes(V.T[2:])


def test_columns_of_two_versions_are_never_mixed_and_begin_anew(session, service):
    service.fail("MatMat", AWAY, after_out=8)
    original = service._multiply

    def multiply(*args):
        yield from original(*args)

    def check(request, info):
        if request.HasField("expected_version") and request.expected_version != 2:
            raise curvd.VersionMismatch("moved on")

    service._multiply, service._check_version = multiply, check
    same(session.hessian() @ V, (V.T @ MATRIX).T)
    headers = [h for name, h, _ in service.calls if name == "MatMat"]
    assert [h.HasField("expected_version") for h in headers] == [False, True, False]
    assert headers[2].request_id == headers[0].request_id


def test_a_version_that_the_caller_wants_stays_an_error(session, service):
    with pytest.raises(curvd.VersionMismatch):
        session.hessian(expected_version=7) @ V


def test_all_columns_but_no_summary_costs_no_column(session, service):
    service.fail("MatMat", AWAY, after_out=2 + -(-COLUMNS_BYTES // CHUNK))
    same(session.hessian() @ V, (V.T @ MATRIX).T)
    assert service.sent_bytes == COLUMNS_BYTES


def test_probes_go_on_too(session, service):
    service.fail("MatMat", AWAY, after_out=8)
    product = session.hessian().multiply(session.probe(seed=3, columns=5, first=7))
    columns = np.asarray(
        curvd.tensors.random_probes.probes("rademacher", 3, range(7, 12), P)
    )
    np.testing.assert_allclose(product, (columns @ MATRIX).T)
    again = service.calls[-1][1].operand.probe
    assert (again.first_index, again.columns) == (9, 3)


def test_gradients_go_on(session, service):
    service.fail("Gradient", AWAY, after_out=3)
    same(session.gradient()[1], GRADIENT)
    assert service.sent_bytes == GRADIENT.nbytes + CHUNK


@pytest.mark.parametrize("wire", ["BF16", "F16"])
def test_few_bits_go_on_too(session, service, wire):
    whole = session.hessian().multiply(V[:, 0], wire=wire)
    service.chunk, service.sent_bytes = 20, 0
    service.fail("MatVec", AWAY, after_out=4)
    same(session.hessian().multiply(V[:, 0], wire=wire), whole)
    assert service.sent_bytes == P * 2 + 14


def test_what_is_taken_up_is_checked_and_what_is_damaged_begins_anew(session, service):
    service.fail("MatVec", AWAY, after_out=4)
    service.damage.append(1)
    same(session.hessian() @ V[:, 0], V[:, 0] @ MATRIX)
    names = service.names()
    assert names.count("MatVec") == 3
    assert not service.calls[-1][1].HasField("resume")


def test_whoever_wants_it_has_every_result_checked(session, service):
    service.damage.append(1)
    product = session.hessian().multiply(V[:, 0], verify=True)
    same(product, V[:, 0] @ MATRIX)
    assert service.names().count("MatVec") == 2


def test_a_server_that_leaves_out_what_nobody_has_breaks_the_contract(session, service):
    original = service._result

    def result(*args, **extra):
        for part in original(*args, **extra):
            if not isinstance(part, memoryview) and part.HasField("header"):
                part.header.offset = 8
            yield part

    service._result = result
    with pytest.raises(curvd.Internal, match="leaves out 8 bytes"):
        session.hessian() @ V[:, 0]
    with pytest.raises(curvd.Internal, match="leaves out 8 bytes"):
        session.hessian() @ V


def same(result, expected):
    """Equal up to the order in which NumPy sums."""
    np.testing.assert_allclose(result, expected, rtol=1e-12)


def file_bytes(array):
    """Of its safetensors file."""
    from curvd.tensors import chunks as wire

    return sum(c.nbytes for c in wire.chunks({"v": np.ascontiguousarray(array)}))
