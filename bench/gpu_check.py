"""One command for a machine with a CUDA device: what holds there, and how fast it is.

    make gpu-check             # python bench/gpu_check.py --json gpu-check.json

It needs no network and at most eight minutes, prints one table and writes one JSON. Times
on a GPU are CUDA events', medians of ten; on a CPU, where the same script must pass, the
thread's own. What a device has not is "not run", with the reason; a check that fails ends
the run with 1. Needs torch 2.11 or newer.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import curvd
from curvd.contract import DatasetSpec, Dtype, LossSpec, OperatorSpec
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig
from curvd_server.engine import Compiler, Problem
from curvd_server.engine.building import build
from curvd_server.engine.operator import Operator
from curvd_server.engine.operators import MODES
from curvd_server.engine.tuning import Plan
from curvd_server.models import BUILDERS

ROOT = Path(__file__).parent.parent
LIMIT_S = 480
TESTS_S = 200
COMPILE_S = 180
"""Longest that native code of one small net may take; beyond it something is wrong."""
WIDTHS = {"activation": "tanh", "widths": [64, 64, 64, 64, 10]}
ROWS, BATCH = 512, 128
GIB = 2**30
ERRORS = {Dtype.FLOAT64: 1e-9, Dtype.FLOAT32: 1e-4, Dtype.BFLOAT16: 0.1}
"""How far products may be from float64 on the CPU, relative to their norm."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    check: str
    value: str
    ok: bool | None = None
    """None: measured, not judged, or not run."""


class NotRun(Exception):
    """Says why a check cannot run here."""


