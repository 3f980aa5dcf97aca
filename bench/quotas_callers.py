"""The processes of bench/quotas.py: who multiplies, who is at his limit, who only computes.

Each reads lines and answers each with one of JSON. A process of his own has his own
interpreter and his own share of the cores, so its seconds of a processor can be told.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
from neighbours_multiplier import WIDTHS, opened, points_of, registered

import curvd

ONCE = curvd.ClientConfig(retry=curvd.RetryConfig(give_up_s=0))
SMALL = WIDTHS["small"]


def say(**found: object) -> None:
    """Answer the process that asked."""
    print(json.dumps(found), flush=True)


def ann(target: str, token: str) -> None:
    """Multiply so many seconds for each line; tell the times, failures and own CPU."""
    with curvd.connect(target, config=ONCE, token=token) as client:
        session = opened(client, SMALL, plan="final")
        H, v = session.hessian(), np.ones(session.layout.size, np.float32)
        for _ in range(200):
            H @ v
        say(ready=True)
        for line in sys.stdin:
            times, failures = [], Counter()
            cpu_s, end_s = time.process_time(), time.perf_counter() + float(line)
            while (start_s := time.perf_counter()) < end_s:
                try:
                    H @ v
                except curvd.CurvdError as error:
                    failures[type(error).__name__] += 1
                times.append(time.perf_counter() - start_s)
            say(
                median_s=statistics.median(times),
                p99_s=float(np.quantile(times, 0.99)),
                products=len(times),
                failures=failures,
                cpu_s=time.process_time() - cpu_s,
            )


def burner() -> None:
    """Compute for a share of the time: each line says for how long, and which share."""
    for line in sys.stdin:
        seconds, share = map(float, line.split())
        cpu_s, start_s = time.process_time(), time.perf_counter()
        number = 1
        while (passed_s := time.perf_counter() - start_s) < seconds:
            if time.process_time() - cpu_s < share * passed_s:
                for _ in range(5000):
                    number = (number * 31 + 7) % 1_000_003
            else:
                time.sleep(1e-3)
        say(cpu_s=time.process_time() - cpu_s)


def ben(target: str, token: str) -> None:
    """Be at a quota.

    A line names it, and has him hold all of it; then "go" and "stop" by turns, and "end".
    """
    with curvd.connect(target, config=ONCE, token=token) as client:
        opened(client, SMALL, plan="final")
        say(ready=True)
        for line in sys.stdin:
            act, threads = QUOTAS[line.strip()]
            with contextlib.ExitStack() as held:
                _ask(act(client, held), threads)


def _ask(act: Callable[[], object], threads: int) -> None:
    say(ready=True)
    for line in sys.stdin:
        if line.strip() == "end":
            return
        stopped, came = threading.Event(), Counter()
        if isinstance(act, Storm):
            act.begin()
        say(ready=True)
        cpu_s = time.process_time()

        def ask(stopped=stopped, came=came) -> None:
            while not stopped.is_set():
                try:
                    found = act()
                    came.update(found if isinstance(found, Counter) else ["done"])
                except curvd.ResourceExhausted as error:
                    came["refused"] += 1
                    came["of " + error.metadata.get("quota", "nothing")] += 1
                except curvd.CurvdError as error:
                    came[repr(error)] += 1

        asking = [threading.Thread(target=ask) for _ in range(threads)]
        for thread in asking:
            thread.start()
        assert sys.stdin.readline().strip() == "stop"
        cpu_s = time.process_time() - cpu_s
        stopped.set()
        for thread in asking:
            thread.join()
        if isinstance(act, Storm):
            act.end()
        say(cpu_s=cpu_s, **came)


Held = contextlib.ExitStack


def more_sessions(client: curvd.Client, held: Held) -> Callable[[], object]:
    """He has all his sessions, and asks for another."""
    model, data = registered(client, SMALL)
    make = lambda: client.create_session(  # noqa: E731
        model, data, loss="cross_entropy", operators=None
    )
    with contextlib.suppress(curvd.LimitExceeded):
        make()
    return make


def more_vectors(client: curvd.Client, held: Held) -> Callable[[], object]:
    """He stores all he may, and puts another vector."""
    session = client.session(client.sessions()[0].id)
    columns = np.ones((session.layout.size, 4), np.float32)
    for n in range(1000):
        try:
            session.put(f"v{n}", columns)
        except curvd.LimitExceeded:
            break
    return lambda: session.put("more", columns)


class Datasets:
    """Datasets of a size that differ in one number.

    Args:
        client: Who registers them.
        count: Data points of each.
    """

    def __init__(self, client: curvd.Client, count: int) -> None:
        self._client, self._points = client, points_of(SMALL, count)

    def register(self, number: int, **options: Any) -> curvd.DatasetInfo:
        """Register one of them."""
        self._points["x"][0, 0] = number
        return self._client.register_dataset(
            self._points, inputs="x", target="y", batch_size=128, **options
        )


def more_disk(client: curvd.Client, held: Held) -> Callable[[], object]:
    """He has registered as much as fits, and registers another dataset."""
    data = Datasets(client, 20_000)
    for number in range(100):
        try:
            held.callback(client.delete_dataset, data.register(number))
        except curvd.LimitExceeded:
            break
    return lambda: data.register(-1)


def more_uploads(client: curvd.Client, held: Held) -> Callable[[], object]:
    """He has begun as many uploads as he may, and begins another."""
    data = Datasets(client, 60_000)  # more than one chunk: it can be left in between

    class Left(Exception):
        pass

    def leave(done: int, total: int) -> None:
        if 0 < done < total:
            raise Left

    for number in range(100):
        try:
            data.register(number, progress=leave)
        except Left:
            continue
        except curvd.LimitExceeded:
            break
    return lambda: data.register(-1, progress=leave)


def more_columns(client: curvd.Client, held: Held) -> Callable[[], object]:
    """He multiplies as many columns as he may, from four threads."""
    session = client.session(client.sessions()[0].id)
    H, V = session.hessian(), np.ones((session.layout.size, 4), np.float32)
    return lambda: H @ V


def more_calls(client: curvd.Client, held: Held) -> Callable[[], object]:
    """He multiplies single columns, from twice as many threads as he may have calls."""
    session = client.session(client.sessions()[0].id)
    H, v = session.hessian(), np.ones(session.layout.size, np.float32)
    return lambda: H @ v


def more_connections(client: curvd.Client, held: Held) -> Callable[[], object]:
    """A thousand clients of his multiply, each on a connection of its own that stays."""
    return Storm(*sys.argv[2:], held)


STORM = 1000
"""Clients of one caller."""


class Storm:
    """As many clients, all connected, each of which then makes one call after the other.

    Args:
        target: The server.
        token: Who he is.
        held: Ends the thread in which they are made.
    """

    def __init__(self, target: str, token: str, held: Held) -> None:
        self._target, self._token = target, token
        self._came: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever)
        thread.start()
        held.callback(thread.join)
        held.callback(self._loop.call_soon_threadsafe, self._loop.stop)

    def begin(self) -> None:
        """Let it begin."""
        self._run(self._begin())

    def end(self) -> None:
        """Have it over: no call, and no connection is left."""
        self._run(self._end())

    def __call__(self) -> Counter[str]:
        """Wait a moment; say what came of it."""
        time.sleep(0.05)
        came, self._came = self._came, Counter()
        return came

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _begin(self) -> None:
        async with self._client() as client:
            (first, *_) = await client.sessions()
        self._open, all_open = asyncio.Semaphore(0), asyncio.Event()
        self._tasks = [
            asyncio.create_task(self._ask(first.id, all_open)) for _ in range(STORM)
        ]
        for _ in self._tasks:
            await self._open.acquire()
        all_open.set()

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _client(self) -> Any:
        return curvd.aio.connect(self._target, config=ONCE, token=self._token)

    async def _ask(self, session_id: str, all_open: asyncio.Event) -> None:
        # A client of its own: those that share one keep four connections when they pause.
        async with self._client() as client:
            await client.healthy()  # which nobody is asked for, and counts for no quota
            self._open.release()
            await all_open.wait()
            session = None
            while True:
                try:
                    if session is None:
                        session = await client.session(session_id)
                        v = np.ones(session.layout.size, np.float32)
                    await (session.hessian() @ v)
                    self._came["done"] += 1
                except curvd.ResourceExhausted as error:
                    self._came["refused"] += 1
                    self._came["of " + error.metadata.get("quota", "nothing")] += 1
                except curvd.CurvdError as error:
                    self._came[type(error).__name__] += 1


Act = Callable[[curvd.Client, Held], Callable[[], object]]
QUOTAS: dict[str, tuple[Act, int]] = {
    "sessions": (more_sessions, 1),
    "vector_bytes": (more_vectors, 1),
    "disk_bytes": (more_disk, 1),
    "uploads": (more_uploads, 1),
    "columns": (more_columns, 4),
    "calls": (more_calls, 8),
    "connections": (more_connections, 1),
}
"""What he does, and from how many threads, by the quota that stops him."""


if __name__ == "__main__":
    {"ann": ann, "ben": ben, "burner": burner}[sys.argv[1]](*sys.argv[2:])
