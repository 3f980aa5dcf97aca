"""Native code for linear programs, made by a process of its own.

A linear program is a straight line of aten operations, so a compiler can fuse what lies
between its matrix products. That takes a minute of Python, which would hold up every
answer of this process; hence a child of lowest priority makes the code, and a thread
loads it, compares it with the program on the session's own numbers, and puts it in the
program's place only if it is right and faster. What was made stays on disk by the hash
of the program, so that later sessions and restarts find it.

Imports nothing of the engine; knows nothing of operators and how programs are made.
"""

from __future__ import annotations

from curvd_server.engine.program.native.compiler import Compiler, CompileTask, Kernel

__all__ = ["CompileTask", "Compiler", "Kernel"]