class Bench:
    """A small net, whose products are bound by launches, on one device."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        torch.manual_seed(0)
        self.module: nn.Module = BUILDERS["mlp"](WIDTHS)
        x, y = torch.randn(ROWS, 64), torch.randint(0, 10, (ROWS,))
        self.arrays = {"x": x, "y": y}
        self._truth: dict[Any, Tensor] = {}

    def problem(self, dtype: Dtype = Dtype.FLOAT32, **options: Any) -> Problem:
        """The objective on the device."""
        options = {"device": self.device} | options
        data = DatasetSpec(inputs=("x",), target="y", batch_size=BATCH)
        loss = LossSpec(name="cross_entropy")
        return Problem.load(
            self.module, {}, self.arrays, data, loss, dtype=dtype, **options
        )

    def operator(self, problem: Problem, mode: str | None = None, **options: Any):
        """Its Hessian; with a mode, nothing is timed."""
        plan = None if mode is None else Plan(mode)
        options = {"budget_bytes": GIB, "plan": plan} | options
        built = build(problem, OperatorSpec(), **options)
        if mode is not None and built.plan.mode != mode:
            msg = f"{mode} was not verified"
            raise AssertionError(msg)
        return built

    def vector(self, problem: Problem) -> Tensor:
        """One column ``[1, P]`` on the CPU."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(1, problem.layout.size, generator=generator)

    def error(self, got: Tensor) -> float:
        """How far a product is from double backward in float64 on the CPU."""
        if "truth" not in self._truth:
            self._truth["truth"] = self._double_backward()
        want = self._truth["truth"]
        return float((got.cpu().double() - want).norm() / want.norm())

    def _double_backward(self) -> Tensor:
        """``H v`` by torch alone."""
        net = BUILDERS["mlp"](WIDTHS).double()
        net.load_state_dict(self.module.state_dict())
        parameters = list(net.parameters())
        size = sum(p.numel() for p in parameters)
        v = torch.randn(1, size, generator=torch.Generator().manual_seed(1)).double()
        x, y = self.arrays["x"].double(), self.arrays["y"]
        loss = nn.functional.cross_entropy(net(x), y)
        rows = torch.autograd.grad(loss, parameters, create_graph=True)
        flat = torch.cat([r.reshape(-1) for r in rows])
        pulled = torch.autograd.grad(flat @ v[0], parameters)
        return torch.cat([r.reshape(-1) for r in pulled])[None]

    def milliseconds(self, run: Callable[[], Any], repeats: int = 10) -> float:
        """Time a function: the median of some runs, behind two to warm up."""
        for _ in range(2):
            run()
        times = []
        for _ in range(repeats):
            if self.on_gpu:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
            else:
                start = time.thread_time()
                run()
                times.append(1e3 * (time.thread_time() - start))
        return statistics.median(times)

    def allocated_bytes(self) -> int:
        """Memory of tensors on the device, by its allocator or by walking all objects."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated(self.device)
        storages = {}
        for thing in gc.get_objects():
            if type(thing) is Tensor and thing.layout is torch.strided:
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())


def run_tests(bench: Bench) -> Iterator[Row]:
    """The tests of devices that are not the CPU: on CUDA, else on the stand-in."""
    marker = "gpu" if bench.on_gpu else "standin"
    folders = [str(ROOT / "tests" / name) for name in ("device", "engine", "linalg")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", marker, *folders]
    try:
        done = subprocess.run(
            command, cwd=ROOT, timeout=TESTS_S, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        yield Row(f"tests ({marker})", f"not done after {TESTS_S} s", ok=False)
        return
    last = [line for line in done.stdout.splitlines() if "%]" in line or "==" in line]
    said = last[-1].strip() if last else done.stdout[-200:]
    yield Row(
        f"tests ({marker})", f"exit {done.returncode}: {said}", not done.returncode
    )


def memory_comes_back(bench: Bench) -> Iterator[Row]:
    """Everything that sessions held is returned, to the byte."""
    _use_and_close(bench)  # libraries keep workspaces from their first use on
    before = bench.allocated_bytes()
    for _ in range(3):
        most = _use_and_close(bench)
    left = bench.allocated_bytes() - before
    value = f"{left} bytes left of {most - before} after three sessions"
    yield Row("memory comes back", value, left == 0)


def _use_and_close(bench: Bench) -> int:
    problem = bench.problem()
    operator = bench.operator(problem, "program")
    operator.apply(bench.vector(problem))
    most = bench.allocated_bytes()
    operator.close()
    return most


def streamed(bench: Bench) -> Iterator[Row]:
    """Data that stays on the host gives the same bits."""
    resident, there = bench.problem(), bench.problem(resident_bytes=0)
    v = bench.vector(resident)
    first, second = (
        bench.operator(p, "program", budget_bytes=0) for p in (resident, there)
    )
    same = torch.equal(first.apply(v), second.apply(v))
    times = [bench.milliseconds(lambda o=o: o.apply(v)) for o in (first, second)]
    value = f"{times[1]:.2f} ms, {times[0]:.2f} ms resident; same bits: {same}"
    yield Row("streamed data", value, same)


def products(bench: Bench) -> Iterator[Row]:
    """Each mode in float32, and the plan that is chosen."""
    problem = bench.problem()
    v = bench.vector(problem).to(bench.device)
    for mode in [*MODES, None]:
        operator = bench.operator(problem, mode)
        gap = bench.error(operator.apply(v))
        took = bench.milliseconds(lambda o=operator: o.apply(v))
        name = mode or f"chosen: {operator.report.mode}"
        value = f"{took:.3f} ms, error {gap:.1e}"
        yield Row(f"float32 {name}", value, gap < ERRORS[Dtype.FLOAT32])
    if "replayed_program" not in MODES:
        yield Row("CUDA graph replay", "not run: there is no CUDA device")


def compiled(bench: Bench) -> Iterator[Row]:
    """Native code beside the program that it is made of."""
    problem = bench.problem()
    v = bench.vector(problem).to(bench.device)
    with tempfile.TemporaryDirectory() as folder:
        compiler = Compiler(Path(folder, "compiled"), after_s=0.0)
        try:
            operator = bench.operator(problem, "program", compiler=compiler)
            eager = bench.milliseconds(lambda: operator.apply(v))
            waiter = threading.Thread(target=compiler.wait, daemon=True)
            waiter.start()
            waiter.join(COMPILE_S)
            took = bench.milliseconds(lambda: operator.apply(v))
            gap, is_native = bench.error(operator.apply(v)), operator.is_compiled
            is_made = any(Path(folder, "compiled").glob("*.pt2"))
        finally:
            compiler.close()
    if not is_made:
        found = shutil.which(os.environ.get("CXX", "g++"))
        if found is None:
            raise NotRun("there is no C++ compiler (g++, or what CXX says)")
        why = f"not made within {COMPILE_S} s" if waiter.is_alive() else "failed"
        yield Row("compiled against eager", f"native code by {found}: {why}", ok=False)
        return
    what = "native code" if is_native else "native code not faster, not taken"
    value = f"{what}: {took:.3f} ms, {eager:.3f} ms eager, error {gap:.1e}"
    yield Row("compiled against eager", value, gap < ERRORS[Dtype.FLOAT32])


def precisions(bench: Bench) -> Iterator[Row]:
    """Types, and TF32, which the server leaves as torch has it: off for matrix products."""
    for dtype in (Dtype.FLOAT64, Dtype.BFLOAT16):
        yield _precision(bench, dtype, str(dtype), ERRORS[dtype])
    if not bench.on_gpu:
        yield Row("float32 with TF32", "not run: TF32 is CUDA's")
        return
    before = torch.get_float32_matmul_precision()
    try:
        for precision, name in (("highest", "without"), ("high", "with")):
            torch.set_float32_matmul_precision(precision)
            allowed = 1e-4 if precision == "highest" else 1e-2
            yield _precision(bench, Dtype.FLOAT32, f"float32 {name} TF32", allowed)
    finally:
        torch.set_float32_matmul_precision(before)


def _precision(bench: Bench, dtype: Dtype, name: str, allowed: float) -> Row:
    problem = bench.problem(dtype)
    operator = bench.operator(problem, "double_backward")
    v = bench.vector(problem).to(bench.device)
    gap = bench.error(operator.apply(v))
    took = bench.milliseconds(lambda: operator.apply(v))
    return Row(f"{name} products", f"{took:.3f} ms, error {gap:.1e}", gap < allowed)


def wire_to_device(bench: Bench) -> Iterator[Row]:
    """From a client's array to the device and back, beside the product alone."""
    index = bench.device.index or 0
    device = f"cuda:{index}" if bench.on_gpu else "cpu"
    arrays = {name: a.numpy() for name, a in bench.arrays.items()}
    with tempfile.TemporaryDirectory() as folder:
        config = ServerConfig(
            listen="127.0.0.1:0", data_dir=Path(folder), device=device
        )
        with serve_in_thread(config) as target, curvd.connect(target) as client:
            model = client.register_model("mlp", WIDTHS, self_state(bench))
            data = client.register_dataset(
                arrays, inputs=["x"], target="y", batch_size=BATCH
            )
            session = client.create_session(model, data, loss="cross_entropy")
            H = session.hessian()
            v = bench.vector(bench.problem()).numpy()[0]
            gap = bench.error(torch.from_numpy(np.array(H @ v))[None])
            times = []
            for _ in range(20):
                start = time.perf_counter()
                H @ v
                times.append(1e3 * (time.perf_counter() - start))
            mode = H.last.plan.mode
    value = f"{statistics.median(times):.2f} ms by the wall ({mode}), error {gap:.1e}"
    yield Row("wire to device and back", value, gap < ERRORS[Dtype.FLOAT32])


