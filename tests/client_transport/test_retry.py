"""What is safe is repeated, within limits, and never twice what must be once."""

import numpy as np
import pytest
from support.client_fixtures import QUICK
from support.fake_service import MATRIX, P

import curvd
from curvd._transport.retry import RetryPolicy, is_worth_a_retry

AWAY = curvd.Unavailable("away")
V = np.random.default_rng(1).standard_normal((P, 5))


pytestmark = pytest.mark.usefixtures("streams")


def everything(client):
    """Every call there is, and what each must give."""
    data = {"x": np.ones((4, 2)), "y": np.ones((4, 1))}
    model = client.register_model("mlp", {}, {"w": np.ones(3)})
    dataset = client.register_dataset(data, inputs="x", target="y", batch_size=2)
    session = client.create_session(model, dataset, loss="mse", dtype="F64")
    assert [s.id for s in client.sessions()] == [session.id]
    assert client.session(session.id).info == session.info
    assert client.server_info().version == "0.0.0"
    H = session.hessian()
    np.testing.assert_allclose(H @ V[:, 0], MATRIX @ V[:, 0])
    np.testing.assert_allclose(H @ V, MATRIX @ V)
    blocks = list(H.iter_matmat(V, columns=2))
    np.testing.assert_allclose(np.concatenate(blocks, axis=1), MATRIX @ V)
    assert session.gradient()[0] == 0.25
    assert session.update_parameters({"0.bias": np.ones(3)}) == 2
    assert session.renew().version == 2
    session.delete()
    assert client.sessions() == []


RPCS = [
    "RegisterModel", "RegisterDataset", "CreateSession", "GetSession", "ListSessions",
    "GetServerInfo", "MatVec", "MatMat", "Gradient", "UpdateParameters", "RenewSession",
    "DeleteSession",
]  # fmt: skip


@pytest.mark.parametrize("where", ["request", "answer", "sending", "receiving"])
def test_every_call_survives_what_is_lost_anywhere(client, service, where):
    for name in RPCS:
        if where == "request":
            service.fail(name, AWAY)
        elif where == "answer":
            service.fail(name, AWAY, after_out=0)
        elif where == "sending" and name.startswith(("Register", "Update", "Mat")):
            service.fail(name, AWAY, after_in=1)
        elif where == "receiving" and name.startswith(("Mat", "Grad")):
            service.fail(name, AWAY, after_out=3, times=2)
    everything(client)
    assert len(service.uploads) == 3


def test_a_session_is_created_once_however_often_it_is_asked_for(client, service):
    service.fail("CreateSession", AWAY, after_out=0, times=3)
    client.create_session("m", "d", loss="mse")
    assert len(service.sessions) == 1
    assert len({header.request_id for _, header, _ in service.calls}) == 1


def test_so_is_one_whose_opening_is_watched(client, service):
    service.fail("OpenSession", AWAY, after_out=1)
    service.fail("OpenSession", AWAY, after_out=2)
    client.create_session("m", "d", loss="mse", progress=lambda progress: None)
    assert len(service.sessions) == 1
    assert len({header.session.request_id for _, header, _ in service.calls}) == 1


def test_two_sessions_are_two(client, service):
    client.create_session("m", "d", loss="mse")
    client.create_session("m", "d", loss="mse")
    assert len(service.sessions) == 2


def test_blocks_that_were_handed_out_are_not_handed_out_again(client, service):
    session = client.create_session("m", "d", loss="mse", dtype="F64")
    # Columns of 216 bytes in chunks of 100: the stream breaks after two columns.
    service.fail("MatMat", AWAY, after_out=8)
    blocks = list(session.hessian().iter_matmat(V))
    assert len(blocks) == 5
    np.testing.assert_allclose(np.concatenate(blocks, axis=1), MATRIX @ V)
    assert service.calls[-1][1].expected_version == 1


def test_blocks_of_two_versions_are_never_mixed(client, service):
    session = client.create_session("m", "d", loss="mse", dtype="F64")
    service.fail("MatMat", AWAY, after_out=8)
    blocks = session.hessian().iter_matmat(V)
    next(blocks)
    session.update_parameters({"0.bias": np.ones(3)})
    with pytest.raises(curvd.VersionMismatch):
        list(blocks)


@pytest.mark.parametrize(
    "kind", [curvd.InvalidVector, curvd.Internal, curvd.LimitExceeded]
)
def test_what_cannot_help_is_not_repeated(client, service, kind):
    service.fail("GetServerInfo", kind("no"))
    with pytest.raises(kind):
        client.server_info()
    assert service.names() == ["GetServerInfo"]


