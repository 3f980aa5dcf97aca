"""What the first answer costs: from an `nn.Module` to the first verified product.

    OMP_NUM_THREADS=1 python bench/first_answer.py [--check] [--rounds 5] [NET ...]

CPU seconds, client and server with all their children together, one thread, medians. Each
round has a fresh server process with a fresh data directory, a fresh client process, and
a fresh process of curvlinops for its constructor (with its determinism check) and first
product on the same module and data, in turn. *Imports* are those of torch's exporter in the
client, once for each process; they and the start of both processes count for nobody. *Second*
is a session of another module of the same architecture in the same processes. Our sources
are compiled to bytecode before, as pip leaves them: where Python writes none, that would be
0.2 s of every first answer. *Last tier*
is what it takes until the server computes that operator in its final way, which nobody waits
for. Answers are compared with central differences of the gradient in float64, which are the
bench's own.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

NETS = ("mlp", "cnn", "encoder", "gpt2")
KINDS = ("hessian", "ggn")
LIMIT_S, FACTOR, SECOND_S = 1.0, 3.0, 0.3
TOLERANCE = 2e-3
"""Of float32 products, against central differences in float64."""


def network(name: str) -> tuple[Any, Any, Any, int]:
    """Make a net with its loss and data.

    Args:
        name: One of `NETS`.

    Returns:
        The module, the loss as `Client.session_for` takes it, inputs and targets, and the
        size of a mini-batch.
    """
    import torch
    from torch import nn

    labels = torch.randint(8, (64,))
    if name == "mlp":
        module: nn.Module = nn.Sequential(nn.Linear(8, 11), nn.Tanh(), nn.Linear(11, 8))
        return module, nn.CrossEntropyLoss(), (torch.randn(64, 8), labels), 32
    if name == "cnn":
        module = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)),
            *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)),
        )
        return (
            module.eval(),
            nn.CrossEntropyLoss(),
            (torch.randn(64, 1, 12, 12), labels),
            32,
        )
    if name == "encoder":
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True)
        stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        module = nn.Sequential(stack, nn.Flatten(), nn.Linear(10 * 32, 8))
        return (
            module.eval(),
            nn.CrossEntropyLoss(),
            (torch.randn(64, 10, 32), labels),
            32,
        )
    tokens = torch.randint(256, (16, 16))
    return _gpt2(), None, ({"input_ids": tokens}, tokens), 8


def _gpt2() -> Any:
    try:
        import torchvision  # noqa: F401
    except (
        ImportError,
        RuntimeError,
    ):  # one that does not fit torch is as good as none
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    ).eval()


def plain(name: str, module: Any, data: Any) -> tuple[Any, Any, Any, Any]:
    """Say the same in torch's own terms: module, loss, inputs and targets.

    The peer wants one tensor in and one out, so a language model's rows are flat.
    """
    import torch
    from torch import nn

    if name != "gpt2":
        return module, nn.CrossEntropyLoss(), *data

    class Next(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.model(tokens).logits[:, :-1].transpose(1, 2)

    (inputs, targets) = data
    return Next(), nn.CrossEntropyLoss(), inputs["input_ids"], targets[:, 1:]


def peer(name: str, kind: str) -> dict[str, float]:
    """Measure curvlinops: its constructor and its first product."""
    import torch
    from curvlinops import GGNLinearOperator, HessianLinearOperator
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    module, _, data, batch_size = network(name)
    module, loss, x, y = plain(name, module, data)
    vector = torch.randn(sum(p.numel() for p in module.parameters()))
    batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    make = HessianLinearOperator if kind == "hessian" else GGNLinearOperator
    torch.func.jvp(torch.func.grad(torch.sin), (vector[0],), (vector[0],))  # imports
    # note: neither the attention nor the encoder's layer that torch takes on a CPU has a
    # forward mode.
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH):
        before_s = time.process_time()
        operator = make(module, loss, list(module.parameters()), batches)
        operator @ vector
        return {"peer": time.process_time() - before_s}


class Clock:
    """CPU seconds of this process, and of a server with its children, by phase."""

    def __init__(self, pid: int) -> None:
        self._server = psutil.Process(pid)
        self.phases: dict[str, tuple[float, float]] = {}

    def now(self) -> tuple[float, float]:
        """Read both."""
        children = resource_children_s()
        return time.process_time() + children, tree_s(self._server)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what happens inside to a phase."""
        mine, theirs = self.now()
        try:
            yield
        finally:
            here, there = self.now()
            before = self.phases.get(name, (0.0, 0.0))
            self.phases[name] = before[0] + here - mine, before[1] + there - theirs


