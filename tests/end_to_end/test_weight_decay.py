"""A penalty on parameters: against differences of the objective as a user writes it."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from support.differences import central, draw, labels, relative, seeded  # noqa: E402
from torch import nn  # noqa: E402

import curvd  # noqa: E402
from curvd_server.app import serve_in_thread  # noqa: E402
from curvd_server.config import ServerConfig  # noqa: E402

X, Y = draw(7, 4), labels(3, 7)
# With CURVD_TEST_DEVICES workers compute, which time their plans all the same.
pytestmark = pytest.mark.usefixtures("untimed")

DECAY = {"2.*": 0.05, "*.weight": 0.3}


def net():
    return seeded(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh())
    )


def coefficient(name):
    return 0.05 if name.startswith("2.") else 0.3 if name.endswith("weight") else 0.0


def objective(module):
    penalty = sum(
        coefficient(name) / 2 * p.square().sum()
        for name, p in module.named_parameters()
    )
    return F.cross_entropy(module(X), Y) + penalty


def gradient(module):
    rows = torch.autograd.grad(objective(module), list(module.parameters()))
    return nn.utils.parameters_to_vector(rows)


def diagonal(module):
    return np.concatenate([
        np.full(p.numel(), coefficient(name)) for name, p in module.named_parameters()
    ])


@pytest.fixture(scope="module")
def opened(live_target):
    module = net()
    with (
        curvd.connect(live_target) as client,
        client.session_for(
            module, nn.CrossEntropyLoss(), (X, Y), batch_size=3, weight_decay=DECAY
        ) as session,
        client.session_for(
            module, nn.CrossEntropyLoss(), (X, Y), batch_size=3
        ) as plain,
    ):
        yield module, session, plain


def test_loss_gradient_and_hessian_are_those_of_the_penalised_objective(opened):
    module, session, _ = opened
    loss, found = session.gradient()
    assert loss == pytest.approx(objective(module).item(), rel=1e-12)
    np.testing.assert_allclose(found, gradient(module).numpy(), atol=1e-12)
    v = np.random.default_rng(0).standard_normal(session.layout.size)
    moved = copy.deepcopy(module)
    want = central(lambda: gradient(moved), list(moved.parameters()), v, 1e-5)
    assert relative(session.hessian() @ v, want) < 1e-6
    scaled = session.hessian(scale=2.0, damping=0.5) @ v
    assert relative(scaled, 2 * want + 0.5 * v) < 1e-6


@pytest.mark.parametrize("options", [{}, {"block_sizes": [1, 2, 1]}])
def test_hessian_and_ggn_gain_the_diagonal_and_fishers_do_not(opened, options):
    module, session, plain = opened
    eye = np.eye(session.layout.size)
    for kind in ("hessian", "ggn"):
        gain = getattr(session, kind)(**options) @ eye
        gain -= getattr(plain, kind)(**options) @ eye
        np.testing.assert_allclose(gain, np.diag(diagonal(module)), atol=1e-12)
    for kind in ("fisher", "empirical_fisher"):
        one, other = getattr(session, kind)(**options), getattr(plain, kind)(**options)
        np.testing.assert_array_equal(one @ eye, other @ eye)


def test_chosen_parameters_keep_their_own_coefficients(opened):
    _, session, _ = opened
    whole = session.hessian() @ np.eye(session.layout.size)
    rows = np.r_[25:40, 0:20]  # 2.weight, then 0.weight
    part = session.hessian(params=["2.weight", "0.weight"]) @ np.eye(35)
    np.testing.assert_allclose(part, whole[np.ix_(rows, rows)], atol=1e-12)


def test_a_penalised_session_survives_a_restart_and_follows_its_parameters(tmp_path):
    config = ServerConfig(listen="127.0.0.1:0", data_dir=tmp_path)
    module = net()
    with serve_in_thread(config) as target, curvd.connect(target) as client:
        data = (X, Y)
        session = client.session_for(
            module, nn.CrossEntropyLoss(), data, batch_size=7, weight_decay=0.1
        )
        assert session.info.loss.weight_decay == (("*", 0.1),)
        before = session.gradient()[0]
    with serve_in_thread(config) as target, curvd.connect(target) as client:
        session = client.session(session.id)
        assert session.gradient()[0] == before
        zeros = {name: torch.zeros_like(p) for name, p in module.state_dict().items()}
        session.update_parameters(zeros)
        assert session.gradient()[0] == pytest.approx(np.log(3), rel=1e-12)


def test_a_glob_that_matches_nothing_and_a_wrong_coefficient_are_refused(live_target):
    with pytest.raises(curvd.InvalidSpec, match="must be finite and not negative"):
        curvd.LossSpec(name="mse", weight_decay={"*": -1.0})
    with (
        curvd.connect(live_target) as client,
        pytest.raises(curvd.InvalidSpec, match=r"weight_decay: 'wieght' matches none"),
    ):
        client.session_for(
            net(),
            nn.CrossEntropyLoss(),
            (X, Y),
            batch_size=3,
            weight_decay={"wieght": 1.0},
        )
