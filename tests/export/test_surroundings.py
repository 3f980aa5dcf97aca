"""States of torch around an export: what it computes is what eager torch computes, or refused."""

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import curvd  # noqa: E402

NET, X = nn.Linear(4, 3), torch.randn(5, 4)


class Doubling(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is torch.ops.aten.addmm.default else result


@pytest.mark.parametrize(
    ("around", "said"),
    [
        (lambda: torch.autocast("cpu", torch.bfloat16), "torch.autocast is on for cpu"),
        (Doubling, "Doubling is in force"),
        (FakeTensorMode, "FakeTensorMode is in force"),
        (torch.inference_mode, "inference_mode is on"),
        (lambda: torch.device("meta"), "default device is meta"),
    ],
)
def test_what_changes_operators_unseen_is_refused(around, said):
    with around(), pytest.raises(curvd.InvalidSpec, match=said):
        curvd.export(NET, X)
    with around(), pytest.raises(curvd.InvalidSpec, match=said):
        curvd.export_loss(lambda z, y: (z - y).square().mean(), X, X)


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        lambda: torch.autocast("cpu", enabled=False),
        lambda: torch.device("cpu"),
        lambda: torch.autograd.set_detect_anomaly(True),
    ],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_what_changes_nothing_is_let_through(around):
    expected = curvd.export(NET, X)
    with around():
        model = curvd.export(NET, X)
    assert model.graph == expected.graph
