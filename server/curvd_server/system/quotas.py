"""What one caller may hold, and what he holds.

A file says what each caller may: a table for all, one for each role, one for each name; the
last that says something about a quota counts. Who has no name has no quota, only the limits
of the server, which hold for all callers together.
"""

from __future__ import annotations

import contextlib
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from curvd.errors import InvalidSpec, LimitExceeded, Overloaded
from curvd_server.system.identity import ROLES, Identity, calling
from curvd_server.system.logs import logger

SESSIONS, CALLS, COLUMNS = "sessions", "calls", "columns"
VECTOR_BYTES, DISK_BYTES, UPLOADS = "vector_bytes", "disk_bytes", "uploads"
DEVICE_BYTES, TRIAL_SECONDS = "device_bytes", "trial_seconds"
COMPILE_JOBS, CONNECTIONS = "compile_jobs", "connections"
_PASSING = (CALLS, COLUMNS, COMPILE_JOBS, CONNECTIONS, TRIAL_SECONDS)
"""Quotas that are free again soon, so that a retry may succeed."""
_REMEDIES = {
    SESSIONS: "delete one, or let its lease run out",
    CALLS: "make fewer calls at once",
    COLUMNS: "wait for the columns under way",
    VECTOR_BYTES: "delete stored vectors",
    DISK_BYTES: "delete models, datasets or sessions, or complete what is being sent",
    UPLOADS: "wait until one that is being sent is complete",
    DEVICE_BYTES: "ask for a smaller budget_bytes, or delete sessions",
    TRIAL_SECONDS: "register fewer models, or wait: what was spent an hour ago is free again",
    COMPILE_JOBS: "the program goes on as it is, and native code is asked for again later",
    CONNECTIONS: "make fewer calls at once, or close clients",
}
_RETRY_S = 0.1
_HOUR_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What one caller may hold; None: as much as the server has for all."""

    sessions: int | None = None
    """Sessions at once."""
    calls: int | None = None
    """Calls at once, which is also how many connections do anything."""
    columns: int | None = None
    """Columns under way."""
    vector_bytes: int | None = None
    """Memory of stored vectors, in all sessions."""
    disk_bytes: int | None = None
    """Disk of models, datasets, parameters and uploads."""
    uploads: int | None = None
    """Uploads that are not complete."""
    device_bytes: int | None = None
    """Memory of a device: parameters and data of his sessions, and their budgets."""
    trial_seconds: int | None = None
    """Seconds of a processor in an hour for trying his models."""
    compile_jobs: int | None = None
    """Native code that is being made for him, or waits for it."""
    connections: int | None = None
    """Connections of our own clients at once."""
    weight: float = 1.0
    """Share of a device that several callers want, in comparison with theirs."""


class Quotas:
    """The quotas of one server, and what is used of them. Threads may share it.

    Args:
        path: The file; None: nobody has any.
        clock: Seconds, monotonic.

    Raises:
        InvalidSpec: If it cannot be read, or says what it must not.
    """

    def __init__(
        self,
        path: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._clock = path, clock
        self._tables = {} if path is None else read_quotas(path)
        self._lock = threading.Lock()
        self._held: Counter[tuple[str, str]] = Counter()
        # Seconds that were spent and are not free again, and when that was so.
        self._spent: dict[tuple[str, str], tuple[float, float]] = {}

    def reload(self) -> None:
        """Read the file again; if it cannot be used, what was read before goes on."""
        if self._path is None:
            return
        try:
            self._tables = read_quotas(self._path)
        except InvalidSpec as error:
            logger().error("quotas not read", error=str(error))
        else:
            logger().info("quotas read", file=str(self._path))

    def of(self, caller: Identity) -> Quota:
        """Say what a caller may hold."""
        if not caller.name or not self._tables:
            return Quota()
        found: dict[str, Any] = {}
        for table in self._sections(caller):
            found |= self._tables.get(table, {})
        return Quota(**found)

    def check(self, kind: str, held: float, more: float) -> None:
        """Refuse what would be more than the caller may hold.

        Args:
            kind: Which quota.
            held: What he holds.
            more: What is to come.

        Raises:
            Overloaded: If it would be, and soon will not be.
            LimitExceeded: If it would be.
        """
        caller = calling()
        limit = getattr(self.of(caller), kind)
        if limit is None or held + more <= limit:
            return
        msg = f"{caller.name!r} has {held:g} of {limit:g} {kind}, {more:g} more would exceed "
        raise self._refusal(kind, limit, msg)

    def left(self, kind: str) -> int | None:
        """Tell how much more the caller may hold; None: as much as the server has."""
        caller = calling()
        limit: int | None = getattr(self.of(caller), kind)
        with self._lock:
            held = self._held[caller.name, kind]
        return None if limit is None else max(0, limit - held)

    def hold(self, kind: str, amount: int, name: str) -> None:
        """Hold what a caller has had since before this process, whatever he may."""
        if name:
            with self._lock:
                self._held[name, kind] += amount

    def check_spent(self, kind: str) -> None:
        """Refuse who has spent what he may in an hour.

        Args:
            kind: Which quota; what was spent is free again little by little.

        Raises:
            Overloaded: If he has; it says when some is free again.
            LimitExceeded: If he may spend nothing.
        """
        caller = calling()
        limit = getattr(self.of(caller), kind)
        if limit is None:
            return
        spent = self._spent_by(caller.name, kind, limit)
        if spent < limit:
            return
        msg = (
            f"{caller.name!r} has spent {spent:.1f} of {limit:g} {kind} in an hour, "
            "more would exceed "
        )
        # A hundredth of it is room enough to begin.
        wait_s = (spent - 0.99 * limit) * _HOUR_S / limit if limit else 0.0
        raise self._refusal(kind, limit, msg, wait_s)

    def spend(self, kind: str, seconds: float) -> None:
        """Count what the caller has spent; one begun is never ended for it."""
        caller = calling()
        limit = getattr(self.of(caller), kind)
        if limit is None:
            return
        spent = self._spent_by(caller.name, kind, limit)
        with self._lock:
            self._spent[caller.name, kind] = (spent + seconds, self._clock())

    def _spent_by(self, name: str, kind: str, limit: float) -> float:
        with self._lock:
            spent, at_s = self._spent.get((name, kind), (0.0, 0.0))
        return max(0.0, spent - (self._clock() - at_s) * limit / _HOUR_S)

    def _refusal(
        self, kind: str, limit: float, begun: str, retry_after_s: float = _RETRY_S
    ) -> LimitExceeded | Overloaded:
        """Say what the caller has too much of, where that is set, and what to do."""
        caller = calling()
        source = next(
            table
            for table in reversed(self._sections(caller))
            if kind in self._tables.get(table, {})
        )
        msg = f"{begun}the quota ({kind} in [{source}]): {_REMEDIES[kind]}"
        facts: dict[str, Any] = {"quota": kind, "owner": caller.name, "limit": limit}
        if kind in _PASSING and limit:
            return Overloaded(msg, retry_after_s=retry_after_s, **facts)
        return LimitExceeded(msg, **facts)

    def take(self, kind: str, amount: int) -> str:
        """Hold something for the caller; `give` gives it back.

        Args:
            kind: Which quota it counts for.
            amount: How much.

        Returns:
            The caller's name, for `give`.

        Raises:
            Overloaded: As for `check`.
            LimitExceeded: As for `check`.
        """
        name = calling().name
        if not name:
            return name
        with self._lock:
            self.check(kind, self._held[name, kind], amount)
            self._held[name, kind] += amount
        return name

    def give(self, kind: str, amount: int, name: str) -> None:
        """Give something back that was taken for a caller."""
        if not name:
            return
        with self._lock:
            self._held[name, kind] -= amount
            if self._held[name, kind] <= 0:
                del self._held[name, kind]

    @contextlib.contextmanager
    def held(self, kind: str, amount: int) -> Iterator[None]:
        """Hold something for the caller inside; as for `take`."""
        name = self.take(kind, amount)
        try:
            yield
        finally:
            self.give(kind, amount, name)

    def usage(self) -> Mapping[tuple[str, str], int]:
        """Tell what is taken, by caller's name and quota."""
        with self._lock:
            return dict(self._held)

    def _sections(self, caller: Identity) -> list[str]:
        roles = [f"roles.{role}" for role in ROLES if role in caller.roles]
        return ["default", *roles, f"callers.{caller.name}"]


