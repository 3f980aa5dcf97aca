"""The door: what it names exists, is documented, and costs nothing heavy."""

import inspect
import pydoc
import re
import subprocess
import sys

import pytest

import curvd


def test_all_is_what_there_is():
    names = {n for n in vars(curvd) if not n.startswith("_")}
    modules = {n for n in names if inspect.ismodule(getattr(curvd, n))} | {
        "annotations"
    }
    assert set(curvd._public) - {"__version__"} == (names - modules) | {
        "aio",
        "errors",
        "queries",
    }
    assert len(set(curvd._public)) == len(curvd._public)


def test_every_error_is_at_the_door():
    assert {e.__name__ for e in curvd.errors.BY_REASON.values()} <= set(curvd._public)


@pytest.mark.parametrize("name", sorted(set(curvd._public) - {"__version__"}))
def test_every_name_is_documented(name):
    assert inspect.getdoc(getattr(curvd, name))


def test_help_fits_two_screens_and_names_everything():
    lines = pydoc.plain(pydoc.render_doc(curvd)).splitlines()
    assert len(lines) <= 100
    errors = {e.__name__ for e in curvd.errors.BY_REASON.values()} - {"CurvdError"}
    words = set(re.findall(r"\w+", curvd.__doc__))
    assert set(curvd._public) - errors - words == {"__version__"}


@pytest.mark.parametrize("module", ["curvd", "curvd.cli.commands", "curvd.aio"])
def test_importing_it_imports_nothing_heavy(module):
    heavy = ("torch", "scipy", "matplotlib", "rich", "curvd_server", "sklearn")
    code = f"import {module}, sys; print(*(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_the_allocator_is_only_set_on_request():
    code = "import curvd; print(curvd.tune_allocator() is (curvd.tune_allocator()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"
