"""``curvd bench``: how long products take, and how many there are, by who asks at once.

Every caller has a connection and a thread of his own, and asks for the next product when he
has the last (a closed loop). What this process costs is in the figures: ask from several
machines before you say that the server is the limit.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import click
import numpy as np

from curvd.cli.options import connection_options, json_option
from curvd.config import ClientConfig
from curvd.contract import OperatorKind, OperatorSpec
from curvd.errors import CurvdError
from curvd.remote import Client, RemoteOperator, Session, connect

_INPUTS, _OUTPUTS, _POINTS, _BATCH = 64, 10, 256, 64
_LEAST_P = (_INPUTS + 1) + (1 + 1) * _OUTPUTS
"""Of a net with one hidden unit."""
_LEASE_S = 3600.0
"""Of the bench's own session, should nobody be there to delete it."""
_PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What one combination came to."""

    parameters: int
    """P."""
    columns: int
    """K."""
    callers: int
    products: int
    """Those that were answered."""
    failed: dict[str, int]
    """Those that were not, by reason."""
    seconds: float
    """From the first question to the last answer."""
    latency_s: dict[str, float]
    """Percentiles of what callers waited: ``p50``, ``p90``, ``p99``, ``p100``."""
    compute_s: float | None
    """Median of what the device took; None: nothing was answered."""
    products_per_s: float
    columns_per_s: float
    bytes_per_s: float
    """Of operands, and as many of results."""


@dataclass(slots=True)
class _Seen:
    """What one caller saw."""

    size: int
    """P."""
    itemsize: int
    began_s: float
    ended_s: float = 0.0
    waits_s: list[float] = field(default_factory=list)
    computes_s: list[float] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)


class _Numbers(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Positive numbers with commas between them: ``1,4,16``."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Read them; a tuple is one already."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not a list such as 1,4,16", param, ctx)
        return tuple(map(int, parts))


def add_to(main: click.Group, config_of: Callable[..., ClientConfig]) -> None:
    """Add the command.

    Args:
        main: Its group.
        config_of: Makes a client's configuration of the options of a connection.
    """

    @main.command()
    @connection_options
    @click.option("--session", help="A session of yours, in place of the bench's nets.")
    @click.option(
        "--parameters",
        "-p",
        type=_Numbers(),
        default="10000,1000000",
        show_default=True,
        help="About how many parameters P the bench's nets have; not with --session.",
    )
    @click.option(
        "--columns",
        "-k",
        type=_Numbers(),
        default="1,8",
        show_default=True,
        help="Columns K of one product.",
    )
    @click.option(
        "--concurrency",
        "-c",
        type=_Numbers(),
        default="1,4,16",
        show_default=True,
        help="Callers at once.",
    )
    @click.option(
        "--operator",
        "kind",
        type=click.Choice([kind.value for kind in OperatorKind]),
        default=OperatorKind.HESSIAN.value,
        show_default=True,
        help="What is multiplied.",
    )
    @click.option(
        "--seconds",
        type=click.FloatRange(min=0.01),
        default=3.0,
        show_default=True,
        help="How long each combination is asked for.",
    )
    @click.option(
        "--products",
        "most",
        type=click.IntRange(min=1),
        help="Products of one caller at most, also if there is time.",
    )
    @json_option
    def bench(
        target: str,
        session: str | None,
        parameters: tuple[int, ...],
        columns: tuple[int, ...],
        concurrency: tuple[int, ...],
        kind: str,
        seconds: float,
        most: int | None,
        as_json: bool,
        **options: Any,
    ) -> None:
        """Measure products of a server: latency by percentiles, and throughput.

        A net of about P parameters is made for it, on 256 data points, and removed
        afterwards, or products are asked of a session of yours. Each caller's first
        product is not counted.
        """
        config = dataclasses.replace(config_of(**options), deadline_s=None)
        spec = OperatorSpec(kind=OperatorKind(kind))
        nets = (None,) if session else parameters
        points = []
        sweep = list(itertools.product(columns, concurrency))
        with contextlib.closing(
            _sessions(target, config, session, nets, spec)
        ) as found:
            for asks, (K, callers) in ((a, one) for a in found for one in sweep):
                point = measure(
                    asks, columns=K, callers=callers, seconds=seconds, most=most
                )
                points.append(point)
                if not as_json:
                    click.echo((_HEADING if len(points) == 1 else "") + _row(point))
        if as_json:
            facts = [dataclasses.asdict(point) for point in points]
            told = {"target": target, "operator": kind, "points": facts}
            click.echo(json.dumps(told, indent=2))


Asks = Callable[[], contextlib.AbstractContextManager[RemoteOperator]]
"""Makes what one caller asks."""


def measure(
    asks: Asks, *, columns: int, callers: int, seconds: float, most: int | None
) -> Point:
    """Let callers ask for products all the time.

    Args:
        asks: Makes the operator of one caller, with a connection of its own.
        columns: K.
        callers: How many ask at once.
        seconds: When nobody asks again.
        most: Products of one caller at most; None: as many as there is time for.

    Returns:
        What they saw.

    Raises:
        CurvdError: If a caller's first product fails.
    """
    ready = threading.Barrier(callers)
    with ThreadPoolExecutor(callers, thread_name_prefix="caller") as threads:
        tasks = [
            threads.submit(_ask, asks, rank, columns, ready, seconds, most)
            for rank in range(callers)
        ]
        concurrent.futures.wait(tasks)
    # Where one fails the others wait in vain: first the error that says why.
    tasks.sort(
        key=lambda task: isinstance(task.exception(), threading.BrokenBarrierError)
    )
    return _point([task.result() for task in tasks], columns)


def _ask(
    asks: Asks,
    rank: int,
    columns: int,
    ready: threading.Barrier,
    seconds: float,
    most: int | None,
) -> _Seen:
    """Be one caller; on a thread."""
    try:
        with asks() as operator:
            V = _operand(operator, rank, columns)
            multiply = operator.matvec if columns == 1 else operator.matmat
            multiply(V)
            ready.wait()
            return _answers(operator, lambda: multiply(V), seconds, most)
    except BaseException:
        ready.abort()
        raise


def _answers(
    operator: RemoteOperator,
    multiply: Callable[[], Any],
    seconds: float,
    most: int | None,
) -> _Seen:
    """Ask until the time is up."""
    start_s = began_s = time.perf_counter()
    seen = _Seen(operator.shape[0], operator.dtype.itemsize, start_s)
    asked = 0
    while began_s - start_s < seconds and (most is None or asked < most):
        asked += 1
        try:
            multiply()
        except CurvdError as error:
            seen.failed[error.reason] += 1
        else:
            seen.waits_s.append(time.perf_counter() - began_s)
            if operator.last is not None:
                seen.computes_s.append(operator.last.compute_s)
        began_s = time.perf_counter()
    seen.ended_s = began_s
    return seen


def _operand(operator: RemoteOperator, rank: int, columns: int) -> Any:
    """Make random columns: [P], or [P, K]."""
    size = operator.shape[0]
    shape = (size,) if columns == 1 else (size, columns)
    rng = np.random.default_rng(rank)
    return rng.standard_normal(shape).astype(operator.dtype)


def _point(seen: Sequence[_Seen], columns: int) -> Point:
    waits_s = [wait for one in seen for wait in one.waits_s]
    computes_s = [compute for one in seen for compute in one.computes_s]
    failed: Counter[str] = sum((one.failed for one in seen), Counter())
    seconds = max(one.ended_s for one in seen) - min(one.began_s for one in seen)
    rate = len(waits_s) / seconds
    return Point(
        parameters=seen[0].size,
        columns=columns,
        callers=len(seen),
        products=len(waits_s),
        failed=dict(failed),
        seconds=seconds,
        latency_s={
            f"p{p}": float(np.percentile(waits_s, p)) for p in _PERCENTILES if waits_s
        },
        compute_s=float(np.median(computes_s)) if computes_s else None,
        products_per_s=rate,
        columns_per_s=rate * columns,
        bytes_per_s=rate * columns * seen[0].size * seen[0].itemsize,
    )


def _sessions(
    target: str,
    config: ClientConfig,
    session_id: str | None,
    nets: Sequence[int | None],
    spec: OperatorSpec,
) -> Generator[Asks, None, None]:
    """Make what callers ask: of the one session, or of one for each size of a net."""
    with connect(target, config=config) as client:
        for P in nets:
            with _session(client, session_id, P, spec) as session:
                yield functools.partial(_asks, target, config, session.id, spec)


@contextlib.contextmanager
def _asks(
    target: str, config: ClientConfig, session_id: str, spec: OperatorSpec
) -> Iterator[RemoteOperator]:
    """Be a caller with a connection of his own."""
    with connect(target, config=config) as client:
        yield client.session(session_id).operator(spec)


@contextlib.contextmanager
def _session(
    client: Client, session_id: str | None, P: int | None, spec: OperatorSpec
) -> Iterator[Session]:
    """Find the caller's session, or make one and remove what it is made of at the end."""
    if P is None:
        yield client.session(session_id or "")
        return
    if P < _LEAST_P:
        msg = f"--parameters must be at least {_LEAST_P}, got {P}"
        raise click.UsageError(msg)
    hidden = max(1, round((P - _OUTPUTS) / (_INPUTS + 1 + _OUTPUTS)))
    rng = np.random.default_rng(0)
    widths = [_INPUTS, hidden, _OUTPUTS]
    state = {
        "1.weight": rng.standard_normal((hidden, _INPUTS), np.float32) / _INPUTS**0.5,
        "1.bias": np.zeros(hidden, np.float32),
        "3.weight": rng.standard_normal((_OUTPUTS, hidden), np.float32) / hidden**0.5,
        "3.bias": np.zeros(_OUTPUTS, np.float32),
    }
    points = {
        "x": rng.standard_normal((_POINTS, _INPUTS), np.float32),
        "y": rng.integers(0, _OUTPUTS, _POINTS),
    }
    config = {"widths": widths, "activation": "tanh"}
    model = client.register_model("mlp", config, state)
    dataset = client.register_dataset(
        points, inputs=["x"], target="y", batch_size=_BATCH
    )
    try:
        with client.create_session(
            model,
            dataset,
            loss="cross_entropy",
            operators=[spec],
            name="curvd bench",
            lease_s=_LEASE_S,
        ) as session:
            yield session
    finally:
        with contextlib.suppress(CurvdError):  # another bench has them in use
            client.delete_model(model)
            client.delete_dataset(dataset)


_HEADING = (
    f"{'P':>10} {'K':>4} {'CALLERS':>7} {'PRODUCTS':>8} {'FAILED':>6} "
    f"{'P50 ms':>9} {'P90 ms':>9} {'P99 ms':>9} {'MAX ms':>9} {'DEVICE ms':>9} "
    f"{'PRODUCTS/s':>10} {'COLUMNS/s':>10} {'MB/s':>8}\n"
)


def _row(point: Point) -> str:
    waits = " ".join(
        f"{1e3 * point.latency_s[f'p{p}']:9.2f}" if point.latency_s else f"{'-':>9}"
        for p in _PERCENTILES
    )
    device = "-" if point.compute_s is None else f"{1e3 * point.compute_s:.2f}"
    return (
        f"{point.parameters:10} {point.columns:4} {point.callers:7} "
        f"{point.products:8} {sum(point.failed.values()):6} {waits} {device:>9} "
        f"{point.products_per_s:10.1f} {point.columns_per_s:10.1f} "
        f"{point.bytes_per_s / 1e6:8.1f}"
    )
