"""The promises of the package as a whole: imports, floors, documents, generated code."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import curvd.errors

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("folder", ["client/curvd", "server/curvd_server"])
def test_the_top_of_each_package_can_be_read_at_a_glance(folder):
    """Who may import whom is in pyproject.toml, and `make lint` checks it."""
    rooms = {p.stem for p in (ROOT / folder).iterdir() if p.suffix in ("", ".py")}
    assert len(rooms - {"__init__", "__pycache__"}) <= 16


@pytest.mark.parametrize("folder", ["client/curvd", "server/curvd_server"])
def test_every_package_says_what_it_is_for(folder):
    for door in (ROOT / folder).rglob("__init__.py"):
        if door.parent.name not in ("v1", "curvd_server"):
            assert len(ast.get_docstring(ast.parse(door.read_text())) or "") > 80, door


def test_importing_curvd_imports_nothing_heavy():
    heavy = {"torch", "scipy", "matplotlib", "rich", "curvd_server"}
    code = (
        f"import curvd, curvd.cli.commands, sys; print(*({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_floors_are_those_of_the_generated_code():
    floors = dict(d.split(">=") for d in PROJECT["dependencies"])
    generated = ROOT / "client/curvd/v1"
    grpc_text = (generated / "curvature_service_pb2_grpc.py").read_text()
    protobuf_text = (generated / "curvature_service_pb2.py").read_text()
    assert (
        re.search(r"GRPC_GENERATED_VERSION = '(.*)'", grpc_text)[1] == floors["grpcio"]
    )
    assert (
        re.search(r"Protobuf Python Version: (.*)", protobuf_text)[1]
        == floors["protobuf"]
    )


def test_every_dependency_is_defended():
    text = (ROOT / "docs/dependencies.md").read_text()
    extras = PROJECT["optional-dependencies"]
    used = PROJECT["dependencies"] + [
        d for extra, ds in extras.items() if extra not in ("dev", "proto") for d in ds
    ]
    for requirement in used:
        name = re.match(r"[A-Za-z0-9-]+", requirement)[0]
        if name != "curvd":
            assert re.search(rf"^\|.*\b{name}\b", text, re.M), name


@pytest.mark.parametrize(
    "error", curvd.errors.BY_REASON.values(), ids=lambda e: e.__name__
)
def test_every_error_is_documented(error):
    row = f"| `{error.__name__}` | `{error.code}` | `{error.reason}` |"
    assert row in (ROOT / "docs/errors.md").read_text()
