"""Workers that are processes: killed, frozen, or left behind by the front."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("torch")
from support.fleets import device_of, eager_hessian, fleet_of, load, never, state

from curvd.contract.specs import OperatorSpec
from curvd_server.fleet import LocalLauncher
from curvd_server.linalg import Products, eigsh
from curvd_server.linalg.base import drain


@pytest.fixture(scope="module")
def fleet():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CURVD_TOKEN", "not for workers")
        with fleet_of(2, launcher=LocalLauncher(), patience_s=5.0) as two:
            yield two


@pytest.fixture(scope="module")
def operator(fleet):
    problem = load(device_of(fleet))
    return problem.build(OperatorSpec(), budget_bytes=1 << 30, cancelled=never)


def pid_of(fleet, rank):
    with fleet._changed:
        while not fleet.seats[rank].is_ready:
            fleet._changed.wait()
        return fleet.seats[rank].hello.pid


def dense(operator):
    return operator.apply(np.eye(operator.size), cancelled=never)


def test_processes_compute_what_eager_torch_does(operator):
    np.testing.assert_allclose(dense(operator), eager_hessian(), atol=1e-13)


@pytest.mark.parametrize(
    ("rank", "signal_number"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)]
)
def test_a_worker_that_is_killed_or_frozen_is_replaced_and_the_bits_stay(
    fleet, operator, rank, signal_number
):
    want = dense(operator)
    before = pid_of(fleet, rank)
    os.kill(before, signal_number)
    np.testing.assert_array_equal(dense(operator), want)
    assert pid_of(fleet, rank) != before
    assert not psutil.pid_exists(before)


def test_a_worker_that_is_killed_while_it_moves_holds_the_new_version(fleet, operator):
    """The update waits for the new worker, or finds that the old one's answer is void."""
    problem = operator._problem
    os.kill(pid_of(fleet, 1), signal.SIGKILL)
    moved = problem.with_parameters(state(seed=5))
    new = moved.move(operator)
    np.testing.assert_allclose(dense(new), eager_hessian(state(5)), atol=1e-13)
    np.testing.assert_allclose(dense(operator), eager_hessian(), atol=1e-13)


def test_a_worker_knows_no_token_of_the_server(fleet):
    for rank in (0, 1):
        environment = Path(f"/proc/{pid_of(fleet, rank)}/environ").read_bytes()
        assert b"CURVD_TOKEN" not in environment
        assert fleet._keeper._secret.hex().encode() not in environment
        command = Path(f"/proc/{pid_of(fleet, rank)}/cmdline").read_bytes()
        assert fleet._keeper._secret.hex().encode() not in command


FRONT = """
import sys
from support.fleets import fleet_of
from curvd_server.fleet import LocalLauncher
with fleet_of(2, launcher=LocalLauncher()) as fleet:
    print(*(seat.hello.pid for seat in fleet.seats), flush=True)
    sys.stdin.read()
"""


def test_workers_end_with_a_front_that_is_killed():
    """One that is stopped cannot see that its pipe ends; the system kills it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", FRONT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as front:
        workers = [psutil.Process(int(n)) for n in front.stdout.readline().split()]
        assert len(workers) == 2
        workers[0].suspend()
        front.kill()
        gone, alive = psutil.wait_procs(workers, timeout=120)
        assert (len(gone), alive) == (2, [])


def test_a_query_whose_worker_is_killed_ends_with_the_same_bits(fleet, operator):
    def eigenvectors(at=-1):
        """Those of the Hessian; a worker is killed before a product."""

        def multiply(V):
            if products.done == at:
                os.kill(pid_of(fleet, 1), signal.SIGKILL)
            return operator.multiply(V, cancelled=never)

        products = Products(
            multiply,
            size=operator.size,
            dtype=operator.dtype,
            runner=operator.spread,
        )
        return drain(products.begin(eigsh, 3)), products.done

    want, products = eigenvectors()
    found, spent = eigenvectors(at=products // 2)
    assert (found.values, found.residuals) == (want.values, want.residuals)
    np.testing.assert_array_equal(found.vectors, want.vectors)
    assert (found.products, spent > products) == (want.products, True)
    exact = np.linalg.eigvalsh(eager_hessian())[::-1][:3]
    np.testing.assert_allclose(found.values, exact, rtol=1e-6)
