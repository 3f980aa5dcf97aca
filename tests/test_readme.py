"""What the README shows is true."""

import re
from pathlib import Path

import pytest

import curvd

README = (Path(__file__).parent.parent / "README.md").read_text()


WATCHED, *EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def run(example, target):
    """Run an example against a server elsewhere."""
    assert len(example.strip().splitlines()) <= 12
    code = example.replace("127.0.0.1:50551", target)
    exec(compile(code, "README.md", "exec"), {})


def test_a_training_is_watched_in_two_lines(live_target):
    torch = pytest.importorskip("torch")
    x, y = torch.randn(250, 4), torch.randn(250, 3)
    net = torch.nn.Linear(4, 3)
    with curvd.connect(live_target) as client:
        given = {"client": client, "curvd": curvd, "nn": torch.nn}
        given |= {"net": net, "x": x, "y": y}
        exec(compile(WATCHED, "README.md", "exec"), given)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(20):
            torch.nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
        given["watch"].wait()
        (reading,) = given["watch"].readings
        given["watch"].close()
    assert repr(reading).startswith("<Reading of step 20: sharpness ")
    shown = re.search(r"^<Reading .*>$", README, re.M)[0]
    number = r"-?[\d.e+-]+"
    pattern = re.sub(number, "N", shown)
    assert re.sub(number, "N", repr(reading)) == pattern


def test_a_module_needs_ten_lines(live_target, capsys):
    pytest.importorskip("torch")
    assert len([line for line in EXAMPLES[0].splitlines() if line.strip()]) <= 10
    run(EXAMPLES[0], live_target)
    values, shape = capsys.readouterr().out.splitlines()
    assert len(values.strip("[]").split()) == 3
    assert shape == "torch.Size([195])"


def test_the_client_without_torch_needs_ten_lines(live_target, capsys):
    pytest.importorskip("torch")
    run(EXAMPLES[1], live_target)
    assert capsys.readouterr().out == "(27, 27) (27,) (27, 27)\n"


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_every_linked_document_exists(link):
    assert (Path(__file__).parent.parent / link).exists()
