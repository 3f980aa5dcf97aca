"""The layer zoo through the real service, against central differences in plain torch."""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from support.differences import central, relative  # noqa: E402
from support.zoo import ANIMALS, REFUSED, N  # noqa: E402
from torch import nn  # noqa: E402

import curvd  # noqa: E402

BATCH = 4
"""Leaves a ragged last mini-batch."""


@pytest.fixture(scope="module")
def client(live_target):
    with curvd.connect(live_target) as client:
        yield client


def open_session(client, animal, **options):
    """Register the animal and bring it into a float64 session."""
    data = animal.arrays()
    return client.create_session(
        model=client.register_model(
            "zoo", {"animal": animal.name}, animal.module().state_dict()
        ),
        dataset=client.register_dataset(
            data, inputs=["x"], target="y", batch_size=BATCH
        ),
        loss=animal.loss,
        dtype="F64",
        mode=animal.mode,
        **options,
    )


def shifted_cross_entropy(z, y):
    """The loss of causal language models, summed."""
    return nn.functional.cross_entropy(
        z[:, :-1].flatten(0, -2), y[:, 1:].flatten(), reduction="sum"
    )


def eager_gradient(animal, module, parameters):
    """The gradient of the mean loss, the way a user would write it."""
    data = animal.arrays()
    counted = data["y"].numel()
    if animal.loss.shift:
        total = shifted_cross_entropy
        counted -= N
    elif animal.loss.name == "cross_entropy":
        total = lambda z, y: nn.functional.cross_entropy(  # noqa: E731
            z.flatten(0, -2), y.flatten(), reduction="sum"
        )
    elif animal.loss.name == "mse":
        total = functools.partial(nn.functional.mse_loss, reduction="sum")
    elif animal.loss.name == "smooth_l1":
        total = functools.partial(
            nn.functional.smooth_l1_loss, reduction="sum", beta=animal.loss.beta
        )
    else:
        total = functools.partial(
            nn.functional.binary_cross_entropy_with_logits, reduction="sum"
        )
    loss = sum(
        total(module(data["x"][i : i + BATCH]), data["y"][i : i + BATCH])
        for i in range(0, N, BATCH)
    )
    rows = torch.autograd.grad(
        loss / counted, parameters, materialize_grads=True, allow_unused=True
    )
    return nn.utils.parameters_to_vector(rows)


def difference(animal, v):
    """Hv of an animal in its own mode."""
    module = animal.module().eval()
    if animal.mode == curvd.Mode.BATCH_STATISTICS:
        module.train()
    parameters = list(module.parameters())
    return central(
        lambda: eager_gradient(animal, module, parameters), parameters, v, 1e-5
    )


@pytest.mark.parametrize("plan", ["first", "final"])
@pytest.mark.parametrize("animal", ANIMALS, ids=lambda a: a.name)
def test_products_match_central_differences(client, animal, plan):
    session = open_session(client, animal, plan=plan)
    v = np.random.default_rng(0).standard_normal(session.info.layout.size)
    if animal.name == "padding":
        v[4:8] = 0  # row 1 of the embedding: a constant, whatever its values
    hessian = session.hessian()
    assert relative(hessian @ v, difference(animal, v)) <= 1e-6
    assert hessian.last.plan.tier == session.info.plan == plan
    session.delete()


def test_a_last_tier_takes_over_and_is_as_right(client):
    animal = ANIMALS[0]
    session = open_session(client, animal, plan="first")
    hessian = session.hessian()
    v = np.random.default_rng(0).standard_normal(hessian.shape[0])
    tiers = set()
    while curvd.Tier.FINAL not in tiers:
        if session.refresh().operators[0][1].tier is curvd.Tier.FINAL:
            assert relative(hessian @ v, difference(animal, v)) <= 1e-6
            tiers.add(hessian.last.plan.tier)
    session.delete()


