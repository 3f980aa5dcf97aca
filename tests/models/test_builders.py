"""Builders: an architecture is a name and a config that is checked key by key."""

from __future__ import annotations

import pytest
import torch

from curvd.errors import InvalidSpec
from curvd_server.models.builders import BUILDERS, resolve

SHAPES = {
    "mlp": ({"widths": [6, 5, 3], "activation": "silu"}, torch.zeros(2, 6), (2, 3)),
    "cnn": ({"channels": 2, "classes": 4}, torch.zeros(2, 2, 7, 7), (2, 4)),
    "resnet18": ({"width": 4, "classes": 7}, torch.zeros(2, 3, 32, 32), (2, 7)),
    "gpt": (
        {"vocabulary": 11, "context": 8, "layers": 2, "width": 6, "heads": 3},
        torch.zeros(2, 5, dtype=torch.int64),
        (2, 5, 11),
    ),
}


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_outputs_have_the_shape_that_the_config_says(name: str):
    config, x, shape = SHAPES[name]
    assert tuple(BUILDERS[name](config).eval()(x).shape) == shape


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_an_unknown_key_is_named_with_its_value_and_the_known_ones(name: str):
    with pytest.raises(InvalidSpec, match=r"unknown key 'wdith' \(value 3\); known"):
        BUILDERS[name]({"wdith": 3})


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("mlp", {"widths": [3]}, "widths must be a list of 2 or more integers"),
        ("mlp", {"widths": [3, 2.0]}, r"widths must be .*, got \[3, 2.0\]"),
        ("mlp", {"bias": 1}, "bias must be true or false, got 1"),
        ("mlp", {"activation": "exec"}, "activation must be one of .*'gelu'"),
        ("resnet18", {"width": True}, r"width must be an integer .*, got True"),
        ("gpt", {"layers": 10**9}, r"layers must be an integer in \[1, 1024\]"),
        ("gpt", {"width": 10, "heads": 3}, "multiple of heads, got 10 and 3"),
    ],
)
def test_a_wrong_value_is_refused(name: str, config: dict, message: str):
    with pytest.raises(InvalidSpec, match=message):
        BUILDERS[name](config)


def test_the_shipped_resnet_has_the_usual_size_and_the_gpt_ties_its_head():
    resnet, gpt = BUILDERS["resnet18"]({}), BUILDERS["gpt"](SHAPES["gpt"][0])
    assert sum(p.numel() for p in resnet.parameters()) == 11_173_962
    assert gpt.head.weight is gpt.tokens.weight


def test_operators_add_builders_by_entry():
    builders = resolve({"plain": "torch.nn:Identity"})
    assert set(builders) == {*BUILDERS, "plain"}
    with pytest.raises(TypeError):
        builders["new"] = None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"x": "nowhere:f"}, "cannot load 'nowhere:f'"),
        ({"x": "torch.nn:Nope"}, "cannot load"),
        ({"x": "torch"}, "cannot load"),
        ({"x": "math:pi"}, "is not callable"),
        ({"mlp": "torch.nn:Identity"}, "is taken"),
    ],
)
def test_an_entry_that_is_no_builder_is_refused(entry: dict, message: str):
    with pytest.raises(InvalidSpec, match=message):
        resolve(entry)