def read_quotas(path: Path) -> dict[str, dict[str, float]]:
    """Read a file of quotas.

    Args:
        path: TOML with a table ``default``, tables ``roles.NAME`` and ``callers.NAME``.

    Returns:
        Quotas by table.

    Raises:
        InvalidSpec: If it cannot be read, or says what it must not; the message names
            table and key.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"cannot read the quotas in {str(path)!r}: {error.strerror}"
        raise InvalidSpec(msg, file=path) from error
    except ValueError as error:  # no TOML, or no UTF-8
        msg = f"{path} is no TOML: {error}"
        raise InvalidSpec(msg, file=path) from error
    tables = {"default": found.pop("default", {})}
    for group in ("roles", "callers"):
        named = found.pop(group, {})
        if not isinstance(named, dict):
            msg = f"{path}: {group} must be tables, [{group}.NAME]"
            raise InvalidSpec(msg, file=path)
        tables |= {f"{group}.{name}": table for name, table in named.items()}
    unknown = [*found, *(t for t in tables if _is_no_role(t))]
    if unknown:
        msg = (
            f"{path} has {unknown[0]!r}; it may have [default], [roles.NAME] with a name of "
            f"{', '.join(ROLES)}, and [callers.NAME]"
        )
        raise InvalidSpec(msg, file=path)
    for name, table in tables.items():
        _check_table(path, name, table)
    return tables


def _is_no_role(table: str) -> bool:
    group, _, name = table.partition(".")
    return group == "roles" and name not in ROLES


def _check_table(path: Path, name: str, table: Any) -> None:
    known = {f.name for f in fields(Quota)}
    if not isinstance(table, dict) or (unknown := sorted(table.keys() - known)):
        what = table if not isinstance(table, dict) else unknown[0]
        msg = f"[{name}] of {path} has {what!r}; known: {', '.join(sorted(known))}"
        raise InvalidSpec(msg, file=path)
    for key, value in table.items():
        kinds = (int, float) if key == "weight" else (int,)
        low = "more than 0" if key == "weight" else "a whole number, at least 0"
        fits = isinstance(value, kinds) and not isinstance(value, bool)
        if not fits or not (0 < value < 1e6 if key == "weight" else 0 <= value < 2**62):
            msg = f"{key} in [{name}] of {path} must be {low}, got {value!r}"
            raise InvalidSpec(msg, file=path, quota=key)
