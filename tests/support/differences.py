"""Products of exported graphs against differences of the user's own module.

The truth never sees a graph: central differences of the gradient of the eager module, in
float64, without any second derivative.
"""

import importlib
import operator

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import curvd  # noqa: E402

N, BATCH = 5, 3
"""Leaves a ragged last mini-batch."""


def seeded(make):
    """A module in float64 whose parameters are not special."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().double()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.dim() == 1:
                    # Biases of zero put ReLUs on their kink.
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return module


def draw(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def labels(classes, *shape):
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(2))


def library(name):
    """Import a library of models, or skip the test."""
    from curvd_server.models import libraries

    libraries._declare_operators()  # torchvision may be compiled for another torch
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, AttributeError) as error:
        pytest.skip(f"{name} cannot be imported: {error}")


def open_session(client, module, inputs, targets, **options):
    """Export, register, and bring into a float64 session."""
    exported = curvd.export(module, inputs, **options)
    data = {i.name: None for i in exported.graph.inputs}
    leaves = torch.utils._pytree.tree_leaves(inputs)
    tensors = dict(zip(data, filter(torch.is_tensor, leaves), strict=True))
    dataset = client.register_dataset(
        {**tensors, "target": targets},
        inputs=list(data),
        target="target",
        batch_size=BATCH,
        input_style="keywords",
    )
    return client.create_session(
        client.register_model(exported),
        dataset,
        loss="mse" if targets.is_floating_point() else "cross_entropy",
        dtype="F64",
        mode=exported.mode,
    )


def eager_gradient(module, inputs, targets, parameters, pick):
    """The gradient of the mean loss, the way a user would write it."""
    total = 0.0
    for i in range(0, len(targets), BATCH):
        here = slice(i, i + BATCH)
        rows = torch.utils._pytree.tree_map(operator.itemgetter(here), inputs)
        if isinstance(rows, dict):
            z = pick(module(**rows))
        else:
            z = pick(module(*rows) if isinstance(rows, tuple) else module(rows))
        y = targets[i : i + BATCH]
        if targets.is_floating_point():
            total = total + (z - y).square().sum()
        else:
            total = total + F.cross_entropy(
                z.flatten(0, -2), y.flatten(), reduction="sum"
            )
    rows = torch.autograd.grad(
        total / targets.numel(), parameters, allow_unused=True, materialize_grads=True
    )
    return nn.utils.parameters_to_vector([row.contiguous() for row in rows])


def central(gradient, parameters, v, step):
    """Hv by central differences of a gradient, Richardson extrapolated once."""
    start = nn.utils.parameters_to_vector(parameters).detach()
    v = torch.from_numpy(v)

    def quotient(step):
        ends = []
        for sign in (1, -1):
            nn.utils.vector_to_parameters(start + sign * step * v, parameters)
            ends.append(gradient())
        return (ends[0] - ends[1]) / (2 * step)

    found = ((4 * quotient(step) - quotient(2 * step)) / 3).numpy()
    nn.utils.vector_to_parameters(start, parameters)
    return found


def difference(module, inputs, targets, v, pick, step):
    """Hv of a module with the loss of `eager_gradient`."""
    parameters = [p for p in module.parameters() if p.requires_grad]

    def gradient():
        return eager_gradient(module, inputs, targets, parameters, pick)

    return central(gradient, parameters, v, step)


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def check(
    client, module, inputs, targets, *, step=1e-5, pick=lambda z: z, fixed=(), **options
):
    """Compare a product, and the order of the parameters."""
    session = open_session(client, module, inputs, targets, **options)
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    assert list(session.layout.names) == names
    v = np.random.default_rng(0).standard_normal(session.layout.size)
    for name, row in fixed:
        (p,) = (p for p in session.layout.parameters if p.name == name)
        v[p.offset : p.offset + p.size].reshape(p.shape)[row] = 0.0
    got = session.hessian() @ v
    want = difference(module, inputs, targets, v, pick, step)
    assert relative(got, want) <= 1e-6
    session.delete()


def pass_on(z):
    return z


def assert_same_outputs(exported, module, inputs):
    """The interpreter computes what the module does, to the bit."""
    from curvd_server.graph.decoder import canonical, decode
    from curvd_server.graph.execution.interpret import Interpreter
    from curvd_server.graph.execution.module import GraphModule

    run = GraphModule(Interpreter(decode(canonical(exported.graph))))
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        got = torch.func.functional_call(run, dict(exported.state), args)
        assert torch.equal(got, module(*args))
