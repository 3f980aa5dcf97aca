"""What the guide shows is a training that is watched."""

import re
from pathlib import Path

import pytest

import curvd

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]


def test_a_training_is_watched_by_what_the_guide_shows(
    live_target, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs/client.md").read_text().partition("## Watching a training")
    code, *_ = re.findall(
        r"```python\n(.*?)```", section[2].partition("\n## ")[0], re.S
    )
    net = torch.nn.Linear(4, 3)
    x, y = torch.randn(64, 4), torch.randint(3, (64,))
    with curvd.connect(live_target) as client:
        names = {"client": client, "net": net, "x": x, "y": y, "nn": torch.nn}
        names["curvd"] = curvd
        exec(compile(code, "docs/client.md", "exec"), names)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        names["watch"].close()
    table = (tmp_path / "curvature.csv").read_text().splitlines()
    assert table[1].startswith("20,2,")
