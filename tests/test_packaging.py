"""The promises of the package as a whole: imports, floors, documents, generated code."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import imports
import pytest

import curvd.errors

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_imports_form_the_dag_that_the_architecture_shows():
    """ARCHITECTURE.md holds the table that `python tests/imports.py` prints."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    shown = re.search(
        r"<!-- imports: begin -->\n(.*?)\n?<!-- imports: end -->", text, re.S
    )
    assert shown is not None
    assert shown[1].strip() == imports.markdown()


def test_the_client_never_imports_the_server_or_torch():
    """But for `curvd.graph`, which is imported when something is exported."""
    for name, path in imports.modules().items():
        own, foreign = imports.imports(path, set(imports.modules()))
        if name.split(".")[0] == "curvd" and name not in imports.DOORS:
            assert not [o for o in own if o.startswith("curvd_server")], name
            assert "torch" not in foreign or name.startswith("curvd.graph."), name


def test_the_server_sees_the_client_package_only_through_the_contract():
    shared = "errors status choices types layout reports selection rpcs".split()
    shared += ["tensorfile", "wire"]
    shared += ["convert", "convert_enums", "vocabulary", "v1"]
    shared += ["allocator", "buffers", "finite", "narrow", "probes"]
    shared += [
        f"http2.{half}" for half in "frames line messages sockets stream".split()
    ]
    contract = {f"curvd.{module}" for module in shared}
    for name, path in imports.modules().items():
        own, _ = imports.imports(path, set(imports.modules()))
        if name.startswith("curvd_server") and name not in imports.DOORS:
            assert {o for o in own if not o.startswith("curvd_server")} <= contract, (
                name
            )


def test_the_middle_of_the_server_knows_neither_torch_nor_grpc():
    for middle in ("validate", "sessions", "batching", "storage"):
        path = imports.modules()[f"curvd_server.{middle}"]
        _, foreign = imports.imports(path, set(imports.modules()))
        assert not foreign & {"torch", "grpc"}, middle


def test_importing_curvd_imports_nothing_heavy():
    heavy = {"torch", "scipy", "matplotlib", "rich", "curvd_server"}
    code = f"import curvd, curvd.cli, sys; print(*({heavy!r} & set(sys.modules)))"
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
    text = (ROOT / "ARCHITECTURE.md").read_text()
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
