"""What a watch says about a real training is what torch computes of it."""

import copy

import numpy as np
import pytest

import curvd

torch = pytest.importorskip("torch")
nn = torch.nn


def curvature(net, x, y):
    """The Hessian [P, P], the GGN, the loss and its gradient, by torch alone."""
    state = {name: p.detach() for name, p in net.named_parameters()}
    shapes = [p.shape for p in state.values()]
    sizes = [p.numel() for p in state.values()]
    buffers = dict(net.named_buffers())

    def outputs(flat):
        parts = [p.view(s) for p, s in zip(flat.split(sizes), shapes, strict=True)]
        given = {**dict(zip(state, parts, strict=True)), **buffers}
        return torch.func.functional_call(net, given, x)

    def objective(flat):
        return nn.functional.cross_entropy(outputs(flat), y)

    flat = torch.cat([p.reshape(-1) for p in state.values()])
    J = torch.func.jacrev(outputs)(flat)  # [N, C, P]
    p = outputs(flat).softmax(1)
    metric = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    ggn = torch.einsum("nap,nab,nbq->pq", J, metric, J) / len(x)
    return (
        torch.func.hessian(objective)(flat),
        ggn,
        objective(flat),
        torch.func.grad(objective)(flat),
    )


def example(*, norm=False):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)]
    if norm:
        layers.insert(1, nn.BatchNorm1d(6))
    net = nn.Sequential(*layers).double()
    x, y = torch.randn(64, 4, dtype=torch.float64), torch.randint(3, (64,))
    return net, x, y


METRICS = ("sharpness", "trace", "ggn_sharpness", "gradient_norm", "loss")


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "running statistics"])
def test_values_are_those_of_torch_at_the_step_of_the_snapshot(live_target, norm):
    net, x, y = example(norm=norm)
    kept = {}
    with curvd.connect(live_target) as client:
        session = client.session_for(
            net.eval(), nn.CrossEntropyLoss(), (x, y), batch_size=32
        )
        with curvd.watch(session, net, every=5, metrics=METRICS) as watch:
            optimizer = torch.optim.Adam(net.parameters(), lr=3e-2)
            for step in range(1, 16):
                net.train()
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()
                kept[step] = copy.deepcopy(net).eval()
                assert watch.wait()
    assert [r.step for r in watch.readings] == [5, 10, 15]
    assert watch.errors == 0
    for reading in watch.readings:
        hessian, ggn, loss, gradient = curvature(kept[reading.step], x, y)
        exact = {
            "sharpness": float(torch.linalg.eigvalsh(hessian)[-1]),
            "ggn_sharpness": float(torch.linalg.eigvalsh(ggn)[-1]),
            "loss": float(loss),
            "gradient_norm": float(gradient.norm()),
        }
        for name, value in exact.items():
            assert reading[name] == pytest.approx(value, rel=2e-3), name
            slack = reading.errors.get(name, 0.0) + 1e-9 * abs(value)
            assert abs(reading[name] - value) <= slack, name
        trace = float(hessian.trace())
        assert abs(reading["trace"] - trace) <= 2 * reading.errors["trace"]


def test_values_are_the_blocking_ones_at_the_same_version(live_target):
    """The second session is updated and asked without a watch."""
    net, x, y = example()
    kept = {}
    with curvd.connect(live_target) as client:
        given = net, nn.CrossEntropyLoss(), (x, y)
        options = {"batch_size": 32, "plan": "final"}
        session = client.session_for(*given, **options)
        other = client.session_for(*given, **options)
        with curvd.watch(session, net, every=2, metrics=METRICS) as watch:
            optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
            for step in range(1, 7):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()
                kept[step] = copy.deepcopy(net.state_dict())
                assert watch.wait()
        for reading in watch.readings:
            assert other.update_parameters(kept[reading.step]) == reading.version
            assert other.info.parameters_digest == reading.parameters_digest
            H, G = other.hessian(), other.ggn()
            loss, gradient = other.gradient()
            assert reading["loss"] == loss
            assert reading["gradient_norm"] == float(np.linalg.norm(gradient))
            assert reading["trace"] == H.trace(samples=30).value
            for name, operator in (("sharpness", H), ("ggn_sharpness", G)):
                found = operator.eigsh(
                    1, tolerance=1e-3, warm_start=True, vectors=False
                )
                assert reading[name] == found.values[0]
                assert reading.errors[name] == found.residuals[0]


def test_a_callable_is_asked_at_the_version_of_the_snapshot(live_target):
    net, x, y = example()
    with curvd.connect(live_target) as client:
        session = client.session_for(
            net, nn.CrossEntropyLoss(), (x, y), batch_size=64, operators=["ggn"]
        )

        def top(session):
            return session.ggn().eigsh(3, vectors=False)

        def meddled(watched):
            session.update_parameters(net.state_dict())  # somebody else
            return watched.ggn().trace(samples=5)

        with curvd.watch(session, net, every=1, metrics=[top, meddled]) as watch:
            watch.step()
            watch.wait()
        assert isinstance(watch.last_error, curvd.VersionMismatch)
        assert list(watch.readings[0].values) == ["top"]
        exact = curvature(net, x, y)[1]
        largest = float(torch.linalg.eigvalsh(exact)[-1])
        assert watch.readings[0]["top"] == pytest.approx(largest, rel=1e-4)
