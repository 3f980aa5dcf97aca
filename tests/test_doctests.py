"""The examples in docstrings are true, word for word, against a real server."""

import doctest
import importlib
import pkgutil
import warnings

import numpy as np
import pytest
from support.torchvision_aside import aside_if_broken

import curvd

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def found():
    """Every docstring of the client with an example."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for info in pkgutil.walk_packages(curvd.__path__, "curvd."):
        if info.name.startswith("curvd.v1") or info.name.endswith("__main__"):
            continue
        try:
            with aside_if_broken(), warnings.catch_warnings(action="ignore"):
                module = importlib.import_module(info.name)
        except ModuleNotFoundError:  # what an extra brings
            continue
        yield from (t for t in finder.find(module, info.name) if t.examples)
    yield from (t for t in finder.find(curvd, "curvd") if t.examples)


EXAMPLES = {test.name: test for test in found()}


@pytest.fixture(scope="module")
def names(live_target):
    """What docstrings take for given; docs/api.md says so, too."""
    rng = np.random.default_rng(0)
    widths = [4, 5, 3]
    state = {
        "1.weight": rng.normal(size=(5, 4)),
        "1.bias": np.zeros(5),
        "3.weight": rng.normal(size=(3, 5)),
        "3.bias": np.zeros(3),
    }
    data = {"x": rng.normal(size=(60, 4)), "y": rng.integers(0, 3, size=60)}
    with curvd.connect(live_target) as client:
        model = client.register_model("mlp", {"widths": widths}, state)
        dataset = client.register_dataset(data, inputs=["x"], target="y", batch_size=20)
        yield {
            "curvd": curvd,
            "np": np,
            "target": live_target,
            "client": client,
            "model": model,
            "dataset": dataset,
            "session": client.create_session(
                model, dataset, loss="cross_entropy", dtype="F64"
            ),
        }


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script`:DeprecationWarning"
)  # curvlinops
@pytest.mark.parametrize("name", EXAMPLES)
def test_it_is_true(name, names):
    report = []
    test = EXAMPLES[name]
    test.globs = dict(names)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    assert not runner.run(test, out=report.append).failed, "".join(report)


def test_there_are_examples_of_all_parts():
    assert len(EXAMPLES) >= 50
