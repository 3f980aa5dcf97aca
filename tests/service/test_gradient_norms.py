"""Norms of single data points' gradients, asked of a real server by both clients."""

import grpc
import numpy as np
import pytest
import raw
import torch
from click.testing import CliRunner
from support.small_net import data, module, open_session
from torch import nn
from torch.nn import functional as F

import curvd
from curvd.cli.commands import main
from curvd.v1 import query_service_pb2 as query_pb
from curvd_server.app import serve_in_thread
from curvd_server.config import LimitsConfig, ServerConfig


@pytest.fixture(scope="module")
def session(live_target):
    with curvd.connect(live_target) as client, open_session(client) as opened:
        yield opened


@pytest.fixture(scope="module")
def parts():
    """[N, T] norms, one data point and parameter at a time."""
    net, points = module(), data()
    x, y = torch.from_numpy(points["x"]), torch.from_numpy(points["y"])
    rows = []
    for n in range(len(x)):
        loss = F.cross_entropy(net(x[n : n + 1]), y[n : n + 1])
        rows.append([
            g.norm() for g in torch.autograd.grad(loss, list(net.parameters()))
        ])
    return np.array(rows, dtype=np.float64)


def test_norms_and_those_of_parameters_are_exact(session, parts):
    found = session.gradient_norms(by_parameter=True)
    np.testing.assert_allclose(found.norms, np.linalg.norm(parts, axis=1), rtol=1e-10)
    np.testing.assert_allclose(found.parameter_norms, parts, rtol=1e-10)
    assert found.converged and found.products == len(parts)
    assert (found.version, found.info.plan) == (1, None)
    assert session.gradient_norms().parameter_norms is None


def test_a_small_host_goes_through_fewer_rows_at_once(tmp_path):
    net = nn.Sequential(nn.Linear(60, 40), nn.Tanh(), nn.Linear(40, 2)).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 60, generator=generator).double()
    y = torch.randint(2, (300,), generator=generator)
    size = sum(p.numel() for p in net.parameters())
    limits = LimitsConfig(
        memory_bytes=60 * 8 * size
    )  # 2 vectors for each of 256 rows: no
    config = ServerConfig(
        listen="127.0.0.1:0",
        data_dir=tmp_path,
        drain_s=0.0,
        compile_after_s=0,
        limits=limits,
    )
    with serve_in_thread(config) as target, curvd.connect(target) as client:
        with client.session_for(
            net, nn.CrossEntropyLoss(), (x, y), batch_size=150
        ) as own:
            found = own.gradient_norms().norms
    for n in (0, 149, 150, 299):
        loss = F.cross_entropy(net(x[n : n + 1]), y[n : n + 1])
        grads = torch.autograd.grad(loss, list(net.parameters()))
        norm = torch.cat([g.reshape(-1) for g in grads]).norm()
        assert found[n] == pytest.approx(float(norm), rel=1e-10)


def test_their_mean_square_is_the_trace_of_the_empirical_fisher(session):
    dense = session.empirical_fisher() @ np.eye(session.layout.size)
    norms = session.gradient_norms().norms
    assert (norms**2).mean() == pytest.approx(np.trace(dense), rel=1e-9)


async def test_the_asynchronous_client_asks_the_same(session, live_target, parts):
    async with curvd.aio.connect(live_target) as client:
        same = await client.session(session.id)
        found = await same.gradient_norms(by_parameter=True)
        np.testing.assert_allclose(found.parameter_norms, parts, rtol=1e-10)


def test_norms_follow_the_parameters_and_an_old_version_is_refused(live_target):
    with curvd.connect(live_target) as client, open_session(client) as own:
        before = own.gradient_norms(expected_version=1)
        own.update_parameters({"3.bias": np.ones(3)})
        after = own.gradient_norms()
        assert after.version == 2 and not np.allclose(before.norms, after.norms)
        with pytest.raises(curvd.VersionMismatch, match="is at version 2, not 1"):
            own.gradient_norms(expected_version=1)


def test_a_query_that_is_stopped_has_the_first_data_points(session):
    whole = session.gradient_norms()
    few = session.gradient_norms(max_products=5)
    assert few.info.stopped is curvd.Stop.PRODUCTS
    np.testing.assert_allclose(few.norms, whole.norms[:5], rtol=1e-12)
    late = session.gradient_norms(time_limit_s=1e-9)
    assert late.info.stopped is curvd.Stop.TIME
    assert 1 <= late.products == len(late.norms) < len(whole.norms)


def test_progress_counts_data_points(session):
    seen = []
    with pytest.raises(
        curvd.InvalidSpec, match="max_products must be at least 1, got 0"
    ):
        session.gradient_norms(max_products=0)
    found = session.gradient_norms(progress=seen.append)
    assert [p.products for p in seen] == sorted(p.products for p in seen)
    assert found.products == 24


def test_batch_statistics_are_refused(live_target):
    rng = np.random.default_rng(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4)).double()
    points = torch.from_numpy(rng.normal(size=(8, 5))), torch.zeros(8, 4).double()
    with (
        curvd.connect(live_target) as client,
        client.session_for(
            net, "mse", points, batch_size=4, mode="batch_statistics"
        ) as own,
        pytest.raises(curvd.InvalidSpec, match="mode='eval'"),
    ):
        own.gradient_norms()


def test_an_operator_is_refused(session, live_target):
    request = query_pb.GradientNormsRequest()
    request.query.session_id = session.id
    request.query.operator.damping = 0.5
    with (
        grpc.insecure_channel(live_target) as channel,
        pytest.raises(curvd.InvalidSpec, match="not about an operator, got hessian"),
    ):
        raw.call(channel, "GradientNorms", request)


def test_the_command_line_names_the_largest_and_draws(session, live_target, tmp_path):
    picture = tmp_path / "norms.png"
    args = ["gradient-norms", session.id, live_target, "--plot", str(picture)]
    done = CliRunner().invoke(main, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    norms = session.gradient_norms().norms
    assert f"24 norms: {norms.min():.6e} to {norms.max():.6e}" in done.output
    assert done.output.splitlines()[1].startswith(f"data point {norms.argmax()}: ")
    assert "converged: 24 products" in done.output
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert (
        "--operator"
        not in CliRunner().invoke(main, ["gradient-norms", "--help"]).output
    )