def resource_children_s() -> float:
    times = os.times()
    return times.children_user + times.children_system


def tree_s(process: psutil.Process) -> float:
    """CPU seconds of a process, of its children that live, and of those that ended."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            total += times.user + times.system
            total += times.children_user + times.children_system
    return total


def client(name: str, kind: str, target: str, pid: int) -> dict[str, Any]:
    """Measure a session as a user opens it, and the first product of an operator."""
    import torch

    import curvd
    from curvd import exported

    torch.manual_seed(0)
    module, loss, data, batch_size = network(name)
    twin = network(name)[0]  # of the same architecture
    vector = torch.randn(sum(p.numel() for p in module.parameters()))
    clock = Clock(pid)
    with clock.phase("imports"):
        exporter()
    prepare = exported.prepare

    def timed(*args: Any, **options: Any) -> Any:
        with clock.phase("export"):
            return prepare(*args, **options)

    curvd.remote.client.prepare = timed  # type: ignore[attr-defined]
    with curvd.connect(target) as connection:
        wanted = curvd.OperatorSpec(kind=curvd.OperatorKind(kind))

        def first(module: Any) -> tuple[Any, Any]:
            session = connection.session_for(module, loss, data, batch_size=batch_size)
            return session, session.operator(wanted) @ vector

        with clock.phase("first"):
            session, answer = first(module)
        export_s = clock.phases.pop("export")
        with clock.phase("last tier"):
            while session.refresh().operators[0][1].tier is not curvd.Tier.FINAL:
                time.sleep(0.02)
        last = session.operator(wanted) @ vector
        with clock.phase("second"):
            first(twin)
        clock.phases["second export"] = clock.phases.pop("export")
        clock.phases["export"] = export_s
    return {
        **{f"{phase} client": mine for phase, (mine, _) in clock.phases.items()},
        **{f"{phase} server": theirs for phase, (_, theirs) in clock.phases.items()},
        "gap": max(
            gap(name, kind, module, data, batch_size, vector, found)
            for found in (answer, last)
        ),
    }


def exporter() -> None:
    """Import what torch's exporter imports, by using it once."""
    import torch
    from torch.export import Dim

    rows = torch.randn(4, 2)
    shapes = ({0: Dim("batch", min=1)},)
    torch.export.export(
        torch.nn.Linear(2, 2), (rows,), dynamic_shapes=shapes, strict=False
    )


def gap(
    name: str,
    kind: str,
    module: Any,
    data: Any,
    batch_size: int,
    vector: Any,
    answer: Any,
) -> float:
    """Relative error of an answer, against central differences in float64."""
    import torch
    from torch.func import functional_call

    module, loss, x, y = plain(name, module.double(), data)
    x = x.double() if x.is_floating_point() else x
    named = dict(module.named_parameters())
    sizes = [p.numel() for p in named.values()]
    parts = [
        part.view_as(p)
        for part, p in zip(vector.double().split(sizes), named.values(), strict=True)
    ]

    def at(step: float) -> dict[str, Any]:
        return {
            n: (p + step * t).detach().requires_grad_()
            for (n, p), t in zip(named.items(), parts, strict=True)
        }

    def gradient(where: dict[str, Any]) -> Any:
        total = loss(functional_call(module, where, (x,)), y)
        rows = torch.autograd.grad(total, list(where.values()))
        return torch.cat([row.flatten() for row in rows])

    def outputs(step: float) -> Any:
        with torch.no_grad():
            return functional_call(module, at(step), (x,))

    def quotient(step: float) -> Any:
        if kind == "hessian":
            return (gradient(at(step)) - gradient(at(-step))) / (2 * step)
        pushed = (outputs(step) - outputs(-step)) / (2 * step)
        z = outputs(0.0)
        away = 1e-4 / float(pushed.abs().max())
        slopes = []
        for sign in (1.0, -1.0):
            leaf = (z + sign * away * pushed).requires_grad_()
            slopes.append(torch.autograd.grad(loss(leaf, y), leaf)[0])
        where = at(0.0)
        total = functional_call(module, where, (x,))
        rows = torch.autograd.grad(
            total, list(where.values()), (slopes[0] - slopes[1]) / (2 * away)
        )
        return torch.cat([row.flatten() for row in rows])

    got = torch.as_tensor(answer).double()
    wants = [quotient(step) for step in (1e-5, 1e-6, 1e-7)]
    return min(float((got - want).norm() / want.norm()) for want in wants)


