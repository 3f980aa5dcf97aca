"""When native code is asked for: of what was used long enough, if it is one program."""

from __future__ import annotations

from curvd_server.engine.operators import Linearisation
from curvd_server.engine.program import Compilable, Compiler, CompileTask


class NativeCode:
    """The native code of one operator's common mini-batch.

    Args:
        compiler: Makes it in the background; None: nothing does.
        spent_s: Seconds that the operator has computed at earlier versions.
    """

    def __init__(self, compiler: Compiler | None, spent_s: float = 0.0) -> None:
        self._compiler, self._tasks = compiler, list[CompileTask]()
        self.spent_s = spent_s
        """Seconds that the operator has computed."""

    def is_ready(self) -> bool:
        """Tell whether native code computes all but odd mini-batches."""
        return bool(self._tasks) and all(t.kernel.native for t in self._tasks)

    def consider(
        self, linear: Linearisation | None, blocks: list[range], width: int
    ) -> None:
        """Ask for native code, if a mini-batch is cached that is one block.

        More blocks would be as many programs, and columns that go through together
        would be others again.

        Args:
            linear: The linearisation of the common mini-batch, if it is cached.
            blocks: Diagonal blocks of the operator.
            width: Columns that go through together.
        """
        if self._compiler is None or width > 1 or len(blocks) > 1:
            return
        if isinstance(linear, Compilable) and not self._tasks:
            self._tasks = linear.tasks(blocks[0])
        if not self.is_ready():
            self._compiler.consider(self._tasks, self.spent_s)
