"""One user multiplies; another does everything else that is long. Who waits for whom?

    python bench/neighbours.py [--check] [--models small medium] [--only TEXT]

A real server, a process that multiplies without a pause, and this process, which opens
sessions, registers, uploads, queries and deletes. The multiplier's products are timed
alone, beside, and alone again; what the device did between a product's arrival and its
start is counted inside the server: turns of long work, and the longest step of one.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np

import curvd
from curvd.contract.rpcs import RPCS
from curvd.v1 import graph_pb2 as graph_pb
from curvd.v1 import session_service_pb2 as session_pb

ALONE_S = 4.0
LEAST_S = 3.0
"""How long a product is timed beside something, however short that is."""
MOST_TURNS = 2
WIDTHS = {"small": [16, 64, 64, 4], "medium": [256, 512, 512, 10]}
"""Of the multiplier's nets: a product of one takes 1 ms, of the other 100 ms."""
LARGE = [784, 1600, 1540, 10]
"""P = 3.74 M."""
POINTS = 512


# --- the server ------------------------------------------------------------------------


def serve(folder: str, options: str) -> None:
    """Serve until killed; count who waits for what, and write it down at the end."""
    from curvd_server import app
    from curvd_server.config import ServerConfig
    from curvd_server.device import batcher

    begun, waited, steps = [0], [], [0.0]
    now = threading.local()

    class Counting(batcher.Batcher):
        long = False

        def _submit(self, key, operator, ticket):
            ticket.turns = begun[0] - self.long
            return super()._submit(key, operator, ticket)

        def _advance(self, run):
            if run.operator is not None and not run.spent_s:
                waited.extend(begun[0] - t.turns for t in run.tickets)
            begun[0] += run.in_turns
            self.long = run.in_turns
            try:
                return super()._advance(run)
            finally:
                self.long = False

    class Timed(batcher.LongWork):
        def _poll(self):
            steps.append(time.thread_time() - now.start_s)
            stop = super()._poll()
            now.start_s = time.thread_time()
            return stop

        def _run(self):
            now.start_s = time.thread_time()
            super()._run()

    batcher.LongWork, app.Batcher = Timed, Counting
    path = Path(folder)
    config = ServerConfig(
        listen="127.0.0.1:0",
        data_dir=path / "data",
        drain_s=0.0,
        log_level="warning",
        builders={"own": "neighbours_builder:build"},
        **json.loads(options),
    )
    app.serve(config)
    found = {
        "turns": max(waited, default=0),
        "products": len(waited),
        "step_ms": 1e3 * max(steps),
        "steps": len(steps),
    }
    (path / "counted.json").write_text(json.dumps(found))


class Server:
    """A server in a process of its own."""

    def __init__(self, folder: Path, **options: object) -> None:
        command = [
            sys.executable,
            __file__,
            "--serve",
            str(folder),
            json.dumps(options),
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.target = self._process.stdout.readline().split()[-1]
        self._folder = folder

    def stop(self) -> dict[str, float]:
        """End it; return what it counted."""
        self._process.terminate()
        self._process.wait(60)
        return json.loads((self._folder / "counted.json").read_text())


# --- who multiplies --------------------------------------------------------------------


def multiply(target: str, size: str) -> None:
    """Open a session, then multiply from each line of the input to the next."""
    stopped = threading.Event()
    with curvd.connect(target) as client:
        session = opened(client, WIDTHS[size])
        H, v = session.hessian(), np.ones(session.layout.size, np.float32)
        for _ in range(20):
            H @ v
        print("ready", flush=True)
        times: list[float] = []

        def work() -> None:
            while not stopped.is_set():
                start_s = time.perf_counter()
                H @ v
                times.append(time.perf_counter() - start_s)

        while sys.stdin.readline():
            times.clear()
            stopped.clear()
            thread = threading.Thread(target=work)
            thread.start()
            sys.stdin.readline()
            stopped.set()
            thread.join()
            print(json.dumps(times), flush=True)


class Multiplier:
    """Someone who multiplies, in a process of his own."""

    def __init__(self, target: str, size: str) -> None:
        command = [sys.executable, __file__, "--multiply", target, size]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout.readline() == "ready\n"

    def _say(self) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    @contextlib.contextmanager
    def timed(self, times: list[float]) -> Iterator[None]:
        """Have products timed meanwhile."""
        self._say()
        yield
        self._say()
        times.extend(json.loads(self._process.stdout.readline()))

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)


# --- what the other one does ------------------------------------------------------------


