"""A server whose workers share parameters, in a process of its own; and the truth."""

import contextlib
import signal
import subprocess
import sys

import numpy as np
import psutil
import torch
from torch import nn

from curvd_server.models.builders import BUILDERS

CONFIG = {"vocabulary": 32, "context": 6, "layers": 10, "width": 8, "heads": 2}
"""Of so many layers that one of them is little."""
SMALL = CONFIG | {"layers": 1}
POINTS, BATCH = 6, 2
"""Three mini-batches, so that one worker has one more than the other."""
WORKER = "curvd_server.fleet.worker"


@contextlib.contextmanager
def serving(folder, *options):
    """A server with two workers; its target and its process."""
    code = "from curvd.cli.commands import main; main()"
    command = [sys.executable, "-c", code, "serve", "--listen", "127.0.0.1:0"]
    command += ["--data-dir", folder / "data", "--devices", "cpu:0,cpu:1"]
    command += ["--shard-parameters", "--threads", "1", "--worker-patience-s", "5"]
    command += ["--drain-s", "0", *options]
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    try:
        yield process.stdout.readline().decode().split()[-1], process
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def workers_of(server):
    """Processes of the workers."""
    found = psutil.Process(server.pid).children(recursive=True)
    return [p for p in found if WORKER in " ".join(p.cmdline())]


def kill(server, signal_number=signal.SIGKILL):
    """Kill a worker, or stop it."""
    workers_of(server)[-1].send_signal(signal_number)


def net(seed=0, config=CONFIG):
    """A transformer in float64, whose attention can be differentiated twice."""
    torch.manual_seed(seed)
    return BUILDERS["gpt"](config).double()


def tokens():
    rng = np.random.default_rng(1)
    whole = rng.integers(0, CONFIG["vocabulary"], (POINTS, CONFIG["context"] + 1))
    return {"x": whole[:, :-1], "y": whole[:, 1:]}


class Truth:
    """Products on all data by eager torch, in one process.

    Args:
        module: The model.
        data: Its data; None: that of the tests.
    """

    def __init__(self, module, data=None):
        self.module = module
        self.parameters = list(module.parameters())
        self.size = sum(p.numel() for p in self.parameters)
        data = data or tokens()
        self.x, self.y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])

    def outputs(self):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return self.module(self.x)

    def loss(self, z):
        return nn.functional.cross_entropy(z.flatten(0, 1), self.y.flatten())

    def split(self, v):
        sizes = [p.numel() for p in self.parameters]
        pieces = torch.from_numpy(np.ascontiguousarray(v)).split(sizes)
        pairs = zip(pieces, self.parameters, strict=True)
        return [piece.view_as(p) for piece, p in pairs]

    def hessian(self, v):
        """``H v``."""
        loss = self.loss(self.outputs())
        rows = torch.autograd.grad(loss, self.parameters, create_graph=True)
        return flat(torch.autograd.grad(rows, self.parameters, self.split(v)))

    def ggn(self, v):
        """``J^T H_out J v``."""
        z = self.outputs()
        u = torch.zeros_like(z, requires_grad=True)
        pulled = torch.autograd.grad(z, self.parameters, u, create_graph=True)
        (pushed,) = torch.autograd.grad(pulled, u, self.split(v), retain_graph=True)
        gradient = torch.func.grad(self.loss)
        middle = torch.func.jvp(gradient, (z.detach(),), (pushed.detach(),))[1]
        return flat(torch.autograd.grad(z, self.parameters, middle))

    def gradient(self):
        """Of the loss."""
        return flat(torch.autograd.grad(self.loss(self.outputs()), self.parameters))


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors]).detach().numpy()
