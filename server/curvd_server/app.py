"""The composition root: everything is made here, wired, started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import itertools
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import metadata

import psutil

from curvd.contract import OperatorKind, ServerInfo, Tier
from curvd.tensors import trim_allocator, tune_allocator
from curvd_server.config import ServerConfig
from curvd_server.device import Batcher, Device, torch_device
from curvd_server.engine import Compiler
from curvd_server.fleet import (
    Fleet,
    FleetDevice,
    Invitation,
    Launcher,
    LocalLauncher,
    RayLauncher,
    ShardedDevice,
)
from curvd_server.service import (
    CurvatureService,
    QueryService,
    SessionService,
    Sources,
    exposed,
    serving,
    status_of,
)
from curvd_server.sessions import SessionDependencies, SessionStore
from curvd_server.storage import (
    BlobStore,
    Catalogue,
    Checkpoints,
    Mounts,
    Registry,
    owned,
    torchs_folder,
)
from curvd_server.system import (
    Activities,
    HostMemory,
    Quotas,
    default_bytes,
    end_within,
    logs,
    usable_cores,
)
from curvd_server.transport import Callers, Tally, raise_descriptor_limit

CAPABILITIES = tuple(
    sorted([
        *(str(kind) for kind in OperatorKind),
        "block_diagonal",
        "mounted_datasets",
        "named_checkpoints",
        "narrow_vectors",
        "opening_progress",
        "probe_operands",
        "resumable_results",
        "resumable_uploads",
        "stored_vectors",
        "unary_products",
        "updates_in_parts",
        "validate_only",
    ])
)

_SWEEP_S = 1.0
_SWITCH_S = 1e-3
_CLOSING_S = 10.0
"""Time beside the grace for what is closed at the end, an operator under way among it."""
_ENDING_S = 2.0
"""Time for threads to end when everything is closed."""
_CHOOSE_AGAIN = 30
"""Sweeps after which plans that were chosen on a busy machine may be chosen anew."""
_SWEEP_BLOBS = 300
"""Sweeps after which uploads are looked at, too."""
_TRIM = 60
"""Sweeps after which memory that a crowd has left is given back."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server that serves."""

    target: str
    """Where a client on this machine connects."""
    batcher: Batcher
    sessions: SessionStore
    callers: Callers
    """Who may call."""
    quotas: Quotas
    """What each of them may hold."""
    metrics: str
    """``host:port`` where Prometheus may scrape; empty: nowhere."""

    def reload(self) -> None:
        """Read the files of tokens, of an issuer's keys and of quotas again, if any."""
        logs.logger().info("asked to read files again")
        self.callers.reload()
        self.quotas.reload()


