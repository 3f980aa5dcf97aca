"""Native code replaces a linear program only if it is right, faster, and still wanted."""

from __future__ import annotations

import gc
import shutil
import threading

import numpy as np
import pytest
import torch
from support.reference import columns, error, problem_of
from support.zoo import ANIMALS

from curvd.contract.specs import OperatorSpec
from curvd.errors import ResourceExhausted
from curvd_server.engine.building import build
from curvd_server.engine.operators.linearize import program
from curvd_server.engine.program.native import Compiler, comparison
from curvd_server.engine.program.native.packages import Packages
from curvd_server.engine.program.native.writing import describe
from curvd_server.engine.tuning.plan import Plan

HUGE = 2**30
ASKING = "curvd_server.engine.program.native.compiler"
ZOO = {a.name: a for a in ANIMALS}


def tasks_of(problem, kind="hessian"):
    linear = program(problem, OperatorSpec(kind=kind), problem.data[0])
    return linear, linear.tasks(range(len(problem.parameters)))


@pytest.fixture
def compiler(tmp_path):
    made = Compiler(tmp_path / "compiled", after_s=0.0)
    yield made
    made.close()


@pytest.fixture
def eager(monkeypatch):
    """Lets `native` stand for what the child made, and find it faster."""

    def use(native):
        monkeypatch.setattr(
            Compiler, "_make", lambda self, text, package: package.write_text(text)
        )
        monkeypatch.setattr(
            torch._inductor, "aoti_load_package", lambda path: native, raising=False
        )
        monkeypatch.setattr(comparison, "WORTH", np.inf)

    return use


def test_right_code_is_used_and_the_report_says_so(eager, compiler):
    problem = problem_of(ZOO["gelu"])
    _, (task,) = tasks_of(problem)
    used = []

    def native(*arguments):
        used.append(1)
        return task.kernel.module.forward(*arguments)

    eager(native)
    operator = build(
        problem,
        OperatorSpec(),
        budget_bytes=HUGE,
        plan=Plan("program"),
        compiler=compiler,
    )
    V = columns(problem, 2)
    compiler.wait()
    used.clear()
    plain = build(problem_of(ZOO["gelu"]), OperatorSpec(), budget_bytes=HUGE)
    assert error(operator.apply(V), plain.apply(V)) < 1e-12
    assert len(used) == 2  # each column, on the mini-batch of the common shape
    assert operator.report.compiled
    assert not plain.report.compiled
    moved = operator.at(problem.with_parameters({}))
    used.clear()
    moved.apply(V[:1])
    assert used


def test_wrong_code_is_not_used(eager, compiler):
    problem = problem_of(ZOO["gelu"])
    linear, tasks = tasks_of(problem)
    forward = tasks[0].kernel.module.forward
    eager(lambda *arguments: [1.001 * row for row in forward(*arguments)])
    compiler.consider(tasks, spent_s=1.0)
    compiler.wait()
    assert linear is not None
    assert tasks[0].kernel.native is None


def test_slower_code_is_not_used(eager, compiler, monkeypatch):
    problem = problem_of(ZOO["gelu"])
    linear, tasks = tasks_of(problem)
    eager(tasks[0].kernel.module.forward)
    monkeypatch.setattr(comparison, "WORTH", 0.0)
    compiler.consider(tasks, spent_s=1.0)
    compiler.wait()
    assert linear is not None
    assert tasks[0].kernel.native is None


def test_other_work_on_the_machine_does_not_keep_native_code_out(
    eager, compiler, monkeypatch
):
    """By the wall it looks slower, because the machine was busy; it computes less."""
    problem = problem_of(ZOO["gelu"])
    linear, tasks = tasks_of(problem)
    forward = tasks[0].kernel.module.forward
    computed_s, passed_s = 0.0, 0.0

    def spend(computing_s: float, waiting_s: float) -> None:
        nonlocal computed_s, passed_s
        computed_s += computing_s
        passed_s += computing_s + waiting_s

    def native(*arguments):
        spend(1.0, 9.0)
        return forward(*arguments)

    def program(*arguments):
        spend(2.0, 0.0)
        return forward(*arguments)

    monkeypatch.setattr(tasks[0].kernel.module, "forward", program)
    eager(native)
    monkeypatch.setattr(comparison, "WORTH", 0.97)
    monkeypatch.setattr(comparison.time, "thread_time", lambda: computed_s)
    monkeypatch.setattr(comparison.time, "perf_counter", lambda: passed_s)
    compiler.consider(tasks, spent_s=1.0)
    compiler.wait()
    assert linear is not None
    assert tasks[0].kernel.native is not None


def test_a_compiler_that_fails_is_not_asked_again(compiler, monkeypatch):
    asked = []

    def fail(self, text, package):
        asked.append(package)
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(Compiler, "_make", fail)
    linear, tasks = tasks_of(problem_of(ZOO["gelu"]))
    for _ in range(2):
        compiler.consider(tasks, spent_s=1.0)
        compiler.wait()
    assert len(asked) == 1
    assert linear is not None
    assert tasks[0].kernel.native is None


def test_a_session_that_has_gone_is_not_kept_for_it(eager, compiler):
    problem = problem_of(ZOO["gelu"])
    linear, tasks = tasks_of(problem)
    eager(tasks[0].kernel.module.forward)
    del linear
    gc.collect()
    assert tasks[0].arguments() is None
    compiler.consider(tasks, spent_s=1.0)
    compiler.wait()
    assert tasks[0].kernel.native is None