def self_state(bench: Bench) -> dict[str, Tensor]:
    """The net's parameters, as a client has them."""
    return dict(bench.module.state_dict())


def peer(bench: Bench) -> Iterator[Row]:
    """curvlinops' Hessian of the same net in the same run."""
    try:
        import curvlinops
    except ImportError as error:
        raise NotRun(str(error)) from error
    net = BUILDERS["mlp"](WIDTHS).to(bench.device)
    net.load_state_dict(bench.module.state_dict())
    x, y = (a.to(bench.device) for a in bench.arrays.values())
    data = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    parameters = [p for p in net.parameters() if p.requires_grad]
    theirs = curvlinops.HessianLinearOperator(
        net, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False
    )
    problem = bench.problem()
    v = bench.vector(problem).to(bench.device)
    gap = bench.error((theirs @ v[0])[None])
    ours: Operator = bench.operator(problem)
    times = [
        bench.milliseconds(run)
        for run in (lambda: theirs @ v[0], lambda: ours.apply(v))
    ]
    value = (
        f"{times[0]:.3f} ms, ours {times[1]:.3f} ms: {times[0] / times[1]:.1f} times "
        f"faster; its error {gap:.1e}"
    )
    yield Row("curvlinops", value)


CHECKS: tuple[Callable[[Bench], Iterator[Row]], ...] = (
    products,
    precisions,
    memory_comes_back,
    streamed,
    peer,
    wire_to_device,
    compiled,
    run_tests,
)


def rows_of(bench: Bench, until_s: float) -> Iterator[Row]:
    """Run what fits the time."""
    for check in CHECKS:
        name = check.__name__.replace("_", " ")
        if time.monotonic() > until_s - (TESTS_S if check is run_tests else 0):
            yield Row(name, "not run: the time is over", ok=False)
            continue
        try:
            yield from check(bench)
        except NotRun as why:
            yield Row(name, f"not run: {why}")
        except Exception as error:  # one check that fails must not hide the others
            yield Row(name, f"{type(error).__name__}: {str(error)[:200]}", ok=False)


def main() -> int:
    """Print the table, write the JSON, and say whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here)
    parser.add_argument("--json", type=Path, default=Path("gpu-check.json"))
    arguments = parser.parse_args()
    if not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json {arguments.json}: there is no such folder")
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        parser.error(f"--device {arguments.device} is not to be had here: {first}")
    bench, start = Bench(arguments.device), time.monotonic()
    name = torch.cuda.get_device_name(bench.device) if bench.on_gpu else "CPU"
    print(f"curvd on {name}, torch {torch.__version__}", flush=True)
    rows = []
    for row in rows_of(bench, start + LIMIT_S):
        rows.append(row)
        verdict = {True: "ok", False: "FAILED", None: ""}[row.ok]
        print(f"{row.check:36} {row.value:74} {verdict}", flush=True)
    content = {
        "device": name,
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - start, 1),
        "rows": [asdict(row) for row in rows],
    }
    arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    return int(any(row.ok is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
