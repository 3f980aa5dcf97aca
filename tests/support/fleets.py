"""Fleets for tests: real workers, in processes or in threads of the test's own process.

Workers in threads speak the same protocol over real sockets; they start at once, and are
lost when a test cuts their connection.
"""

import contextlib
import dataclasses
import os
import socket
import sys
import threading

import numpy as np
import torch
import torch.nn.functional as F
from support.forked import Forked

from curvd.contract.enums import Dtype, LossName, Mode
from curvd.contract.specs import DatasetSpec, LossSpec, ModelSpec
from curvd_server.device.torch_device import TorchDevice
from curvd_server.fleet import Fleet, FleetDevice, Invitation, LocalLauncher, messages
from curvd_server.fleet.connection import Connection
from curvd_server.fleet.holdings import Holdings
from curvd_server.fleet.worker import Worker
from curvd_server.models.builders import BUILDERS

WIDTHS = {"activation": "tanh", "widths": [5, 2, 3]}
"""Of few parameters: workers that share them go column by column, step by step."""
SIZE = 21
N, B = 26, 3
"""Nine mini-batches, the last one of two data points."""
CLASSES = LossSpec(
    name=LossName.CROSS_ENTROPY, ignore_index=-1, class_weights=(1.0, 2.0, 0.5)
)


def never():
    return False


class ThreadLauncher:
    """Workers as threads, which a test can cut off."""

    def __init__(self):
        self.holdings, self.workers, self._sockets, self._threads = {}, {}, {}, {}
        self.starts = 0

    def start(self, invitation):
        self.starts += 1
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(invitation.address)
        self._sockets[invitation.rank] = connected
        thread = self._threads[invitation.rank] = threading.Thread(
            target=self._work, args=(invitation, connected), daemon=True
        )
        thread.start()

    def _work(self, invitation, connected):
        connection = Connection(connected)
        with contextlib.suppress(OSError, EOFError), connected:
            secret = bytes.fromhex(invitation.secret)
            connection.prove(secret, role=b"worker", timeout_s=60.0)
            connection.send(
                0,
                messages.Hello(
                    rank=invitation.rank,
                    incarnation=invitation.incarnation,
                    pid=os.getpid(),
                    host="here",
                    device=invitation.device,
                    torch_version=torch.__version__,
                ),
            )
            holdings = Holdings(TorchDevice({}, "cpu"), 1 << 20)
            self.holdings[invitation.rank] = holdings
            worker = Worker(connection, holdings, lambda: None)
            self.workers[invitation.rank] = worker
            worker.run()

    def ended(self, rank):
        return None if self._threads[rank].is_alive() else "its thread ended"

    def end(self, rank):
        with contextlib.suppress(OSError):
            self._sockets[rank].shutdown(socket.SHUT_RDWR)

    def close(self):
        for rank in self._sockets:
            self.end(rank)


class ForkedLauncher(LocalLauncher):
    """Workers as processes that start at once."""

    def start(self, invitation):
        self.end(invitation.rank)
        self._processes[invitation.rank] = Forked(
            self._code, stdin=invitation.written()
        )

    def end(self, rank):
        process = self._processes.pop(rank, None)
        if process is not None:
            process.kill()


def invite(rank, incarnation, address, secret):
    return Invitation(
        address=address,
        secret=secret,
        rank=rank,
        incarnation=incarnation,
        device=f"cpu:{rank}",
        threads=1,
        patience_s=60.0,
        builders={},
        libraries=(),
        model_bytes=1 << 30,
        idle_bytes=1 << 20,
        log_level="warning",
        log_style="json",
        path=tuple(sys.path),
    )


@contextlib.contextmanager
def fleet_of(workers, *, launcher=None, patience_s=60.0, **invited):
    """A fleet that is complete, of threads by default; they may be invited otherwise."""
    launcher = launcher or ThreadLauncher()
    devices = tuple(f"cpu:{rank}" for rank in range(workers))

    def made(*args):
        return dataclasses.replace(invite(*args), **invited)

    fleet = Fleet(launcher, made, devices, patience_s=patience_s)
    try:
        fleet.wait()
        fleet.launcher = launcher
        yield fleet
    finally:
        fleet.close()


def device_of(fleet, shards=4):
    """The fleet behind the device protocol."""
    return FleetDevice(fleet, TorchDevice({}, "cpu"), {}, shards=shards)


def state(seed=0):
    torch.manual_seed(seed)
    module = BUILDERS["mlp"](WIDTHS).double()
    return {name: t.detach().numpy() for name, t in module.state_dict().items()}


def arrays():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 3, N)
    y[4] = y[11] = -1
    return {"x": rng.standard_normal((N, 5)), "y": y}


def load(device, *, values=None, data=None, loss=CLASSES, dtype=Dtype.FLOAT64):
    """The problem of the small net."""
    return device.load(
        ModelSpec(builder="mlp", config=WIDTHS),
        state() if values is None else values,
        arrays() if data is None else data,
        DatasetSpec(inputs=("x",), target="y", batch_size=B),
        loss,
        Mode.EVAL,
        dtype,
    )


def eager(values=None, data=None, reduction="mean"):
    """The loss of torch alone, over all data at once, as a function of one vector."""
    values, data = values or state(), data or arrays()
    module = BUILDERS["mlp"](WIDTHS).double()
    shapes = [(n, p.shape) for n, p in module.named_parameters()]
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])
    theta = torch.cat([torch.from_numpy(values[n]).reshape(-1) for n, _ in shapes])
    weights = torch.tensor(CLASSES.class_weights, dtype=torch.float64)

    def loss(vector):
        pieces = vector.split([s.numel() for _, s in shapes])
        named = {n: p.view(s) for (n, s), p in zip(shapes, pieces, strict=True)}
        out = torch.func.functional_call(module, named, x)
        return F.cross_entropy(out, y, weights, ignore_index=-1, reduction=reduction)

    return loss, theta


def eager_hessian(values=None, data=None):
    loss, theta = eager(values, data)
    return torch.autograd.functional.hessian(loss, theta).numpy()
