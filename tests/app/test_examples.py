"""The examples run as they are, and say what they promise."""

import runpy
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def main_of(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_sharpness_is_tracked_through_training(live_target, capsys):
    sharpness = main_of("sharpness")(live_target, visits=3)
    assert all(s > 0 for s in sharpness)
    assert "version 3" in capsys.readouterr().out


def test_a_watched_training_comes_to_the_edge_of_stability(live_target, tmp_path):
    pytest.importorskip("sklearn")
    picture = tmp_path / "watched.png"
    readings = main_of("watched_training")(live_target, str(picture), steps=2000)
    assert picture.exists()
    assert readings[0].values.keys() == {"sharpness", "loss"}
    late = [r["sharpness"] for r in readings if r.step > 1200]
    assert 3.5 < np.median(late) < 4.8  # 2 / learning rate is 4
    assert readings[-1]["loss"] < readings[0]["loss"]


def test_newton_steps_bring_the_loss_down(live_target):
    losses = main_of("newton_cg")(live_target)
    assert losses[-1] < 0.3 * losses[0]


def test_the_posterior_variance_grows_away_from_the_data(live_target):
    variance = main_of("laplace")(live_target)
    assert (variance > 0).all()
    assert variance[[0, -1]].min() > 5 * variance[12:21].max()


def test_the_wrong_label_is_the_most_harmful_training_point(live_target):
    assert int(np.argmax(main_of("influence")(live_target))) == 7


def test_the_density_of_a_transformer_is_drawn(live_target, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "density.png"
    hessian, ggn = main_of("transformer_density")(live_target, str(picture))
    assert picture.exists()
    assert ggn.nodes.min() > -1e-4 * ggn.nodes.max()
    assert hessian.nodes.min() < ggn.nodes.min()


def test_every_example_is_run_here():
    text = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'main_of("{path.stem}")' in text, path.name
