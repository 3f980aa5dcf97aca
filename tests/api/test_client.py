"""Both clients, every call, against a server whose Hessian is known."""

import gc
import weakref

import numpy as np
import pytest
from support.fake_service import (
    GRADIENT,
    INFO,
    LAYOUT,
    LOSS,
    MATRIX,
    P,
    operator_matrix,
)

import curvd
from curvd._calls import curvature_requests

RNG = np.random.default_rng(0)
STATE = {"0.weight": RNG.standard_normal((3, 8)), "0.bias": np.zeros(3)}
DATA = {"x": RNG.standard_normal((100, 8)), "y": RNG.integers(0, 3, 100)}


def test_server_info_is_what_the_server_says(client):
    assert client.server_info() == INFO


def test_health_follows_the_server(client, service):
    assert client.healthy() is True
    service.serving = False
    assert client.healthy() is False


def test_a_model_is_registered_with_its_builder_and_tensors(client):
    model = client.register_model("mlp", {"widths": [8, 3]}, STATE)
    assert model.spec == curvd.ModelSpec(builder="mlp", config={"widths": [8, 3]})
    assert model.tensors == (
        curvd.TensorInfo("0.weight", "F64", (3, 8)),
        curvd.TensorInfo("0.bias", "F64", (3,)),
    )


def test_a_dataset_of_the_server_is_registered_by_name(client, service):
    dataset = client.register_dataset(
        name="digits", inputs="x", target="y", batch_size=2
    )
    assert dataset.name == "digits"
    assert not service.chunk_bytes
    for wrong in ({}, {"tensors": DATA, "name": "digits"}):
        with pytest.raises(curvd.InvalidSpec, match="give tensors, or the name"):
            client.register_dataset(**wrong, inputs="x", target="y", batch_size=2)


def test_a_dataset_is_registered_with_its_batching(client):
    dataset = client.register_dataset(DATA, inputs=["x"], target="y", batch_size=32)
    assert dataset.data_points == 100
    assert dataset.spec == curvd.DatasetSpec(inputs=("x",), target="y", batch_size=32)


def test_one_input_may_be_given_by_its_name_alone(client):
    dataset = client.register_dataset(DATA, inputs="x", target="y", batch_size=32)
    assert dataset.spec.inputs == ("x",)


@pytest.mark.parametrize(
    "loss",
    [
        "cross_entropy",
        curvd.LossSpec(name=curvd.LossName.CROSS_ENTROPY),
        {"name": "cross_entropy", "reduction": "mean"},
    ],
    ids=["name", "spec", "keywords"],
)
@pytest.mark.parametrize("dtype", ["F64", "float64", np.float64, np.dtype("f8")])
def test_loss_and_dtype_have_several_spellings(client, loss, dtype):
    info = client.create_session("m", "d", loss=loss, dtype=dtype).info
    assert info.loss == curvd.LossSpec(name=curvd.LossName.CROSS_ENTROPY)
    assert info.dtype is curvd.Dtype.FLOAT64


def test_a_session_knows_its_layout_without_a_call(session, service):
    before = len(service.calls)
    H = session.hessian()
    assert H.shape == (P, P)
    assert H.dtype == np.float64
    assert H.layout == session.layout == LAYOUT
    assert H.layout.names == ("0.weight", "0.bias")
    assert len(service.calls) == before


def test_every_option_of_a_session_arrives(client):
    spec = curvd.OperatorSpec(
        kind=curvd.OperatorKind.GGN, block_sizes=(1, 1), damping=0.5
    )
    session = client.create_session(
        "m",
        "d",
        loss="mse",
        dtype="BF16",
        mode="batch_statistics",
        operators=[spec, "fisher"],
        budget_bytes=7,
        lease_s=60,
        name="mine",
    )
    info = session.info
    assert (info.model_id, info.dataset_id, info.name) == ("m", "d", "mine")
    assert (info.dtype, info.mode) == (
        curvd.Dtype.BFLOAT16,
        curvd.Mode.BATCH_STATISTICS,
    )
    assert [o for o, _ in info.operators] == [
        spec,
        curvd.OperatorSpec(kind=curvd.OperatorKind.FISHER),
    ]
    assert (info.budget_bytes, info.expire_time_s) == (7, 61.0)
    assert session.hessian().dtype == np.float32


def test_validate_only_creates_nothing(client, service):
    session = client.create_session("m", "d", loss="mse", validate_only=True)
    assert session.id == ""
    assert service.sessions == {}


def test_sessions_are_found_listed_page_by_page_and_renewed(client, service):
    made = [client.create_session("m", "d", loss="mse", name=n) for n in "abc"]
    service.page_size = 2
    assert [s.name for s in client.sessions()] == ["a", "b", "c"]
    found = client.session(made[1].id)
    assert found.info == made[1].info
    assert found.renew(lease_s=9).expire_time_s == 10.0
    assert made[1].refresh().expire_time_s == 10.0


