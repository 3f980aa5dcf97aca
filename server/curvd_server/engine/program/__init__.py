"""The linear program of an operator: traced, simplified, cut to a block, fused, compiled.

Imports `curvd_server.engine.objective`; knows nothing of plans and of truth.
"""

from __future__ import annotations

from curvd_server.engine.program.interruptible import Interruptible
from curvd_server.engine.program.linear_program import (
    Compilable,
    Emits,
    HessianProgram,
    JacobianProgram,
    Rows,
    held_bytes,
    hessian_program,
    jacobian_program,
)
from curvd_server.engine.program.native import Compiler, CompileTask
from curvd_server.engine.program.replay import ReplayedProgram
from curvd_server.engine.program.trace import trace_outputs

__all__ = [
    "Compilable",
    "CompileTask",
    "Compiler",
    "Emits",
    "HessianProgram",
    "Interruptible",
    "JacobianProgram",
    "ReplayedProgram",
    "Rows",
    "held_bytes",
    "hessian_program",
    "jacobian_program",
    "trace_outputs",
]
