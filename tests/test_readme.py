"""What the README shows is true."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_ten_line_example_runs(live_target, capsys):
    pytest.importorskip("torch")
    example = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len(example.strip().splitlines()) <= 12
    exec(
        compile(example.replace("127.0.0.1:50551", live_target), "README.md", "exec"),
        {},
    )
    assert capsys.readouterr().out == "(27, 27) (27,) (27, 27)\n"


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_every_linked_document_exists(link):
    assert (Path(__file__).parent.parent / link).exists()