def test_models_and_datasets_are_listed_page_by_page(client, service):
    service.page_size = 2
    models = [
        client.register_model("mlp", {"widths": [8, n]}, STATE) for n in (1, 2, 3)
    ]
    data = {"x": np.ones((4, 8)), "y": np.zeros(4)}
    datasets = [
        client.register_dataset(
            {**data, "x": data["x"] * n}, inputs="x", target="y", batch_size=2
        )
        for n in (1, 2, 3)
    ]
    assert client.models() == models
    assert client.datasets() == datasets


def test_a_with_block_deletes_its_session(client, service):
    with client.create_session("m", "d", loss="mse"):
        assert len(service.sessions) == 1
    assert service.sessions == {}


def test_a_with_block_does_not_mind_that_the_session_is_gone(client, service):
    with client.create_session("m", "d", loss="mse"):
        service.sessions.clear()


def test_products_are_those_of_the_matrix(session):
    H = session.hessian()
    v, V = RNG.standard_normal(P), RNG.standard_normal((P, 5))
    np.testing.assert_allclose(H @ v, MATRIX @ v)
    np.testing.assert_allclose(H @ V, MATRIX @ V)
    np.testing.assert_allclose(H.matvec(v), MATRIX @ v)
    np.testing.assert_allclose(H.matmat(V), MATRIX @ V)
    np.testing.assert_allclose(v @ H, MATRIX @ v)
    np.testing.assert_allclose(V.T @ H, V.T @ MATRIX)


def test_lists_and_dicts_of_parameters_come_back_as_they_went(session):
    H = session.hessian()
    V = RNG.standard_normal((P, 2))
    leaves = [V[:24].reshape(3, 8, 2), V[24:]]
    product = MATRIX @ V
    answer = H @ leaves
    assert isinstance(answer, list)
    np.testing.assert_allclose(answer[0], product[:24].reshape(3, 8, 2))
    np.testing.assert_allclose(answer[1], product[24:])
    named = H @ {"0.bias": leaves[1], "0.weight": leaves[0]}
    assert list(named) == ["0.bias", "0.weight"]
    np.testing.assert_allclose(named["0.weight"], answer[0])


def test_no_columns_is_a_product_too(session):
    assert (session.hessian() @ np.zeros((P, 0))).shape == (P, 0)


@pytest.mark.parametrize("columns", [1, 2, 5, 9])
def test_blocks_of_columns_come_in_order(session, columns):
    V = RNG.standard_normal((P, 5))
    H = session.hessian()
    blocks = list(H.iter_matmat(V, columns=columns))
    assert [b.shape[1] for b in blocks][:-1] == [columns] * (len(blocks) - 1)
    np.testing.assert_allclose(np.concatenate(blocks, axis=1), MATRIX @ V)
    assert H.last.version == 1


def test_operators_carry_their_kind_blocks_damping_and_scale(session, service):
    v = RNG.standard_normal(P)
    H = session.hessian(block_sizes=[1, 1], damping=0.5, scale=2.0)
    np.testing.assert_allclose(H @ v, operator_matrix(H.spec) @ v)
    for operator in (
        session.ggn(mc_samples=3, seed=1),
        session.fisher(seed=2),
        session.empirical_fisher(damping=1.0),
    ):
        operator @ v
        sent = service.calls[-1][1].operator
        assert curvd.contract.convert.operator_from_proto(sent) == operator.spec


def test_a_result_says_where_it_comes_from(session):
    H = session.hessian()
    assert H.last is None
    H @ np.ones(P)
    assert (H.last.version, H.last.plan.mode, H.last.runs) == (1, "known_matrix", 1)


@pytest.mark.parametrize("layout", ["flat", "list", "dict"])
def test_the_gradient_comes_in_the_chosen_layout(session, layout):
    loss, gradient = session.gradient(layout=layout)
    assert loss == LOSS == session.last.loss
    pieces = {"flat": [gradient], "list": gradient}.get(layout) or gradient.values()
    np.testing.assert_array_equal(np.concatenate([p.ravel() for p in pieces]), GRADIENT)


def test_an_update_makes_a_new_version(session):
    assert session.update_parameters({"0.bias": np.ones(3)}, expected_version=1) == 2
    assert session.info.version == 2
    assert session.info.operators == ()
    session.hessian(expected_version=2) @ np.ones(P)


def test_a_product_of_another_version_is_refused(session):
    H = session.hessian(expected_version=4)
    with pytest.raises(curvd.VersionMismatch, match="expected version 4") as caught:
        H @ np.ones(P)
    assert caught.value.metadata == {"expected": "4", "current": "1"}
    with pytest.raises(curvd.VersionMismatch, match="session is at 1"):
        session.gradient(expected_version=4)
    with pytest.raises(curvd.VersionMismatch, match="session is at 1"):
        session.update_parameters({"0.bias": np.ones(3)}, expected_version=4)


