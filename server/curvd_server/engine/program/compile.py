"""Native code for linear programs, made by a process of its own.

A linear program is a straight line of aten operations, so a compiler can fuse what lies
between its matrix products. That takes a minute of Python, which would hold up every
answer of this process; hence a child of lowest priority makes the code, and a thread
loads it, compares it with the program on the session's own numbers, and puts it in the
program's place only if it is right and faster. What was made stays on disk by the hash
of the program, so that later sessions and restarts find it.

Nothing is pickled: a program goes to the child as JSON, and comes back as a library.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from curvd.contract import Stage, Work
from curvd.errors import ResourceExhausted
from curvd_server.system import Activities, Ongoing, Quotas, logger, told
from curvd_server.system.quotas import COMPILE_JOBS

WORTH = 0.97
"""Native code must need less than this share of the program's time."""
AGREEMENT = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}
"""How far its rows may be from the program's; both round differently."""
_OPTIONS = {"memory_planning": True, "aot_inductor.precompile_headers": False}
"""Of the compiler: temporaries share one block, so more of them are in the caches; and
headers are not compiled beforehand, which pays from the second program of a child on."""
_NICENESS = 19
"""Of the child: every other process comes first."""
_CPU_S = 1800
"""Seconds that a process of the compiler may compute; a busy machine counts nothing."""
_KEPT = 64
"""Packages on disk; the oldest make room."""
_PLAIN: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "zeros": torch.zeros,
}
"""What a program calls beside aten operations."""
_NAMES = {call: name for name, call in _PLAIN.items()}