def serve(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Blocks.

    Args:
        config: Everything about the server.
    """
    tune_allocator()
    # What was imported stays: looking through it for garbage takes 0.2 s each time, in
    # which nobody is served.
    gc.freeze()
    # Who computes waits for the event loop's thread no longer than this, and vice versa.
    sys.setswitchinterval(_SWITCH_S)
    logs.set_up(config.log_level, config.log_style)
    raise_descriptor_limit()
    torch_device.set_threads(config.threads)
    asyncio.run(_serve(config))


@contextlib.contextmanager
def serve_in_thread(
    config: ServerConfig, *, device: Device | None = None
) -> Iterator[str]:
    """Serve from a thread of this process; for tests, examples and benchmarks.

    Its plans are final: a last tier that is prepared in the background is traced, which
    torch can do in one thread of a process at a time, and this process has others.

    Args:
        config: Everything about the server; port 0 takes a free one.
        device: What computes; None: the one that `config` names.

    Yields:
        The target to connect to.
    """
    started: Future[str] = Future()
    stop: Future[None] = Future()

    async def main() -> None:
        logs.report_unhandled(asyncio.get_running_loop())
        try:
            final = dataclasses.replace(config, plan="final")
            async with running(final, device=device) as server:
                started.set_result(server.target)
                await asyncio.wrap_future(stop)
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=asyncio.run, args=(main(),), name="curvd-server")
    thread.start()
    try:
        yield started.result()
    finally:
        stop.set_result(None)
        thread.join()


@contextlib.asynccontextmanager
async def running(
    config: ServerConfig, *, device: Device | None = None
) -> AsyncIterator[Running]:
    """Start a server, and drain it at the end.

    Args:
        config: Everything about it.
        device: What computes; None: the one that `config` names.

    Yields:
        The server, once it serves.

    Raises:
        InvalidSpec: If it cannot listen there, or the configuration is wrong.
        FailedPrecondition: If another server uses the data directory.
    """
    limits = config.limits
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(owned(config.data_dir))
        catalogue = Catalogue(config.data_dir / "catalogue.sqlite")
        stack.callback(catalogue.close)
        activities = Activities()
        quotas = Quotas(config.quotas)
        if device is None:
            make = _fleet if config.workers else _single
            device = make(config, catalogue, activities, quotas, stack)
        memory = HostMemory(limits.memory_bytes or default_bytes())
        mounts = Mounts(config.datasets_root, config.data_dir / "mounts")
        blobs = BlobStore(
            config.data_dir / "blobs",
            mounts,
            catalogue.needed_by,
            partial_bytes=limits.partial_bytes,
            partial_s=limits.partial_s,
            memory=memory,
            referrers=catalogue.referrers,
            quotas=quotas,
        )
        blobs.collect()
        batcher = Batcher(
            run_columns=limits.run_columns,
            run_bytes=limits.block_bytes,
            pending_columns=limits.pending_columns,
            pending_bytes=limits.pending_bytes,
            memory=memory,
            quotas=quotas,
            long_bytes=psutil.virtual_memory().total // 4,
            name=f"curvd-{config.device}",
        )
        stack.callback(batcher.close)
        dependencies = SessionDependencies(
            catalogue=catalogue,
            blobs=blobs,
            device=device,
            batcher=batcher,
            limits=limits,
            memory=memory,
            quotas=quotas,
            clock=time.time,
            monotonic=time.monotonic,
            plan=Tier(config.plan),
            activities=activities,
        )
        sessions = SessionStore(dependencies)
        stack.push_async_callback(sessions.close)
        queries = QueryService(sessions=sessions, batcher=batcher, limits=limits)
        stack.callback(queries.close)
        curvature = CurvatureService(
            sessions=sessions, batcher=batcher, limits=limits, memory=memory
        )
        tally = Tally()
        sources = Sources(
            version=_version(),
            batcher=batcher,
            sessions=sessions,
            memory=memory,
            device=device,
            activities=activities,
            tally=tally,
        )
        services = [
            SessionService(
                registry=Registry(catalogue, blobs, device.architecture),
                sessions=sessions,
                blobs=blobs,
                mounts=mounts,
                checkpoints=Checkpoints(config.checkpoints_root),
                limits=limits,
                describe=lambda: _describe(config, mounts, sources),
                try_model=device.try_model,
            ),
            curvature,
            queries,
        ]
        callers = config.callers()
        metrics = await stack.enter_async_context(exposed(config.metrics, sources))
        tracing = None
        if config.traces:
            tracing = await stack.enter_async_context(config.tracing(_version()))
        target = await stack.enter_async_context(
            serving(config, services, callers, quotas, tally, tracing)
        )
        sweeper = asyncio.create_task(_expire(sessions, curvature, blobs))
        stack.callback(sweeper.cancel)
        yield Running(target, batcher, sessions, callers, quotas, metrics)


def _single(
    config: ServerConfig,
    catalogue: Catalogue,
    activities: Activities,
    quotas: Quotas,
    stack: contextlib.AsyncExitStack,
) -> Device:
    """Make the device that computes in this process."""
    compiler = None
    if config.compile_after_s:
        compiler = Compiler(
            config.data_dir / "compiled", config.compile_after_s, activities, quotas
        )
        stack.callback(compiler.close)
    return torch_device.TorchDevice(
        config.builders,
        config.device,
        catalogue.plans,
        compiler,
        allowed=config.libraries,
        model_bytes=config.limits.upload_bytes,
        idle_bytes=config.limits.idle_bytes,
        quotas=quotas,
    )


def _fleet(
    config: ServerConfig,
    catalogue: Catalogue,
    activities: Activities,
    quotas: Quotas,
    stack: contextlib.AsyncExitStack,
) -> Device:
    """Start workers; returns when all are there."""
    devices, limits = config.workers, config.limits
    for name in devices:
        torch_device.check_device(name)
    # A worker of Ray has the cores that Ray gives it: one.
    here = 1 if config.ray else max(1, usable_cores() // len(devices))
    threads = config.threads or here

    def invite(rank: int, incarnation: int, address: str, secret: str) -> Invitation:
        return Invitation(
            address=address,
            secret=secret,
            rank=rank,
            incarnation=incarnation,
            device=devices[rank],
            threads=threads,
            patience_s=config.worker_patience_s,
            builders=config.builders,
            libraries=config.libraries,
            model_bytes=limits.upload_bytes,
            idle_bytes=limits.idle_bytes,
            log_level=config.log_level,
            log_style=config.log_style,
            path=tuple(sys.path),
            world=len(devices) if config.shard_parameters else 0,
        )

    launcher: Launcher = LocalLauncher()
    if config.ray:
        gpus = int(config.device.startswith("cuda"))
        launcher = RayLauncher(config.ray, gpus=gpus)
    fleet = Fleet(
        launcher,
        invite,
        devices,
        patience_s=config.worker_patience_s,
        start_s=config.worker_start_s,
        host=config.worker_listen if config.ray else "",
    )
    stack.callback(fleet.close)
    front = torch_device.TorchDevice(
        config.builders,
        "cpu",
        allowed=config.libraries,
        model_bytes=limits.upload_bytes,
        quotas=quotas,
    )
    fleet.wait()
    if config.shard_parameters:
        return ShardedDevice(fleet, front, catalogue.plans)
    return FleetDevice(fleet, front, catalogue.plans, shards=config.shards)


async def _serve(config: ServerConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    logs.report_unhandled(loop)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    asked = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, asked.set)
    with torchs_folder(config.data_dir):
        async with running(config) as server:
            gc.freeze()  # with what the device imported
            loop.add_signal_handler(signal.SIGHUP, server.reload)
            if asked.is_set():  # while it started, and some were read already
                server.reload()
            print(f"curvd serves at {server.target}", flush=True)  # noqa: T201
            await stop.wait()
            under_way = server.sessions.activities.under_way
            end_within(config.drain_s + _CLOSING_S, under_way)
    end_within(_ENDING_S, under_way)


async def _expire(
    sessions: SessionStore,
    curvature: CurvatureService,
    blobs: BlobStore,
) -> None:
    for second in itertools.count():
        await asyncio.sleep(_SWEEP_S)
        try:
            for session_id in await sessions.expire():
                logs.logger().info("expired", session=session_id)
            curvature.expire()
            if second % _CHOOSE_AGAIN == 0:
                sessions.choose_again()
            if second % _TRIM == 0:
                await asyncio.to_thread(trim_allocator)
            if second % _SWEEP_BLOBS == 0:
                await asyncio.to_thread(
                    blobs.sweep, now_s=time.time(), monotonic_s=time.monotonic()
                )
        except Exception:
            logs.logger().exception("defect", task="expire")


def _describe(config: ServerConfig, mounts: Mounts, sources: Sources) -> ServerInfo:
    device = sources.device
    workers, generation = device.workers()
    return ServerInfo(
        version=sources.version,
        torch_version=device.torch_version,
        limits=config.limits.published(),
        devices=(device.describe(),),
        builders=device.builders,
        capabilities=CAPABILITIES,
        datasets=mounts.names(),
        activities=sources.activities.listed(),
        workers=workers,
        generation=generation,
        status=status_of(sources),
    )


def _version() -> str:
    try:
        return metadata.version("curvd")
    except metadata.PackageNotFoundError:  # a source tree on the path
        return "unknown"
