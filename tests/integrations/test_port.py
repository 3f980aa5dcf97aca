"""The script of curvlinops in docs/client.md and its port compute the same."""

import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("curvlinops")

import curvd  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
SECTION = (
    (ROOT / "docs/client.md").read_text().partition("### A script of curvlinops")[2]
)
THEIRS, OURS = re.findall(r"```python\n(.*?)```", SECTION.partition("\n### ")[0], re.S)


def run(script, **names):
    exec(compile(script, "docs/client.md", "exec"), names)
    return names


def test_the_port_computes_what_the_script_does(live_target):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)
    ).double()
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randint(0, 3, (30,))
    size = sum(p.numel() for p in model.parameters())
    given = {
        "model": model,
        "loss_function": torch.nn.CrossEntropyLoss(),
        "data": [(x[n : n + 10], y[n : n + 10]) for n in (0, 10, 20)],
        "v": torch.randn(size, dtype=torch.float64),
        "w": torch.randn(2, dtype=torch.float64),
    }
    theirs = run(THEIRS, **given)
    with curvd.connect(live_target) as client:
        ours = run(OURS, client=client, **given)
        # Traces are estimates; the operator is small enough to know.
        exact = float(np.trace(ours["G"].to_dense()))
    for name, tolerance in (("product", 1e-10), ("step", 1e-4), ("block", 1e-10)):
        np.testing.assert_allclose(
            ours[name].numpy(),
            theirs[name].detach().numpy(),
            rtol=tolerance,
            atol=tolerance * float(theirs[name].detach().abs().max()),
            err_msg=name,
        )
    np.testing.assert_allclose(sorted(ours["top"]), sorted(theirs["top"]), rtol=1e-5)
    assert ours["trace"] == pytest.approx(exact, rel=0.1)
    assert float(theirs["trace"]) == pytest.approx(exact, rel=0.1)
    assert len(OURS.strip().splitlines()) < len(THEIRS.strip().splitlines())
