"""One rank of a training job, as a process: `together` starts several of them.

Each runs a function of this module, which a test names, and prints what it returns.
"""

import json
import os
import sys

from support.forked import Forked

SHAPES = {"0.weight": (7, 8), "0.bias": (7,), "2.weight": (3, 7), "2.bias": (3,)}


def state(seed):
    """The whole parameters, the same on every rank."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


def net(seed):
    """Two layers of 7 and 3 rows, which two ranks share unevenly."""
    from torch import nn

    module = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))
    module.load_state_dict(state(seed))
    return module


def fully_sharded(seed):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    module = net(seed)
    fully_shard(module[0], mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def placed(seed, placements):
    """The parameters as DTensors, each with its placement."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    return {
        name: distribute_tensor(value, mesh, [placements.get(name)])
        if name in placements
        else value
        for name, value in state(seed).items()
    }


def update_fsdp(rank, session):
    module = fully_sharded(1)
    session.update_parameters(module)
    return session.info.version, session.info.parameters_digest


def update_fsdp_async(rank, session):
    import asyncio

    import curvd

    async def run():
        target = session._connection.target
        async with curvd.aio.connect(target) as client:
            own = await client.session(session.id)
            await own.update_parameters(fully_sharded(1).state_dict())
            return own.info.version, own.info.parameters_digest

    return asyncio.run(run())


def update_ddp(rank, session):
    from torch.nn.parallel import DistributedDataParallel

    module = DistributedDataParallel(net(1))
    if rank == 0:
        session.update_parameters(module.state_dict())
        first = session.info.parameters_digest
        session.update_parameters(module)
        assert session.info.parameters_digest == first
    return session.refresh().version, session.info.parameters_digest


def update_placed(rank, session):
    from torch.distributed.tensor import Replicate, Shard

    placements = {"0.weight": Shard(1), "0.bias": Shard(0), "2.weight": Replicate()}
    session.update_parameters(placed(1, placements))
    return session.info.version, session.info.parameters_digest


def update_partial(rank, session):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    mesh = init_device_mesh("cpu", (2,))
    value = DTensor.from_local(state(1)["0.bias"], mesh, [Partial()])
    return _error_of(session, {"0.bias": value})


def one_rank_fails_first(rank, session):
    """Rank 1 stops in the middle of its upload at first."""

    def progress(done, total):
        if rank == 1:
            raise KeyError("stop")

    values = fully_sharded(1).state_dict()
    try:
        failed = _error_of(session, values, progress=progress)
    except KeyError as error:
        failed = repr(error)
    version = session.refresh().version
    session.update_parameters(values)
    return failed, version, session.info.version, session.info.parameters_digest


def one_rank_dies(rank, session):
    """Rank 1 is gone before all parts are there."""

    values = fully_sharded(1).state_dict()
    if rank == 1:
        os._exit(0)
    failed = _error_of(session, values)
    return failed, session.refresh().version


def refused_by_the_server(rank, session):

    return _error_of(session, fully_sharded(1).state_dict(), expected_version=99)


def save_checkpoint(rank, session):
    import torch.distributed.checkpoint as dcp

    module = fully_sharded(1)
    dcp.save(
        {"model": module.state_dict(), "step": 100}, checkpoint_id=os.environ["OUT"]
    )
    return []


def _error_of(session, values, **options):
    import curvd

    try:
        session.update_parameters(values, **options)
    except curvd.CurvdError as error:
        return [type(error).__name__, str(error)]
    return None


def together(name, target, session_id, directory, **environment):
    """Run a function of this module on two ranks of one job.

    Returns:
        What each returned, by rank; None from one that died.
    """
    store = directory / f"store-{name}"
    words = (name, store, target, session_id)
    ranks = [
        Forked(
            "from support.ranks import main; main()",
            *(*words, rank),
            stderr=directory / f"{name}-{rank}.err",
            environment=os.environ | environment,
        )
        for rank in range(2)
    ]
    with ranks[0], ranks[1]:
        said = [rank.stdout.read() for rank in ranks]
        for number, rank in enumerate(ranks):
            errors = directory / f"{name}-{number}.err"
            assert rank.wait() == 0, errors.read_text()[-3000:]
    return [json.loads(out.splitlines()[-1]) if out else None for out in said]


def main():
    """Be one rank."""
    name, store, target, session_id, rank = sys.argv[1:]
    import torch.distributed as dist

    import curvd

    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=2
    )
    with curvd.connect(target) as client:
        session = client.session(session_id)
        print(json.dumps(globals()[name](int(rank), session)), flush=True)
    if name != "one_rank_dies":
        dist.barrier()
    os._exit(0)  # gloo's threads do not always let a process end by itself
