"""The numbers of a running server for Prometheus, on a port of their own.

Nothing is counted for this: what the server knows is read when somebody asks, on the event
loop, and written out on the thread that was asked. No label has a value of a client's, so
there are few series, and none tells who does what.

Names and units follow https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from curvd.contract import Work, WorkerInfo
from curvd.errors import InvalidSpec
from curvd_server.config import address_of
from curvd_server.device import BatcherStatistics
from curvd_server.service.status import Sources
from curvd_server.sessions import SessionStatistics
from curvd_server.system import logger
from curvd_server.transport import BOUNDS_S, Tally

_PATIENCE_S = 5.0
"""How long a scrape waits for the event loop; a server that takes longer is ill."""


@dataclass(frozen=True, slots=True)
class _Now:
    """A server at one moment."""

    sources: Sources
    queue: BatcherStatistics
    sessions: SessionStatistics
    workers: tuple[WorkerInfo, ...]
    generation: int
    """How often a worker became ready."""


Values = Mapping[tuple[str, ...], float]
"""Values by those of the labels."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, as it is declared."""

    name: str
    """Without the suffix of counters."""
    kind: str
    """``counter``, ``gauge`` or ``histogram``."""
    help: str
    read: Callable[[_Now], Values]
    """Finds the values; a histogram reads the tally itself."""
    labels: tuple[str, ...] = ()

    @property
    def exposed(self) -> str:
        """The name as Prometheus has it."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _one(value: float) -> Values:
    return {(): value}


def _ranked(now: _Now, value: Callable[[WorkerInfo], float]) -> Values:
    return {(str(worker.rank),): float(value(worker)) for worker in now.workers}


def _by(values: Mapping[str, float]) -> Values:
    return {(name,): value for name, value in values.items()}


METRICS = (
    Metric(
        "curvd_build_info",
        "gauge",
        "1; the labels say which versions run.",
        lambda now: {(now.sources.version, now.sources.device.torch_version): 1},
        ("version", "torch"),
    ),
    Metric(
        "curvd_calls",
        "counter",
        "Calls that have ended, by method and code of the status.",
        lambda now: dict(now.sources.tally.ended),
        ("rpc", "code"),
    ),
    Metric(
        "curvd_call_seconds",
        "histogram",
        "Seconds that calls took, the time to read and send their bytes included.",
        lambda now: {},
        ("rpc",),
    ),
    Metric(
        "curvd_calls_under_way",
        "gauge",
        "Calls that have begun and not ended.",
        lambda now: _one(now.sources.tally.under_way),
    ),
    Metric(
        "curvd_products",
        "counter",
        "Products of callers that ran; a MatMat is one for each of its blocks of columns.",
        lambda now: _one(now.queue.products),
    ),
    Metric(
        "curvd_columns",
        "counter",
        "Columns of these products.",
        lambda now: _one(now.queue.columns),
    ),
    Metric(
        "curvd_query_columns",
        "counter",
        "Columns that queries have multiplied.",
        lambda now: _one(now.queue.query_columns),
    ),
    Metric(
        "curvd_runs",
        "counter",
        "Times that the device was started, for products, queries and openings.",
        lambda now: _one(now.queue.runs),
    ),
    Metric(
        "curvd_requests_given_up",
        "counter",
        "Requests to the device that were cancelled before or while they ran.",
        lambda now: _one(now.queue.cancelled),
    ),
    Metric(
        "curvd_queue_requests",
        "gauge",
        "Requests that wait for the device.",
        lambda now: _one(now.queue.waiting),
    ),
    Metric(
        "curvd_queue_columns",
        "gauge",
        "Columns of the products under way; --pending-columns is their limit.",
        lambda now: _one(now.queue.reserved_columns),
    ),
    Metric(
        "curvd_queue_bytes",
        "gauge",
        "Memory of the products under way; --pending-bytes is its limit.",
        lambda now: _one(now.queue.reserved_bytes),
    ),
    Metric(
        "curvd_sessions",
        "gauge",
        "Sessions: ready on the device, or cold until their next use.",
        lambda now: _by({"ready": now.sessions.ready, "cold": now.sessions.cold}),
        ("state",),
    ),
    Metric(
        "curvd_session_calls",
        "gauge",
        "Calls under way that use a session.",
        lambda now: _one(now.sessions.users),
    ),
    Metric(
        "curvd_operators",
        "gauge",
        "Operators that are built: in the first tier, the final one, or in native code.",
        lambda now: _by(now.sessions.tiers),
        ("tier",),
    ),
    Metric(
        "curvd_activities",
        "gauge",
        "What takes long and goes on, openings and queries among it.",
        lambda now: _by({
            str(work): now.sources.activities.counts()[work] for work in Work
        }),
        ("work",),
    ),
    Metric(
        "curvd_memory_bytes",
        "gauge",
        "Memory of the host that is held, by what for.",
        lambda now: _by(now.sources.memory.held()),
        ("kind",),
    ),
    Metric(
        "curvd_memory_limit_bytes",
        "gauge",
        "The limit of all that together (--memory-bytes).",
        lambda now: _one(now.sources.memory.limit_bytes),
    ),
    Metric(
        "curvd_device_free_bytes",
        "gauge",
        "Free memory of the device; the host's, if that computes.",
        lambda now: _by({
            now.sources.device.name: now.sources.device.describe().free_bytes
        }),
        ("device",),
    ),
    Metric(
        "curvd_device_size_bytes",
        "gauge",
        "All memory of the device.",
        lambda now: _by({
            now.sources.device.name: now.sources.device.describe().total_bytes
        }),
        ("device",),
    ),
    Metric(
        "curvd_worker_info",
        "gauge",
        "1 for each worker, by rank, where there are some; the labels say where it computes.",
        lambda now: {(str(w.rank), w.device, w.host): 1 for w in now.workers},
        ("rank", "device", "host"),
    ),
    Metric(
        "curvd_worker_ready",
        "gauge",
        "Whether a worker holds all that it should, and answers: 1, or 0.",
        lambda now: _ranked(now, lambda w: w.ready),
        ("rank",),
    ),
    Metric(
        "curvd_worker_shards",
        "gauge",
        "Shards of the data that a worker has.",
        lambda now: _ranked(now, lambda w: w.shards),
        ("rank",),
    ),
    Metric(
        "curvd_worker_restarts",
        "counter",
        "Times that another worker took the place of one that was lost.",
        lambda now: _ranked(now, lambda w: w.restarts),
        ("rank",),
    ),
    Metric(
        "curvd_worker_generation",
        "gauge",
        "Times that a worker became ready; it grows with each that comes, or comes back.",
        lambda now: _one(now.generation),
    ),
    Metric(
        "curvd_connections",
        "gauge",
        "Connections: answered by the server itself, or relayed to grpcio.",
        lambda now: _connections(now.sources.tally),
        ("carrier",),
    ),
    Metric(
        "curvd_connection_descriptors",
        "gauge",
        "Descriptors that connections take.",
        lambda now: _one(now.sources.tally.connections().get("descriptors", 0)),
    ),
    Metric(
        "curvd_dropped",
        "counter",
        "Connections and calls that were turned away, by reason; unauthenticated: logins "
        "that failed.",
        lambda now: _by(dict(now.sources.tally.dropped)),
        ("reason",),
    ),
)
"""All metrics beside those of the process, in the order of the documents."""


def table() -> str:
    """Print the table of docs/server.md.

    Returns:
        Markdown.
    """
    rows = ["| metric | kind | labels | what |", "| --- | --- | --- | --- |"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(
            f"| `{metric.exposed}` | {metric.kind} | {labels} | {metric.help} |"
        )
    return "\n".join(rows)


def families(sources: Sources) -> list[Family]:
    """Read all metrics at one moment, on the event loop; waits for no device.

    Args:
        sources: What knows them.

    Returns:
        What Prometheus' library writes out.
    """
    now = _Now(
        sources,
        sources.batcher.statistics(),
        sources.sessions.statistics(),
        *sources.device.workers(),
    )
    return [_family(metric, now) for metric in METRICS]


@contextlib.asynccontextmanager
async def exposed(listen: str, sources: Sources) -> AsyncIterator[str]:
    """Answer scrapes until the end of the context.

    Args:
        listen: ``host:port``, or empty: nobody may scrape.
        sources: What knows the numbers.

    Yields:
        ``host:port`` where scrapes are answered; empty if they are not.

    Raises:
        InvalidSpec: If the address cannot be had.
    """
    if not listen:
        yield ""
        return
    host, port = address_of(listen, "metrics")
    registry = CollectorRegistry()
    registry.register(_Scraped(sources, asyncio.get_running_loop()))
    ProcessCollector(registry=registry)
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        msg = f"cannot listen on metrics {listen}: {error.strerror or error}"
        raise InvalidSpec(msg, metrics=listen) from error
    place = f"{listen.rpartition(':')[0]}:{server.server_port}"
    logger().info("metrics", target=place)
    try:
        yield place
    finally:
        # Elsewhere: it waits for its thread, and that perhaps for this loop.
        await asyncio.to_thread(server.shutdown)
        server.server_close()


class _Scraped(Collector):
    """Fetches the numbers from the event loop when Prometheus' thread asks.

    Args:
        sources: What knows them.
        loop: Where they may be read.
    """

    def __init__(self, sources: Sources, loop: asyncio.AbstractEventLoop) -> None:
        self._sources, self._loop = sources, loop

    def collect(self) -> Iterator[Family]:
        """Read them.

        Yields:
            One family for each metric.

        Raises:
            TimeoutError: If the event loop does not answer; the scrape fails then.
        """
        found: concurrent.futures.Future[list[Family]] = concurrent.futures.Future()

        def read() -> None:
            try:
                found.set_result(families(self._sources))
            except BaseException as error:
                found.set_exception(error)

        self._loop.call_soon_threadsafe(read)
        yield from found.result(_PATIENCE_S)


def _family(metric: Metric, now: _Now) -> Family:
    if metric.kind == "histogram":
        return _histogram(metric, now.sources.tally)
    make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = make(metric.name, metric.help, labels=metric.labels)
    for labels, value in sorted(metric.read(now).items()):
        family.add_metric(labels, value)
    return family


def _histogram(metric: Metric, tally: Tally) -> Family:
    family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    bounds = [*(f"{bound:g}" for bound in BOUNDS_S), "+Inf"]
    for rpc, durations in sorted(tally.durations.items()):
        counts: Iterable[float] = itertools.accumulate(durations.counts)
        buckets = list(zip(bounds, counts, strict=True))
        family.add_metric([rpc], buckets, durations.total_s)
    return family


def _connections(tally: Tally) -> Values:
    usage = tally.connections()
    relayed = usage.get("relayed", 0)
    return _by({"direct": usage.get("open", 0) - relayed, "grpcio": relayed})
