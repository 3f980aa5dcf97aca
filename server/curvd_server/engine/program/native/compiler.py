"""Asking for native code: a child of lowest priority makes it, a thread puts it in.

Nothing is pickled: a program goes to the child as JSON, and comes back as a library.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from curvd.contract import Stage, Work
from curvd.errors import ResourceExhausted
from curvd_server.engine.program.native import child
from curvd_server.engine.program.native.comparison import Native, aligned, is_better
from curvd_server.engine.program.native.packages import Packages, is_sound
from curvd_server.engine.program.native.writing import describe
from curvd_server.system import Activities, Ongoing, Quotas, logger
from curvd_server.system.quotas import COMPILE_JOBS

_NICENESS = 19
"""Of the child: every other process comes first."""
_CHILD = f"import sys; from {child.__name__} import main; main(*sys.argv[1:])"
"""Not by ``-m``: what runs there would be loaded a second time beside its package."""


@dataclass(slots=True)
class Kernel:
    """A linear program as a function: constants first, then tangents."""

    module: fx.GraphModule
    names: tuple[str, ...]
    """Of the constants, in order."""
    native: Native | None = None
    """The same in native code, once it is there and was found right."""


@dataclass(frozen=True, slots=True)
class CompileTask:
    """A kernel, and how to call it as a session does."""

    kernel: Kernel
    arguments: Callable[[], list[Tensor] | None]
    """Constants and some tangents; None if the session has gone meanwhile."""


class Compiler:
    """Makes native code in the background. Threads may share it.

    Args:
        folder: Where code is kept; made if it is not there.
        after_s: Seconds that an operator must have computed before it is compiled.
        activities: Where the making is listed; None: nowhere.
        quotas: How much may be made for one caller at once.
    """

    def __init__(
        self,
        folder: Path,
        after_s: float,
        activities: Activities | None = None,
        quotas: Quotas | None = None,
    ) -> None:
        self.after_s = after_s
        self._activities, self._quotas = activities, quotas or Quotas()
        self._packages = Packages(folder)
        self._thread = ThreadPoolExecutor(1, "curvd-compiler")
        self._asked: weakref.WeakSet[fx.GraphModule] = weakref.WeakSet()
        # Those that a quota has put off, and the log has told so.
        self._put_off: weakref.WeakSet[fx.GraphModule] = weakref.WeakSet()
        # Where their code would be, for so many threads: writing a program takes as long as
        # a small net's product.
        self._places: weakref.WeakKeyDictionary[fx.GraphModule, tuple[int, Path]] = (
            weakref.WeakKeyDictionary()
        )
        self._closed = threading.Event()

    def consider(self, tasks: Sequence[CompileTask], spent_s: float) -> None:
        """Compile kernels that were used enough, or that were compiled before.

        It is called after every product.

        Args:
            tasks: All kernels of an operator.
            spent_s: Seconds that it has computed.
        """
        for task in tasks:
            module = task.kernel.module
            if module in self._asked or task.kernel.native is not None:
                continue
            if spent_s >= self.after_s or self._is_made(task):
                self._submit(task)

    def _is_made(self, task: CompileTask) -> bool:
        """Tell whether a kernel's code is on disk; its program is written only once."""
        module, threads = task.kernel.module, torch.get_num_threads()
        known = self._places.get(module)
        if known is None or known[0] != threads:
            text = self._described(task)
            if text is None:
                return False
            known = self._places[module] = threads, self._packages.path(text)
        return known[1].exists()

    def _described(self, task: CompileTask) -> str | None:
        """Write a kernel's program; None if that cannot be, or if its session has gone."""
        arguments = task.arguments()
        if arguments is None:
            return None
        try:
            return describe(task.kernel.module.graph, arguments)
        except TypeError as error:
            self._asked.add(task.kernel.module)
            logger().info("not compiled", reason=str(error))
            return None

    def _submit(self, task: CompileTask) -> None:
        """Have code made in its turn, within its caller's quota; else it is asked later."""
        module, give = task.kernel.module, self._quotas.give
        try:
            owner = self._quotas.take(COMPILE_JOBS, 1)
        except ResourceExhausted as error:
            if module not in self._put_off:
                self._put_off.add(module)
                log = logger().bind(**error.metadata)
                log.warning("not compiled yet", error=str(error))
            return
        text = self._described(task)
        if text is None:
            give(COMPILE_JOBS, 1, owner)
            return
        self._asked.add(module)
        job = self._thread.submit(self._work, task, text, self._packages.path(text))
        job.add_done_callback(lambda job: give(COMPILE_JOBS, 1, owner))

    def wait(self) -> None:
        """Wait until everything that was asked for is there; for tests and benches."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Stop the child, if there is one."""
        self._closed.set()
        self._thread.shutdown(cancel_futures=True)

    def _work(self, task: CompileTask, text: str, package: Path) -> None:
        log = logger()
        try:
            if not is_sound(package):
                start = time.monotonic()
                work = Ongoing(
                    Work.IMPROVING, "native code", activities=self._activities
                )
                with work:
                    work.enter(Stage.COMPILING)
                    self._make(text, package)
                seconds = round(time.monotonic() - start, 1)
                log.info("compiled", package=package.name, seconds=seconds)
            if self._closed.is_set():
                return
            arguments = task.arguments()
            if arguments is None:
                # Its operator has other parameters by now, or another plan: what shares the
                # kernel asks again, and finds the package.
                self._asked.discard(task.kernel.module)
                log.info("native code waits for another product", package=package.name)
                return
            loaded = torch._inductor.aoti_load_package(str(package))
            native = aligned(loaded)
            if is_better(task.kernel.module.forward, native, arguments):
                task.kernel.native = native
                log.info("native code took over", package=package.name)
        except Exception as error:
            # The program goes on as it is: nobody waits for native code.
            if not self._closed.is_set():  # which ends the compiler
                reason = str(error)[-2000:] or type(error).__name__
                log.warning("not compiled", reason=reason)

    def _make(self, text: str, package: Path) -> None:
        """Let a child compile; what it leaves half done is not found again."""
        with tempfile.TemporaryDirectory(dir=self._packages.folder) as name:
            source, target = Path(name, "program.json"), Path(name, "made.pt2")
            source.write_text(text)
            command = [sys.executable, "-W", "ignore", "-c", _CHILD]
            command += [str(source), str(target), str(_NICENESS)]
            output = Path(name, "output.txt")
            with output.open("wb") as sink:
                child = subprocess.Popen(
                    command,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": name, "TMPDIR": name},
                )
                self._wait(child)
            if child.returncode or not target.exists():
                msg = f"the compiler ended with {child.returncode}: "
                raise RuntimeError(msg + output.read_text(errors="replace")[-1000:])
            self._packages.keep(target, package)

    def _wait(self, child: subprocess.Popen[bytes]) -> None:
        while child.poll() is None:
            if self._closed.wait(0.2):
                child.kill()
                child.wait()