def test_what_is_used_little_is_not_compiled(eager, tmp_path):
    patient = Compiler(tmp_path, after_s=60.0)
    linear, tasks = tasks_of(problem_of(ZOO["gelu"]))
    eager(tasks[0].kernel.module.forward)
    patient.consider(tasks, spent_s=59.0)
    patient.wait()
    assert tasks[0].kernel.native is None
    assert linear is not None
    # ... unless it was compiled before: by an earlier process, for example.
    text = describe(tasks[0].kernel.module.graph, tasks[0].arguments())
    Packages(tmp_path).path(text).write_text("")
    patient.consider(tasks, spent_s=0.0)
    patient.wait()
    patient.close()
    assert tasks[0].kernel.native is not None


@pytest.fixture
def written(monkeypatch):
    """Counts how often a program is written."""
    seen = []

    def counted(graph, arguments):
        seen.append(graph)
        return describe(graph, arguments)

    monkeypatch.setattr(f"{ASKING}.describe", counted)
    return seen


def test_a_program_is_written_once_however_many_products_there_are(
    eager, tmp_path, written
):
    patient = Compiler(tmp_path, after_s=60.0)
    linear, tasks = tasks_of(problem_of(ZOO["gelu"]), "ggn")
    assert len(tasks) == 2
    for product in range(100):
        patient.consider(tasks, spent_s=0.01 * product)
    assert len(written) == 2
    # What another session had made meanwhile is found nevertheless.
    for task in tasks:
        eager(task.kernel.module.forward)
        text = describe(task.kernel.module.graph, task.arguments())
        package = Packages(tmp_path).path(text)
        package.write_text("")
        patient.consider([task], spent_s=1.0)
        patient.wait()
        assert task.kernel.native is not None
    assert linear is not None
    patient.close()


def test_a_program_that_a_quota_puts_off_is_not_written(compiler, monkeypatch, written):
    def full(name, count):
        raise ResourceExhausted("enough for now")

    monkeypatch.setattr(compiler._quotas, "take", full)
    linear, tasks = tasks_of(problem_of(ZOO["gelu"]))
    for _ in range(100):
        compiler.consider(tasks, spent_s=1.0)
    assert linear is not None
    assert written == []


def test_code_that_came_too_late_for_a_version_serves_the_next(
    eager, compiler, monkeypatch, tmp_path
):
    """Compiling takes longer than the steps between which a net is trained."""
    problem = problem_of(ZOO["gelu"])
    spec = OperatorSpec()
    held = [program(problem, spec, problem.data[0])]
    (task,) = held[0].tasks(range(len(problem.parameters)))
    eager(task.kernel.module.forward)
    made = []

    def make(self, text, package):
        held.clear()  # the next version has come
        gc.collect()
        made.append(package)
        code = tmp_path / "made"
        code.write_text(text)
        self._packages.keep(code, package)

    monkeypatch.setattr(Compiler, "_make", make)
    compiler.consider([task], spent_s=1.0)
    compiler.wait()
    assert task.kernel.native is None
    moved = problem.with_parameters({})
    linear = program(moved, spec, moved.data[0])
    (again,) = linear.tasks(range(len(moved.parameters)))
    assert again.kernel is task.kernel
    compiler.consider([again], spent_s=1.0)
    compiler.wait()
    assert again.kernel.native is not None
    assert len(made) == 1


def test_any_failure_is_said(eager, compiler, caplog):
    linear, tasks = tasks_of(problem_of(ZOO["gelu"]))

    def native(*arguments):
        raise LookupError("no such symbol")

    eager(native)
    with caplog.at_level("INFO"):
        compiler.consider(tasks, spent_s=1.0)
        compiler.wait()
    assert linear is not None
    assert "not compiled" in caplog.text and "no such symbol" in caplog.text


def test_a_server_that_stops_does_not_complain_that_it_ended_the_compiler(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(f"{ASKING}._CHILD", "import time; time.sleep(600)")
    stopped = Compiler(tmp_path, after_s=0.0)
    linear, tasks = tasks_of(problem_of(ZOO["gelu"]))
    begun = threading.Event()
    wait = Compiler._wait

    def waits(self, child):
        begun.set()
        wait(self, child)

    monkeypatch.setattr(Compiler, "_wait", waits)
    with caplog.at_level("INFO"):
        stopped.consider(tasks, spent_s=1.0)
        assert begun.wait(60)
        stopped.close()
    assert linear is not None
    assert "not compiled" not in caplog.text


def test_a_child_that_dies_is_reported(compiler, tmp_path):
    with pytest.raises(RuntimeError, match="ended with"):
        compiler._make("no program", tmp_path / "package.pt2")
    assert not list(tmp_path.glob("*.pt2"))


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_real_compiler_makes_code_that_agrees(compiler, monkeypatch):
    """The whole way, on a net that is small enough to wait for."""
    monkeypatch.setattr(f"{ASKING}._NICENESS", 0)  # also on a busy machine
    monkeypatch.setattr(comparison, "WORTH", np.inf)
    linear, tasks = tasks_of(problem_of(ZOO["gelu"]))
    compiler.consider(tasks, spent_s=1.0)
    compiler.wait()
    native, forward = tasks[0].kernel.native, tasks[0].kernel.module.forward
    assert native is not None
    arguments = tasks[0].arguments()
    with torch.no_grad():
        for got, want in zip(native(*arguments), forward(*arguments), strict=True):
            assert error(got, want) < 1e-12
    assert linear is not None
