"""Cases of other libraries' suites, through a real server, against dense eager torch.

Hessian, GGN, their blocks, empirical Fisher, loss and gradient, to 1e-6 in float64. Of
the settings every sixth is tried; ``make cases`` tries all.
"""

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from end_to_end.cases.modules import MODULES  # noqa: E402
from end_to_end.cases.settings import N, settings  # noqa: E402
from torch import nn  # noqa: E402
from torch.func import functional_call  # noqa: E402

import curvd  # noqa: E402

STEP = 1 if os.environ.get("CURVD_CASES") == "all" else 6
SETTINGS = {setting.name: setting for setting in settings()}


@pytest.fixture(scope="module")
def client(live_target):
    with curvd.connect(live_target) as client:
        yield client


def draw(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, *shape, generator=generator, dtype=torch.float64)


def targets_of(loss, z):
    generator = torch.Generator().manual_seed(3)
    if loss == "CrossEntropyLoss":
        shape = (len(z), *z.shape[2:])
        return torch.randint(0, z.shape[1], shape, generator=generator)
    y = torch.rand(z.shape, generator=generator, dtype=torch.float64)
    return y.round() if loss == "BCEWithLogitsLoss" else y


def made(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def net_of(setting):
    module = nn.Sequential(*(getattr(nn, name)(*a) for name, *a in setting.layers))
    if setting.layers[0][0] == "Embedding":
        x = torch.randint(0, 5, (N, *setting.inputs))
    else:
        x = draw(setting.inputs, 1)
    module(x if not x.is_floating_point() else x.float())  # lazy layers
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
    return module.double().eval(), x


class Dense:
    """What eager torch says, all of it in full."""

    def __init__(self, module, x, y, loss):
        leaves = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.sizes = [p.numel() for p in leaves.values()]
        at = torch.cat([p.detach().reshape(-1) for p in leaves.values()])

        def outputs(flat):
            parts = dict(zip(leaves, flat.split(self.sizes), strict=True))
            parts = {n: t.reshape(leaves[n].shape) for n, t in parts.items()}
            kwargs = x if isinstance(x, dict) else {}
            return functional_call(module, parts, () if kwargs else (x,), kwargs)

        jacobian, hessian = torch.autograd.functional.jacobian, torch.func.hessian
        z = outputs(at).detach()
        total = lambda flat: loss(outputs(flat), y)  # noqa: E731
        flat = at.clone().requires_grad_()
        value = total(flat)
        (g,) = torch.autograd.grad(value, flat, create_graph=True)
        rows = [torch.autograd.grad(e, flat, retain_graph=True)[0] for e in g]
        J = jacobian(outputs, at).reshape(z.numel(), -1)
        inner = hessian(lambda z: loss(z, y))(z).reshape(z.numel(), -1)
        self.loss, self.gradient = float(value.detach()), g.detach()
        self.hessian, self.ggn = torch.stack(rows), J.T @ inner @ J
        self.fisher = None
        if isinstance(loss, nn.CrossEntropyLoss) and z.dim() == 2:
            # One loss for each data point, so there is one way to read "per example".
            (d,) = torch.autograd.grad(loss(leaf := z.requires_grad_(), y), leaf)
            each = torch.einsum("nc,ncp->np", d, J.reshape(*z.shape, -1))
            self.fisher = each.T @ each * (N if loss.reduction == "mean" else 1)

    def block(self, matrix, blocks):
        kept, start = torch.zeros_like(matrix), 0
        for tensors in blocks:
            size = sum(self.sizes[slice(*tensors)])
            here = slice(start, start + size)
            kept[here, here], start = matrix[here, here], start + size
        return kept


def check(client, module, x, loss, reduction):
    criterion = getattr(nn, loss)(reduction=reduction)
    z = module(**x) if isinstance(x, dict) else module(x)
    y = targets_of(loss, z)
    dense = Dense(module, x, y, criterion)
    with client.session_for(module, criterion, (x, y), batch_size=4) as session:
        value, gradient = session.gradient()
        count = len(dense.sizes)
        first = (count + 1) // 2
        sizes = [first, count - first] if count > 1 else [1]
        edges = [(0, first), (first, count)][: len(sizes)]
        v = np.eye(len(gradient))
        pairs = {
            "loss": (value, dense.loss),
            "gradient": (gradient, dense.gradient),
            "Hessian": (session.hessian() @ v, dense.hessian),
            "GGN": (session.ggn() @ v, dense.ggn),
            "Hessian's blocks": (
                session.hessian(block_sizes=sizes) @ v,
                dense.block(dense.hessian, edges),
            ),
            "GGN's blocks": (
                session.ggn(block_sizes=sizes) @ v,
                dense.block(dense.ggn, edges),
            ),
        }
        if dense.fisher is not None:
            pairs["Fisher"] = session.empirical_fisher() @ v, dense.fisher
    for name, (got, want) in pairs.items():
        got, want = (np.asarray(torch.as_tensor(value)) for value in (got, want))
        scale = max(1e-6, float(np.abs(want).max()))
        assert np.abs(got - want).max() < 1e-6 * scale, name


@pytest.mark.parametrize("name", list(SETTINGS)[::STEP])
def test_a_setting_is_what_eager_torch_says(client, name):
    setting = SETTINGS[name]
    module, x = made(lambda: net_of(setting))
    check(client, module, x, setting.loss, setting.reduction)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_what_eager_torch_says(client, name):
    kind, shapes, loss, reduction = MODULES[name]
    module = made(kind).double().eval()
    if isinstance(shapes, dict):
        x = {key: draw(shape, k) for k, (key, shape) in enumerate(shapes.items())}
    else:
        x = draw(shapes, 1)
    check(client, module, x, loss, reduction)