def state_of(widths: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters of the builder mlp."""
    rng, state = np.random.default_rng(seed), {}
    for at, (inner, outer) in enumerate(itertools.pairwise(widths)):
        scale = inner**-0.5
        weight = rng.standard_normal((outer, inner), np.float32) * np.float32(scale)
        state[f"{2 * at + 1}.weight"] = weight
        state[f"{2 * at + 1}.bias"] = np.zeros(outer, np.float32)
    return state


def points_of(widths: list[int], count: int = POINTS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((count, widths[0]), np.float32)
    return {"x": x, "y": rng.integers(0, widths[-1], count)}


def registered(client: curvd.Client, widths: list[int], seed: int = 0):
    config = {"widths": widths, "activation": "tanh"}
    model = client.register_model("mlp", config, state_of(widths, seed))
    data = client.register_dataset(
        points_of(widths), inputs="x", target="y", batch_size=128
    )
    return model, data


def opened(client: curvd.Client, widths: list[int], **options):
    model, data = registered(client, widths)
    return client.create_session(model, data, loss="cross_entropy", **options)


def hurried(target: str, model, data, seconds: float) -> None:
    """Open a session, but give up after so long."""
    with (
        curvd.connect(target, deadline_s=seconds) as client,
        contextlib.suppress(curvd.CurvdError),
    ):
        client.create_session(model, data, loss="cross_entropy")


def opening(client: curvd.Client) -> Callable[[], None]:
    model, data = registered(client, LARGE)

    def run() -> None:
        client.create_session(model, data, loss="cross_entropy")

    return run


def openings(client: curvd.Client) -> Callable[[], None]:
    nets = [[256, 512, 500 + at, 10] for at in range(4)]
    made = [registered(client, widths) for widths in nets]

    def one(pair) -> None:
        client.create_session(*pair, loss="cross_entropy")

    def run() -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(one, made))

    return run


def gpt(client: curvd.Client) -> Callable[[], None]:
    config = {"vocabulary": 512, "context": 64, "layers": 4, "width": 256, "heads": 4}
    from curvd_server.models import BUILDERS

    state = BUILDERS["gpt"](config).state_dict()
    model = client.register_model("gpt", config, state)
    rng = np.random.default_rng(0)
    tokens = {name: rng.integers(0, 512, (16, 64)) for name in "xy"}
    data = client.register_dataset(tokens, inputs="x", target="y", batch_size=4)

    def run() -> None:
        client.create_session(model, data, loss="cross_entropy")

    return run


def graph_of_57_kb(number: int) -> graph_pb.Graph:
    """A graph that is small on the wire and large to try: tens of thousands of pieces."""
    from curvd.contract import graph_ops

    def node(operator: str, *arguments: graph_pb.GraphLiteral) -> graph_pb.GraphNode:
        listed = [graph_pb.GraphArgument(literal=a) for a in arguments]
        return graph_pb.GraphNode(operator=operator, arguments=listed, source=1)

    def value(at: int) -> graph_pb.GraphLiteral:
        return graph_pb.GraphLiteral(value=at)

    nodes = [node("aten.mm.default", value(0), value(1))]
    while sum(n.ByteSize() + 3 for n in nodes) < 57_000:
        nodes.append(node("aten.tanh.default", value(len(nodes) + 1)))
    return graph_pb.Graph(
        version=graph_ops.VERSION,
        inputs=[graph_pb.GraphInput(name="x", dtype="F32", shape=[4])],
        tensors=[
            graph_pb.GraphTensor(
                names=["w"],
                role=graph_pb.GRAPH_TENSOR_ROLE_PARAMETER,
                dtype="F32",
                shape=[4, 4],
            )
        ],
        nodes=nodes,
        outputs=[len(nodes) + 1],
        sources=[f"net.py:{number} in forward"],
        dtype="F32",
    )


def dry_runs(client: curvd.Client, target: str) -> Callable[[], None]:
    graphs = [graph_of_57_kb(number) for number in range(12)]
    rpc = RPCS["RegisterModel"]

    def one(graph: graph_pb.Graph) -> None:
        state = session_pb.Upload(digest="0" * 64, total_bytes=100)
        header = session_pb.RegisterModelHeader(graph=graph, state=state)
        first = session_pb.RegisterModelRequest(header=header)
        with grpc.insecure_channel(target) as channel:
            stub = channel.stream_unary(rpc.path, rpc.request.dump, rpc.response.load)
            with contextlib.suppress(grpc.RpcError):
                stub(iter([first]), timeout=300)

    def run() -> None:
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(one, graphs))

    return run


MANY = [4] * 1024
"""1,023 layers."""


def many_layers(client: curvd.Client) -> Callable[[], None]:
    state = state_of(MANY)

    def run() -> None:
        client.register_model("mlp", {"widths": MANY, "activation": "tanh"}, state)

    return run


def many_layers_opened(client: curvd.Client, target: str) -> Callable[[], None]:
    model, data = registered(client, MANY)

    def run() -> None:
        hurried(target, model, data, 90.0)

    return run


def updates(client: curvd.Client) -> Callable[[], None]:
    session, new = opened(client, LARGE), [state_of(LARGE, seed) for seed in (1, 2, 3)]
    v = np.ones(session.layout.size, np.float32)

    def run() -> None:
        for state in new:
            session.update_parameters(state)
            session.hessian() @ v
            session.ggn() @ v

    return run


def query(client: curvd.Client) -> Callable[[], None]:
    session = opened(client, LARGE)

    def run() -> None:
        session.ggn().eigsh(2, max_products=40)

    return run


def own_builder(client: curvd.Client) -> Callable[[], None]:
    _, data = registered(client, LARGE)
    state, config = state_of(LARGE), {"widths": LARGE}

    def run() -> None:
        model = client.register_model("own", config, state)
        client.create_session(model, data, loss="cross_entropy")

    return run


BIG = [4096, 8192, 8000, 10]
"""396 MB in float32."""


def upload(client: curvd.Client) -> Callable[[], None]:
    state = state_of(BIG)

    def run() -> None:
        client.register_model("mlp", {"widths": BIG, "activation": "tanh"}, state)

    return run


def big_opened(client: curvd.Client, target: str) -> Callable[[], None]:
    model, data = registered(client, BIG)

    def run() -> None:
        hurried(target, model, data, 60.0)

    return run


def closing(client: curvd.Client) -> Callable[[], None]:
    sessions = [opened(client, LARGE) for _ in range(3)]

    def run() -> None:
        for session in sessions:
            session.delete()

    return run


def cancelled(client: curvd.Client, target: str) -> Callable[[], None]:
    model, data = registered(client, LARGE)

    def run() -> None:
        for seconds in (0.5, 2.0, 5.0):
            hurried(target, model, data, seconds)

    return run


def native(client: curvd.Client) -> Callable[[], None]:
    session = opened(client, LARGE)
    H, v = session.hessian(), np.ones(session.layout.size, np.float32)

    def run() -> None:
        end_s = time.monotonic() + 90
        while time.monotonic() < end_s:
            H @ v
            if H.last.plan.compiled:
                return

    return run


def listing(client: curvd.Client) -> Callable[[], None]:
    opened(client, MANY, operators=["ggn"])

    def run() -> None:
        for _ in range(20):
            client.sessions()

    return run


ACTIVITIES = {
    "nothing": lambda client: lambda: time.sleep(LEAST_S),
    "opening, P = 3.74 M": opening,
    "four openings at once": openings,
    "opening a gpt": gpt,
    "12 graphs of 57 kB": dry_runs,
    "registering 1,023 layers": many_layers,
    "opening 1,023 layers": many_layers_opened,
    "updates and products after them": updates,
    "a query and its operator": query,
    "a builder of the server's operator": own_builder,
    "uploading 396 MB": upload,
    "opening 396 MB": big_opened,
    "deleting three sessions": closing,
    "openings given up after 0.5, 2 and 5 s": cancelled,
    "native code in the background": native,
    "listing a session of 1,023 layers": listing,
}
OPTIONS = {"native code in the background": {"compile_after_s": 1.0}}


# --- the table --------------------------------------------------------------------------


def beside(name: str, size: str) -> dict[str, object]:
    """Time products alone, beside an activity, and alone again."""
    import inspect

    prepare = ACTIVITIES[name]
    with tempfile.TemporaryDirectory() as folder:
        options = {"compile_after_s": 0.0} | OPTIONS.get(name, {})
        server = Server(Path(folder), **options)
        with curvd.connect(server.target) as client:
            wants_target = len(inspect.signature(prepare).parameters) > 1
            run = prepare(client, server.target) if wants_target else prepare(client)
            multiplier = Multiplier(server.target, size)
            alone: list[float] = []
            times: list[float] = []
            with multiplier.timed(alone):
                time.sleep(ALONE_S)
            with multiplier.timed(times):
                start_s = time.monotonic()
                run()
                took_s = time.monotonic() - start_s
                time.sleep(max(0.0, LEAST_S - took_s))
            with multiplier.timed(alone):
                time.sleep(ALONE_S)
            multiplier.stop()
        counted = server.stop()
    return {"took_s": took_s, "alone": alone, "beside": times, **counted}


def quantiles(times: list[float]) -> str:
    """The median, the 99th percentile and the longest, in ms."""
    return " / ".join(f"{1e3 * q:.1f}" for q in np.quantile(times, [0.5, 0.99, 1.0]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--models", nargs="*", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--only", default="", help="activities with this in their name")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--multiply", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return 0
    if arguments.multiply:
        multiply(*arguments.multiply)
        return 0
    missed = []
    print("| activity | net | took s | alone | beside | turns | longest step ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in ACTIVITIES:
        for size in arguments.models:
            if arguments.only not in name:
                continue
            row = beside(name, size)
            print(
                f"| {name} | {size} | {row['took_s']:.1f} | {quantiles(row['alone'])} "
                f"| {quantiles(row['beside'])} | {row['turns']} | {row['step_ms']:.0f} |",
                flush=True,
            )
            if row["turns"] > MOST_TURNS:
                missed.append(f"{name}, {size}: {row['turns']} turns")
    for text in missed:
        print("MISSED", text)
    return int(arguments.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