@pytest.mark.parametrize("animal", ANIMALS[:3], ids=lambda a: a.name)
def test_blocks_are_the_diagonal_of_the_whole(client, animal):
    session = open_session(client, animal)
    layout = session.info.layout
    count = len(layout.parameters)
    sizes = (1, count - 1)
    whole = session.hessian() @ np.eye(layout.size)
    blocks = session.hessian(block_sizes=sizes) @ np.eye(layout.size)
    cut = layout.parameters[1].offset
    whole[:cut, cut:] = whole[cut:, :cut] = 0
    np.testing.assert_allclose(blocks, whole, rtol=1e-9, atol=1e-12)
    session.delete()


@pytest.mark.parametrize("plan", ["first", "final"])
def test_a_model_that_no_mode_gets_right_is_refused_by_parameter_name(client, plan):
    with pytest.raises(curvd.CurvatureUnverified, match="direction") as refusal:
        open_session(client, REFUSED, plan=plan)
    assert "direction" in refusal.value.metadata["parameters"]


def test_an_unused_parameter_has_zero_rows(client):
    animal = next(a for a in ANIMALS if a.name == "unused")
    session = open_session(client, animal)
    product = session.hessian() @ [np.ones(s) for s in session.info.layout.shapes]
    by_name = dict(zip(session.info.layout.names, product, strict=True))
    assert not by_name["unused.weight"].any()
    assert by_name["used.weight"].any()
    session.delete()


def test_tied_parameters_are_one(client):
    animal = next(a for a in ANIMALS if a.name == "tied")
    session = open_session(client, animal)
    assert session.info.layout.names == ("tokens.weight", "mix.weight", "mix.bias")
    session.delete()


def test_how_the_data_is_cut_does_not_matter(client):
    rng = np.random.default_rng(0)
    state = {"1.weight": rng.normal(size=(4, 6)), "1.bias": rng.normal(size=4)}
    model = client.register_model("mlp", {"widths": [6, 4]}, state)
    labels = rng.integers(0, 4, 30)
    labels[::3] = -100
    data = {"x": rng.normal(size=(30, 6)), "y": labels}
    loss = {
        "name": "cross_entropy",
        "ignore_index": -100,
        "class_weights": (0.5, 2.0, 1.0, 0.1),
        "label_smoothing": 0.1,
    }
    v = rng.normal(size=28)
    products = []
    for batch_size in (30, 7, 1):
        dataset = client.register_dataset(
            data, inputs=["x"], target="y", batch_size=batch_size
        )
        session = client.create_session(model, dataset, loss=loss, dtype="F64")
        products.append(session.hessian() @ v)
        session.delete()
    np.testing.assert_allclose(products[1], products[0], rtol=1e-11)
    np.testing.assert_allclose(products[2], products[0], rtol=1e-11)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_narrow_sessions_are_as_exact_as_their_type(client, dtype):
    rng = np.random.default_rng(0)
    state = {
        "1.weight": rng.normal(size=(8, 6)),
        "1.bias": rng.normal(size=8),
        "3.weight": rng.normal(size=(4, 8)),
        "3.bias": rng.normal(size=4),
    }
    model = client.register_model(
        "mlp", {"widths": [6, 8, 4], "activation": "tanh"}, state
    )
    data = {"x": rng.normal(size=(20, 6)), "y": rng.integers(0, 4, 20)}
    dataset = client.register_dataset(data, inputs=["x"], target="y", batch_size=8)
    products = {}
    for kind in ("F64", dtype):
        session = client.create_session(
            model, dataset, loss="cross_entropy", dtype=kind
        )
        v = np.linspace(-1, 1, session.info.layout.size)
        hessian = session.hessian()
        products[kind] = hessian @ v.astype(hessian.dtype)
        session.delete()
    assert products[dtype].dtype == np.float32
    limit = {"F32": 1e-5, "BF16": 5e-2}[dtype]
    assert relative(products[dtype], products["F64"]) <= limit
