"""The process that makes native code of one program, and of nothing else."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path
from typing import Any

import torch

from curvd_server.engine.program.native.writing import rebuild

OPTIONS: dict[str, Any] = {
    "memory_planning": True,
    "aot_inductor.precompile_headers": False,
}
"""Of the compiler: temporaries share one block, so more of them are in the caches; and
headers are not compiled beforehand, which pays from the second program of a child on."""
CPU_S = 1800
"""Seconds that a process of the compiler may compute; a busy machine counts nothing."""


def main(source: str, target: str, niceness: str) -> None:
    """Compile one program; runs in the child.

    Args:
        source: File of the program, as `describe` wrote it.
        target: File for the package of native code.
        niceness: To give way to products with.
    """
    with contextlib.suppress(OSError):
        os.nice(int(niceness))
    # By its CPU time, and its own children's: a child that comes last may take long.
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    most = CPU_S if hard == resource.RLIM_INFINITY else min(CPU_S, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (most, hard))
    module, examples = rebuild(Path(source).read_text())
    with torch.no_grad():
        exported = torch.export.export(module, tuple(examples))
        torch._inductor.aoti_compile_and_package(
            exported, package_path=target, inductor_configs=OPTIONS
        )
