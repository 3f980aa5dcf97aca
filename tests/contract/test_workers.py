"""Workers in what a server says of itself: over the wire, and on the command line."""

from curvd.cli.commands import _server_lines
from curvd.contract import Limits, ServerInfo, WorkerInfo, convert_server

LIMITS = Limits(**dict.fromkeys(Limits.__slots__, 1))
READY = WorkerInfo(
    rank=0, device="cuda:0", host="a", pid=7, shards=2, ready=True, restarts=0, lost=""
)
SHARES = WorkerInfo(
    rank=2,
    device="cpu",
    host="a",
    pid=8,
    shards=1,
    ready=True,
    restarts=0,
    lost="",
    parameter_bytes=3 << 20,
    whole_bytes=1 << 19,
)
LOST = WorkerInfo(
    rank=1, device="cuda:1", host="", pid=0, shards=2, ready=False, restarts=3, lost="x"
)
INFO = ServerInfo(
    version="1",
    torch_version="2",
    limits=LIMITS,
    devices=(),
    builders=(),
    capabilities=(),
    workers=(READY, LOST, SHARES),
    generation=5,
)


def test_workers_travel_with_the_server():
    assert (
        convert_server.server_info_from_proto(convert_server.server_info_to_proto(INFO))
        == INFO
    )


def test_the_command_line_shows_workers_and_why_one_was_lost():
    assert _server_lines(INFO)[1:4] == [
        "  worker 0 cuda:0: a, process 7, 2 shards, ready, 0 restarts",
        "  worker 1 cuda:1: being started, 2 shards, not ready, 3 restarts, "
        "last because x",
        "  worker 2 cpu: a, process 8, 1 shards, ready, 0 restarts, "
        "slices of parameters 3.0 MiB, whole ones 0.5 MiB at once",
    ]
