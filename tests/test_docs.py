"""What the site shows is all there is; `make docs` proves its links and examples."""

import re
import runpy
from pathlib import Path

import pytest

import curvd

ROOT = Path(__file__).parent.parent
SHOWN = re.findall(
    r"^::: (\S+)$",
    (ROOT / "docs/api.md").read_text() + (ROOT / "docs/api_aio.md").read_text(),
    re.M,
)


def test_the_reference_has_every_public_name_once():
    modules = {"aio", "errors", "queries", "__version__"}
    errors = {e.__name__ for e in curvd.errors.BY_REASON.values()}
    wanted = [
        f"curvd.aio.{name}" if name.startswith("Async") else f"curvd.{name}"
        for name in set(curvd._public) - modules - errors
    ]
    assert "curvd.errors" in SHOWN
    assert len(set(SHOWN)) == len(SHOWN)
    assert set(wanted) - set(SHOWN) == set()


def test_methods_are_shown_with_the_options_of_their_queries():
    griffe = pytest.importorskip("griffe")
    hooks = griffe.load_extensions(ROOT / "docs/hooks/options.py")
    package = griffe.load("curvd", search_paths=[ROOT / "client"], extensions=hooks)
    eigsh = package["remote.queries.eigenpairs.EigenpairQueries.eigsh"]
    assert [p.name for p in eigsh.parameters][:3] == ["self", "k", "which"]
    assert (eigsh.parameters["k"].default, eigsh.returns) == ("6", "Eigenpairs")
    assert "tolerance: Residual relative to" in eigsh.docstring.value


def hook(name):
    pytest.importorskip("mkdocs")
    return runpy.run_path(str(ROOT / f"docs/hooks/{name}.py"))


def test_links_of_the_repository_become_links_of_the_site():
    linked = hook("pages")["linked"]
    assert linked("[r](bench/RESULTS.md#x)", "README.md") == "[r](results.md#x)"
    assert linked("[r](../bench/RESULTS.md)", "docs/a.md") == "[r](results.md)"
    assert linked("[c](docs/client.md)", "README.md") == "[c](client.md)"
    assert linked("[e](examples)", "README.md") == "e"
    assert linked("[w](https://x.org)", "README.md") == "[w](https://x.org)"
    with pytest.raises(FileNotFoundError, match=r"README\.md links to gone\.md"):
        linked("[g](gone.md)", "README.md")


def test_what_an_example_left_is_kept_under_its_content():
    digest = hook("gallery")["digest"]
    laplace, influence = ROOT / "examples/laplace.py", ROOT / "examples/influence.py"
    assert digest(laplace) == digest(laplace)
    assert digest(laplace) != digest(influence)


def test_an_example_is_its_docstring_and_its_program():
    example = hook("gallery")["Example"](ROOT / "examples/laplace.py", "", None)
    assert example.title.startswith("Laplace posterior")
    assert example.text.startswith("    python examples/laplace.py")
    assert example.program.startswith("from __future__")
