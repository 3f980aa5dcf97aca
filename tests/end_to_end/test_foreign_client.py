"""A client in another language, with nothing of ours but the contract, gets it right."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "node"
PROTO = Path(__file__).parents[2] / "proto"


def test_a_node_client_gets_a_right_product(live_target, tmp_path):
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node.js is not installed")
    for name in ("package.json", "client.js"):
        shutil.copy(HERE / name, tmp_path)
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund"]
    if subprocess.run(install, cwd=tmp_path, check=False).returncode:
        pytest.skip("npm cannot install @grpc/grpc-js here")
    done = subprocess.run(
        ["node", "client.js", PROTO, live_target],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["size"] == 10
    assert answer["worst"] < 1e-12