Native = Callable[..., Sequence[Tensor | None]]
_CHILD = f"import sys; from {__name__} import main; main(*sys.argv[1:])"
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
        with told():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in folder.iterdir():  # by a server that was killed
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
        self.after_s = after_s
        self._activities, self._quotas = activities, quotas or Quotas()
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, "curvd-compiler")
        self._asked: weakref.WeakSet[fx.GraphModule] = weakref.WeakSet()
        # Those that a quota has put off, and the log has told so.
        self._put_off: weakref.WeakSet[fx.GraphModule] = weakref.WeakSet()
        # Where their code would be, for so many threads: writing a program takes as long as
        # a small net's product.
        self._packages: weakref.WeakKeyDictionary[fx.GraphModule, tuple[int, Path]] = (
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
        known = self._packages.get(module)
        if known is None or known[0] != threads:
            text = self._described(task)
            if text is None:
                return False
            known = self._packages[module] = threads, self._package(text)
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

    def _package(self, text: str) -> Path:
        return self._folder / f"{_key(text)}.pt2"

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
        job = self._thread.submit(self._work, task, text, self._package(text))
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
            if not _is_sound(package):
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
            native = torch._inductor.aoti_load_package(str(package))
            if _is_better(task.kernel, native, arguments):
                task.kernel.native = _aligned(native)
                log.info("native code took over", package=package.name)
        except Exception as error:
            # The program goes on as it is: nobody waits for native code.
            if not self._closed.is_set():  # which ends the compiler
                reason = str(error)[-2000:] or type(error).__name__
                log.warning("not compiled", reason=reason)

    def _make(self, text: str, package: Path) -> None:
        """Let a child compile; what it leaves half done is not found again."""
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
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
            _seal(package).write_text(_digest(target))
            shutil.move(target, package)
        made = sorted(self._folder.glob("*.pt2"), key=lambda p: p.stat().st_mtime)
        for old in made[:-_KEPT]:
            old.unlink()
            _seal(old).unlink(missing_ok=True)

    def _wait(self, child: subprocess.Popen[bytes]) -> None:
        while child.poll() is None:
            if self._closed.wait(0.2):
                child.kill()
                child.wait()


def describe(graph: fx.Graph, arguments: Sequence[Tensor]) -> str:
    """Write a program and how it is called as JSON; the inverse of `rebuild`.

    Args:
        graph: Placeholders, calls of aten operations, and an output.
        arguments: Examples; only their shapes, strides, types and devices count.

    Returns:
        The text.

    Raises:
        TypeError: If the program has something that cannot be written.
    """
    nodes = [
        [node.op, node.name, _target(node), _encoded(node.args), _encoded(node.kwargs)]
        for node in graph.nodes
    ]
    shapes = [
        [list(t.shape), list(t.stride()), _encoded(t.dtype), _encoded(t.device)]
        for t in arguments
    ]
    content = {"nodes": nodes, "arguments": shapes, "threads": torch.get_num_threads()}
    return json.dumps(content, separators=(",", ":"))


def rebuild(text: str) -> tuple[fx.GraphModule, list[Tensor]]:
    """Read a program; the inverse of `describe`.

    Args:
        text: What `describe` wrote.

    Returns:
        The program, and arguments without values.
    """
    content = json.loads(text)
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    for op, name, target, args, kwargs in content["nodes"]:
        arguments = _decoded(args, known), _decoded(kwargs, known)
        if op == "placeholder":
            known[name] = graph.placeholder(name)
        elif op == "output":
            graph.output(tuple(arguments[0][0]))
        else:
            known[name] = graph.call_function(
                _resolved(target), tuple(arguments[0]), arguments[1]
            )
    examples = [
        torch.empty_strided(
            shape, stride, dtype=_decoded(dtype, {}), device=_decoded(device, {})
        )
        for shape, stride, dtype, device in content["arguments"]
    ]
    torch.set_num_threads(content["threads"])  # native code fixes their number
    return fx.GraphModule(nn.Module(), graph), examples


def _seal(package: Path) -> Path:
    """Find the file that says what the bytes of a package were."""
    return package.with_suffix(".sha256")


def _digest(package: Path) -> str:
    with package.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_sound(package: Path) -> bool:
    """Tell whether a package is there as it was made: it is code, and would be run."""
    try:
        return _seal(package).read_text() == _digest(package)
    except (OSError, ValueError):
        return False


def _key(text: str) -> str:
    """Hash all that native code depends on."""
    place = torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        place += torch.cuda.get_device_name()
    known = f"{torch.__version__} {place} {sorted(_OPTIONS.items())} {text}"
    return hashlib.sha256(known.encode()).hexdigest()


def _is_better(kernel: Kernel, native: Native, arguments: list[Tensor]) -> bool:
    """Compare native code with its program: every row, and the time of both."""
    calls: tuple[Native, Native] = (kernel.module.forward, _aligned(native))
    with torch.no_grad():
        want, got = (call(*arguments) for call in calls)
        for w, g in zip(want, got, strict=True):
            if w is None and g is None:
                continue
            if w is None or g is None:
                logger().warning("native code is wrong", gap=None)
                return False
            gap = float((g.double() - w.double()).norm())
            if not gap <= AGREEMENT[w.dtype] * float(w.double().norm()) + 1e-300:
                logger().warning("native code is wrong", gap=gap)
                return False
        rounds = list(_race(calls, arguments))
    share = min(b for _, b in rounds) / max(min(a for a, _ in rounds), 1e-9)
    if share >= WORTH:
        logger().info("native code is no faster", share=round(share, 3))
    return share < WORTH


def _race(
    calls: tuple[Native, Native], arguments: list[Tensor]
) -> Iterator[tuple[float, float]]:
    """Time both in turn, a few rounds; on a CPU other threads' work does not count."""
    on_gpu = arguments[0].is_cuda
    clock = time.perf_counter if on_gpu else time.thread_time

    def seconds(call: Native) -> float:
        start = clock()
        call(*arguments)
        if on_gpu:
            torch.cuda.synchronize(arguments[0].device)
        return clock() - start

    for _ in range(4):
        yield seconds(calls[0]), seconds(calls[1])


def _aligned(native: Native) -> Native:
    """Copy what starts in the middle of a vector: GPU kernels load 16 bytes at once."""

    def call(*arguments: Tensor) -> Sequence[Tensor | None]:
        return native(
            *(
                t.clone() if t.is_cuda and t.data_ptr() % 16 else t  # keeps strides
                for t in arguments
            )
        )

    return call


def _target(node: fx.Node) -> str:
    target: Any = node.target
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target)
    if target not in _NAMES:
        msg = f"the program calls {target}, which cannot be written"
        raise TypeError(msg)
    return _NAMES[target]


def _resolved(name: str) -> Callable[..., Any]:
    if name in _PLAIN:
        return _PLAIN[name]
    _, packet, overload = name.split(".")
    call: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
    return call


def _encoded(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [_encoded(v) for v in value]
    if isinstance(value, dict):
        return {"dict": {k: _encoded(v) for k, v in value.items()}}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return {"torch": str(value).removeprefix("torch.")}
    msg = f"an operand of type {type(value).__name__} cannot be written"
    raise TypeError(msg)


def _decoded(value: Any, known: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decoded(v, known) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return known[content]
    if kind == "dict":
        return {k: _decoded(v, known) for k, v in content.items()}
    return torch.device(content) if kind == "device" else getattr(torch, content)


def main(source: str, target: str, niceness: str) -> None:
    """Compile one program; runs in the child.

    Args:
        source: File of the program, as `write` made it.
        target: File for the package of native code.
        niceness: To give way to products with.
    """
    with contextlib.suppress(OSError):
        os.nice(int(niceness))
    # By its CPU time, and its own children's: a child that comes last may take long.
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    most = _CPU_S if hard == resource.RLIM_INFINITY else min(_CPU_S, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (most, hard))
    module, examples = rebuild(Path(source).read_text())
    with torch.no_grad():
        exported = torch.export.export(module, tuple(examples))
        torch._inductor.aoti_compile_and_package(
            exported, package_path=target, inductor_configs=_OPTIONS
        )