def test_an_unknown_session_is_not_found(client):
    with pytest.raises(curvd.SessionNotFound, match="no session 'nowhere'"):
        client.session("nowhere")


def test_deleting_twice_is_an_error_unless_the_first_answer_was_lost(session, service):
    session.delete()
    with pytest.raises(curvd.SessionNotFound):
        session.delete()


def test_a_closed_client_says_so(connect, target):
    with connect(target) as client:
        pass
    with pytest.raises(curvd.Cancelled, match="is closed"):
        client.server_info()


@pytest.mark.parametrize("target", [None, "", 50551, b"localhost:1"])
def test_what_names_no_server_is_refused_at_once(connect, target):
    with pytest.raises(curvd.InvalidSpec, match="'host:port' or 'unix:/path', got"):
        connect(target)


def test_a_session_in_place_of_its_id_is_refused(client, session):
    with pytest.raises(curvd.InvalidSpec, match=r"got a \w*Session: pass session\.id"):
        client.session(getattr(session, "inner", session))
    with pytest.raises(curvd.InvalidSpec, match="a string, got a NoneType"):
        client.session(None)


def test_wrong_vectors_are_refused_before_a_byte_is_sent(session, service):
    before = len(service.calls)
    H = session.hessian()
    with pytest.raises(curvd.InvalidVector, match=r"\[26\]; expected \[27\]"):
        H @ np.ones(26)
    with pytest.raises(curvd.InvalidVector, match="matvec takes one vector"):
        H.matvec(np.ones((P, 2)))
    with pytest.raises(curvd.InvalidVector, match="matmat needs a column axis"):
        H.matmat(np.ones(P))
    with pytest.raises(curvd.InvalidSpec, match="columns must be a whole number"):
        list(H.iter_matmat(np.ones((P, 2)), columns=0))
    for wrong in (2.5, "2", None, True):
        with pytest.raises(curvd.InvalidSpec, match=f"whole number.*got {wrong!r}"):
            list(H.iter_matmat(np.ones((P, 2)), columns=wrong))
    blocks = list(H.iter_matmat(np.ones((P, 3)), columns=np.int64(2)))
    assert [block.shape for block in blocks] == [(P, 2), (P, 1)]
    before = len(service.calls)
    with pytest.raises(curvd.InvalidSpec, match="block_sizes sum to 3"):
        session.hessian(block_sizes=[1, 2])
    with pytest.raises(curvd.InvalidSpec, match="unknown layout 'tree'"):
        session.gradient(layout="tree")
    assert len(service.calls) == before


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"loss": "hinge"}, "unknown loss 'hinge'; known: cross_entropy"),
        ({"loss": {"nom": "mse"}}, "nom"),
        ({"dtype": "F16"}, "unknown dtype 'F16'; known: F32, F64, BF16"),
        ({"mode": "train"}, "unknown mode 'train'; known: eval"),
        ({"operators": ["shampoo"]}, "unknown operator 'shampoo'"),
        ({"lease_s": 0}, "lease_s must be positive"),
    ],
)
def test_wrong_options_are_refused_before_a_byte_is_sent(client, service, wrong, text):
    with pytest.raises(curvd.InvalidSpec, match=text):
        client.create_session("m", "d", **{"loss": "mse", **wrong})
    assert service.calls == []


def test_the_repr_of_everything_helps(client, session):
    assert "127.0.0.1" in repr(getattr(client, "inner", client))
    assert "P=27 N=100 F64" in repr(getattr(session, "inner", session))
    H = session.hessian()
    assert "hessian, [27, 27] float64" in repr(getattr(H, "inner", H))


@pytest.mark.parametrize("small", [-1, 1 << 20])
@pytest.mark.parametrize("what", ["vector", "columns", "gradient", "blocks"])
def test_results_are_freed_when_the_caller_lets_go(session, what, small, monkeypatch):
    """No reference cycle: results may be gigabytes."""
    monkeypatch.setattr(curvature_requests, "SMALL_BYTES", small)
    H = session.hessian()
    gc.collect()
    gc.disable()
    try:
        match what:
            case "vector":
                result = H @ np.ones(P)
            case "columns":
                result = H @ np.ones((P, 3))
            case "gradient":
                result = session.gradient()[1]
            case "blocks":
                result = next(iter(list(H.iter_matmat(np.ones((P, 2))))))
        while isinstance(result, memoryview) or result.base is not None:
            # Views come and go; the memory counts.
            result = result.obj if isinstance(result, memoryview) else result.base
        alive = weakref.ref(result)
        del result
        assert alive() is None
    finally:
        gc.enable()
