"""Mutated graphs and manifests against the decoder, the dry run and the interpreter.

    python tests/fuzz_graphs.py [--graphs 100000] [--seed 0]

Children do the work, so that a crash of torch would be seen and counted. Each registers
graphs as the server does; those that are taken are also run, on two data points. Python's
audit events tell what else happened: a file that is opened, a module that is imported,
a program that is started or code that is compiled is a failure, and so are an
untyped error and an example that takes longer than the dry run may.
"""

from __future__ import annotations

import argparse
import collections
import os
import struct
import subprocess
import sys
import time
import traceback

CHUNK = 5_000
LIMIT_S = 25.0
"""The limit of the dry run, and some."""
LIMIT_BYTES = 64 << 20
WARM_UP = 3_000
"""torch imports parts of itself at their first use, whoever asks for them."""
FORBIDDEN = (
    "open",
    "import",
    "compile",
    "exec",
    "os.",
    "subprocess.",
    "socket.",
    "ctypes.dlopen",
    "shutil.",
    "pickle.",
    "marshal.",
    "webbrowser.",
    "urllib.",
)


def child(first: int, last: int) -> None:
    """Try some seeds; report each on stdout before it is tried, then the counts."""
    import warnings

    import torch
    from support.graphs import HONEST, filled
    from support.mutations import mutated
    from support.zoo import ANIMALS

    import curvd
    from curvd.errors import CurvdError
    from curvd_server.device.torch_device import TorchDevice
    from curvd_server.graph.decoder import canonical, decode
    from curvd_server.graph.execution.dryrun import dry_run
    from curvd_server.graph.execution.interpret import Interpreter
    from curvd_server.graph.execution.module import GraphModule

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    TorchDevice({}, "cpu")
    counts: collections.Counter[str] = collections.Counter()
    events: list[str] = []
    watching = False

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event.startswith(FORBIDDEN):
            events.append(f"{event} {arguments!r:.200}")

    honest_graphs = [*HONEST]
    for animal in ANIMALS:
        exported = curvd.export(animal.module().eval(), animal.arrays()["x"])
        honest_graphs.append(exported.graph)

    def attempt(seed: int) -> None:
        honest = honest_graphs[seed % len(honest_graphs)]
        message = mutated(honest, seed, 1 + seed // 31 % 3)
        try:
            interpreter = Interpreter(decode(canonical(message)))
            dry_run(interpreter, batch=2, limit_bytes=LIMIT_BYTES)
            module = GraphModule(interpreter)
        except CurvdError as error:
            counts[type(error).__name__] += 1
            return
        counts["taken"] += 1
        graph = interpreter.graph
        state = {t.names[0]: filled(t.shape, t.dtype) for t in graph.tensors}
        inputs = [filled((2, *i.shape), i.dtype) for i in graph.inputs]
        before = [t.clone() for t in (*state.values(), *inputs)]
        try:
            torch.func.functional_call(module, state, tuple(inputs))
            counts["ran"] += 1
        except CurvdError as error:
            counts[f"at the run: {type(error).__name__}"] += 1
        except (TypeError, ValueError, LookupError, RuntimeError):
            counts["at the run: translated by the device"] += 1
        if not all(map(torch.equal, before, (*state.values(), *inputs))):
            counts["MUTATED"] += 1
            sys.stderr.write(f"seed {seed} wrote to its inputs\n")

    sys.addaudithook(hook)
    for seed in range(WARM_UP):
        attempt(-1 - seed)
    counts.clear()
    slowest = 0.0
    for seed in range(first, last):
        os.write(1, struct.pack("<q", seed))
        start = time.monotonic()
        watching = True
        try:
            attempt(seed)
        except BaseException:
            counts["UNTYPED"] += 1
            sys.stderr.write(f"seed {seed}\n{traceback.format_exc()}\n")
        watching = False
        took = time.monotonic() - start
        slowest = max(slowest, took)
        if took > LIMIT_S:
            counts["SLOW"] += 1
            sys.stderr.write(f"seed {seed} took {took:.1f} s\n")
        if events:
            counts["EVENT"] += 1
            sys.stderr.write(f"seed {seed}: {events}\n")
            events.clear()
    report = "\n".join(f"{n}\t{name}" for name, n in counts.items())
    os.write(1, struct.pack("<q", -1) + f"{slowest}\n{report}".encode())


def parent(graphs: int, seed: int) -> int:
    """Run children over all seeds and add their counts up."""
    total: collections.Counter[str] = collections.Counter()
    first = seed << 32  # runs of different seeds have no graph in common
    slowest, next_seed, end = 0.0, first, first + graphs
    start = time.monotonic()
    while next_seed < end:
        last = min(next_seed + CHUNK, end)
        command = [sys.executable, __file__, "--child", f"{next_seed}:{last}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        marker = done.stdout.rfind(struct.pack("<q", -1))
        if done.returncode == 0 and marker >= 0:
            head, *lines = done.stdout[marker + 8 :].decode().split("\n")
            slowest = max(slowest, float(head))
            total.update({n: int(c) for c, n in (line.split("\t") for line in lines)})
            next_seed = last
        else:
            (culprit,) = struct.unpack("<q", done.stdout[-8:]) if done.stdout else (-2,)
            print(f"CRASH with status {done.returncode} at seed {culprit}")
            total["CRASH"] += 1
            if culprit < next_seed:
                return 1
            next_seed = culprit + 1
        print(f"{next_seed - first} of {graphs}: {dict(total)}", flush=True)
    print(
        f"\n{graphs} graphs in {time.monotonic() - start:.0f} s, slowest {slowest:.2f} s"
    )
    for name, count in total.most_common():
        print(f"{count:8d}  {name}")
    bad = [n for n in ("CRASH", "UNTYPED", "SLOW", "EVENT", "MUTATED") if total[n]]
    print(
        "FAILED: " + ", ".join(bad)
        if bad
        else "no crash, no hang, nothing opened or imported"
    )
    return int(bool(bad))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graphs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*map(int, arguments.child.split(":")))
    else:
        sys.exit(parent(arguments.graphs, arguments.seed))
