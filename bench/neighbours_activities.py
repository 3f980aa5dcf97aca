"""What another user does for long, for bench/neighbours.py."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
from neighbours_multiplier import opened, registered, state_of

import curvd
from curvd.contract.rpcs import RPCS
from curvd.v1 import graph_pb2 as graph_pb
from curvd.v1 import session_service_pb2 as session_pb

LARGE = [784, 1600, 1540, 10]
"""P = 3.74 M."""


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
    "nothing": lambda client: lambda: None,
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