@contextlib.contextmanager
def server() -> Iterator[tuple[str, int]]:
    """Start a server in a process of its own; yield target and process id."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "curvd.cli", "serve"]
        command += ["--listen", f"unix:{folder}/socket", "--data-dir", f"{folder}/data"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if '"serving"' in line:
                break
        else:
            raise RuntimeError("".join(said))
        reader = threading.Thread(target=said.extend, args=(process.stderr,))
        reader.start()
        try:
            yield f"unix:{folder}/socket", process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
            reader.join()
            if "FIRST_ANSWER_LOG" in os.environ:
                print(*said, sep="", file=sys.stderr)


def child(*arguments: str) -> dict[str, float]:
    """Run a part of this script in a fresh process."""
    command = [sys.executable, __file__, *arguments]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    return found


def measured(name: str, kind: str, rounds: int) -> dict[str, float]:
    """Measure one net and operator; medians over rounds."""
    found: list[Mapping[str, float]] = []
    for _ in range(rounds):
        theirs = child("peer", name, kind)
        with server() as (target, pid):
            ours = child("client", name, kind, target, str(pid))
        found.append({**theirs, **ours})
    return {key: statistics.median(f[key] for f in found) for key in found[0]}


def report(name: str, kind: str, m: Mapping[str, float]) -> list[str]:
    """Print a row; return what was missed."""
    total = m["first client"] + m["first server"]
    second = m["second client"] + m["second server"]
    most = max(LIMIT_S, FACTOR * m["peer"])
    missed = [
        what
        for what, bad in (
            (f"{name} {kind}: {total:.2f} s, wanted {most:.2f}", total > most),
            (f"{name} {kind}: second {second:.2f} s", second > SECOND_S),
            (f"{name} {kind}: off by {m['gap']:.0e}", not m["gap"] <= TOLERANCE),
        )
        if bad
    ]
    print(
        f"| {name} | {kind} | {total:.2f} | {m['export client']:.2f} | "
        f"{m['first client'] - m['export client']:.2f} | {m['first server']:.2f} | "
        f"{m['peer']:.2f} | {most:.2f} | {second:.2f} | "
        f"{m['second export client']:.2f} | {m['second server']:.2f} | "
        f"{m['imports client']:.2f} | {m['last tier server']:.1f} | {m['gap']:.0e} | "
        f"{'**missed**' if missed else 'met'} |",
        flush=True,
    )
    return missed


def package_folder(name: str) -> str:
    """Find the folder that a package of ours is imported from."""
    found = importlib.util.find_spec(name)
    assert found is not None and found.submodule_search_locations
    return found.submodule_search_locations[0]


def main() -> int:
    part, *arguments = sys.argv[1:] or [""]
    if part in ("peer", "client"):
        found = (
            peer(*arguments)
            if part == "peer"
            else client(*arguments[:3], int(arguments[3]))
        )
        print(json.dumps(found))
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nets", nargs="*", choices=(*NETS, []), default=[])
    parser.add_argument("--check", action="store_true", help="exit non-zero on a miss")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for package in ("curvd", "curvd_server"):
        compileall.compile_dir(package_folder(package), quiet=1)
    print(
        "| net | first | total | export | rest of the client | server | curvlinops | "
        "target | second | its export | its server | imports | last tier | error | |\n"
        f"|{' --- |' * 15}"
    )
    missed = [
        miss
        for name in options.nets or NETS
        for kind in KINDS
        for miss in report(name, kind, measured(name, kind, options.rounds))
    ]
    print(*missed, sep="\n")
    return bool(missed and options.check)


if __name__ == "__main__":
    sys.exit(main())
