"""Bytes against the decoder and the dry run, guided by coverage; needs atheris.

    pip install atheris
    python tests/fuzz_bytes.py [-atheris_runs=100000] [-max_len=4096]

Anything but a typed refusal is a crash, which atheris reports with the bytes.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["curvd_server.graph"]):
    from curvd_server.graph.decoder import canonical, decode
    from curvd_server.graph.execution.dryrun import dry_run
    from curvd_server.graph.execution.interpret import Interpreter
    from curvd_server.graph.execution.module import GraphModule

from support.graphs import HONEST

from curvd.errors import CurvdError


def attempt(data: bytes) -> None:
    """What a server does with a graph before it takes a tensor."""
    try:
        interpreter = Interpreter(decode(data))
        dry_run(interpreter, batch=2, limit_bytes=64 << 20)
        GraphModule(interpreter)
    except CurvdError:
        pass


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as corpus:
        for k, message in enumerate(HONEST):
            Path(corpus, str(k)).write_bytes(canonical(message))
        atheris.Setup([*sys.argv, corpus], attempt)
        atheris.Fuzz()