def test_a_full_queue_is_tried_again_when_the_server_says_when(client, service):
    service.fail(
        "GetServerInfo", curvd.Overloaded("full", retry_after_s=0.001), times=2
    )
    client.server_info()
    assert service.names() == ["GetServerInfo"] * 3
    service.fail("GetServerInfo", curvd.Overloaded("full"))
    with pytest.raises(curvd.Overloaded):
        client.server_info()


def test_zero_patience_never_repeats(connect, target, service):
    service.fail("GetServerInfo", AWAY)
    config = curvd.ClientConfig(retry=curvd.RetryConfig(give_up_s=0))
    with connect(target, config=config) as client:
        with pytest.raises(curvd.Unavailable, match="away"):
            client.server_info()
    assert service.names() == ["GetServerInfo"]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_patience_ends_after_so_long_without_progress():
    clock = Clock()
    config = curvd.ClientConfig(retry=curvd.RetryConfig(first_s=0, longest_s=0))
    policy = RetryPolicy(config, clock)
    assert policy.pause_after(AWAY) == 0
    clock.now += 29
    assert policy.pause_after(AWAY) == 0
    clock.now += 1
    with pytest.raises(curvd.Unavailable, match="away"):
        policy.pause_after(AWAY)
    policy.progressed()
    assert policy.pause_after(AWAY) == 0
    assert policy.timeout() is None


def test_an_attempt_that_took_longer_than_the_patience_is_repeated():
    clock = Clock()
    policy = RetryPolicy(curvd.ClientConfig(), clock)
    for _ in range(3):
        clock.now += 3600  # a long product, or a line that went dead without a word
        assert policy.pause_after(AWAY) >= 0
        policy.progressed()
    clock.now += 40
    assert policy.pause_after(AWAY) >= 0
    clock.now += 40
    with pytest.raises(curvd.Unavailable, match="away"):
        policy.pause_after(AWAY)


def test_the_deadline_bounds_attempts_and_pauses():
    clock = Clock()
    config = curvd.ClientConfig(
        deadline_s=10, retry=curvd.RetryConfig(first_s=0, longest_s=0)
    )
    policy = RetryPolicy(config, clock)
    clock.now += 4
    assert policy.timeout() == 6
    assert policy.pause_after(curvd.Overloaded("", retry_after_s=5)) == 5
    with pytest.raises(curvd.Overloaded):
        policy.pause_after(curvd.Overloaded("", retry_after_s=6))


def test_the_pause_is_random_bounded_and_not_before_the_server_says():
    policy = RetryPolicy(curvd.ClientConfig(), Clock())
    pauses = [policy.pause_after(AWAY) for _ in range(200)]
    assert len(set(pauses)) > 100
    assert 0 <= min(pauses) <= max(pauses) <= 5
    told = curvd.Overloaded("full", retry_after_s=7.0)
    assert all(7 <= policy.pause_after(told) <= 12 for _ in range(50))


def test_a_call_that_goes_another_way_pauses_too_and_gives_up_too():
    clock = Clock()
    policy = RetryPolicy(curvd.ClientConfig(), clock)
    gone = curvd.ResultNotKept("gone")
    assert policy.pause_after(gone, recovers=True) >= 0
    with pytest.raises(curvd.ResultNotKept):
        policy.pause_after(gone)
    clock.now += 31
    with pytest.raises(curvd.ResultNotKept):
        policy.pause_after(gone, recovers=True)


def test_the_reasons_to_repeat_are_two():
    assert is_worth_a_retry(AWAY)
    assert is_worth_a_retry(curvd.Overloaded("", retry_after_s=1))
    assert not is_worth_a_retry(curvd.Overloaded(""))
    assert not is_worth_a_retry(curvd.Internal("", retry_after_s=1))
    assert not is_worth_a_retry(KeyboardInterrupt())


def test_a_retry_is_logged(client, service, caplog):
    service.fail("GetServerInfo", AWAY)
    client.server_info()
    assert [r.message for r in caplog.records] == ["away; again in 0.0 s"]


def test_an_upload_that_gets_nowhere_gives_up(connect, target, service):
    service.fail("RegisterModel", AWAY, times=1000)
    config = curvd.ClientConfig(
        retry=curvd.RetryConfig(first_s=0.001, longest_s=0.001, give_up_s=0.02)
    )
    with connect(target, config=config) as client:
        with pytest.raises(curvd.Unavailable, match="away"):
            client.register_model("mlp", {}, {"w": np.ones(3)})


def test_the_client_of_the_tests_never_pauses():
    assert QUICK.retry.longest_s == 0
