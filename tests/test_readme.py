"""What the README shows is true."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def run(example, target):
    """Run an example against a server elsewhere."""
    assert len(example.strip().splitlines()) <= 12
    code = example.replace("127.0.0.1:50551", target)
    exec(compile(code, "README.md", "exec"), {})


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
