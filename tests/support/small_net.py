"""A net so small that its dense Hessian is quick, as sessions of a server."""

import numpy as np
import torch

import curvd
from curvd_server.models import builders

WIDTHS = {"activation": "tanh", "widths": [5, 6, 3]}


def data():
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((24, 5)),
        "y": rng.integers(0, 3, 24),
    }


def module():
    torch.manual_seed(0)
    return builders.BUILDERS["mlp"](WIDTHS).double()


def open_session(client, **options):
    model = client.register_model("mlp", WIDTHS, module().state_dict())
    dataset = client.register_dataset(data(), inputs=["x"], target="y", batch_size=8)
    options = {"loss": "cross_entropy", "dtype": "F64"} | options
    return client.create_session(model, dataset, **options)


async def connected(server, stack):
    client = await stack.enter_async_context(curvd.aio.connect(server.target))
    dataset = await client.register_dataset(
        data(), inputs=["x"], target="y", batch_size=8
    )
    model = await client.register_model("mlp", WIDTHS, module().state_dict())
    return await client.create_session(
        model, dataset, loss="cross_entropy", dtype="F64"
    )
