"""Workers that a cluster starts, on a stand-in for Ray that starts processes here.

What Ray itself does is tried by `make ray-test`.
"""

import os
import signal
import sys

import numpy as np
import pytest

pytest.importorskip("torch")
from support.fleets import device_of, eager_hessian, invite, load, never

from curvd.contract.specs import OperatorSpec
from curvd_server.fleet import Fleet, RayLauncher

STAND_IN = """
import subprocess, sys

class exceptions:
    class RayError(Exception):
        pass

def init(address, **options):
    if address != "here:1":
        sys.exit(1)

class Actor:
    def __init__(self, kind):
        self.kind, self.run, self.process = kind, self, None

    def remote(self, line):
        code = f"from {self.kind.__module__} import {self.kind.__name__} as kind; "
        code += f"kind().run({line!r})"
        self.process = subprocess.Popen([sys.executable, "-c", code])
        return self

class Class:
    def __init__(self, kind):
        self.kind = kind

    def options(self, **given):
        assert given["max_restarts"] == 0
        return self

    def remote(self):
        return Actor(self.kind)

remote = Class

def wait(runs, timeout):
    return [run for run in runs if run.process.poll() is not None], []

def get(run):
    raise exceptions.RayError("the actor died")

def kill(actor, no_restart):
    actor.process.kill()
    actor.process.wait()
"""


@pytest.fixture
def ray(tmp_path, monkeypatch):
    """A module of that name, for this process and the one that speaks with it."""
    (tmp_path / "ray.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    yield
    sys.modules.pop("ray", None)


def test_a_worker_of_a_cluster_is_placed_again_when_it_is_lost(ray):
    """Over TCP, on loopback."""
    launcher = RayLauncher("here:1", gpus=0)
    fleet = Fleet(launcher, invite, ("cpu",), patience_s=60.0, host="127.0.0.1")
    try:
        fleet.wait()
        operator = load(device_of(fleet)).build(
            OperatorSpec(), budget_bytes=1 << 30, cancelled=never
        )
        want = operator.apply(np.eye(operator.size), cancelled=never)
        np.testing.assert_allclose(want, eager_hessian(), atol=1e-13)
        os.kill(fleet.seats[0].hello.pid, signal.SIGKILL)
        again = operator.apply(np.eye(operator.size), cancelled=never)
        np.testing.assert_array_equal(again, want)
        assert fleet.seats[0].restarts == 1
    finally:
        fleet.close()


def test_a_cluster_that_cannot_be_reached_is_named(ray):
    launcher = RayLauncher("elsewhere:1", gpus=0)
    with pytest.raises(OSError, match="Ray at elsewhere:1 cannot be reached"):
        launcher.start(invite(0, 1, "tcp:127.0.0.1:1", "00"))
    launcher.close()
