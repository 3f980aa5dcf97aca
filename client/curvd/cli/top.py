"""``curvd top``: what a server does now, looked at again and again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click

from curvd.cli.options import connection_options, json_option
from curvd.config import ClientConfig
from curvd.contract import (
    Activity,
    OperatorSpec,
    PlanReport,
    ServerInfo,
    ServerStatus,
    SessionInfo,
    Tier,
)
from curvd.errors import Unimplemented
from curvd.remote import Client, connect

_RATES = ("calls", "products", "columns", "query_columns")
"""What is shown per second, too."""
NATIVE = "native"
"""The tier of operators in native code, beside those of plans."""
_HOME, _REST_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"
_LEAST_S = 1e-3
"""Two looks that are closer tell no rate."""


@dataclass(frozen=True, slots=True)
class Look:
    """A server at one moment."""

    target: str
    server: ServerInfo
    status: ServerStatus
    sessions: Sequence[SessionInfo]
    rates: dict[str, float]
    """Per second, since the look before; empty in the first one."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a program reads."""
        return {
            "target": self.target,
            "version": self.server.version,
            "status": dataclasses.asdict(self.status),
            "rates_per_s": self.rates,
            "devices": [dataclasses.asdict(d) for d in self.server.devices],
            "workers": [dataclasses.asdict(w) for w in self.server.workers],
            "activities": [dataclasses.asdict(a) for a in self.server.activities],
            "sessions": [_session_facts(s) for s in self.sessions],
        }

    @property
    def lines(self) -> list[str]:
        """What people read."""
        return [
            *_server_lines(self),
            *_table([_HEAD, *map(_session_row, self.sessions)]),
            *_activity_lines(self.server.activities),
        ]


def looks(client: Client, target: str, every_s: float) -> Iterator[Look]:
    """Look at a server until nobody wants more.

    Args:
        client: Asks it.
        target: Where it is.
        every_s: Seconds between two looks.

    Yields:
        What it is like; from the second look on with rates.

    Raises:
        Unimplemented: If the server is older, and does not say how it fares.
    """
    before: ServerStatus | None = None
    while True:
        server = client.server_info()
        if server.status is None:
            msg = (
                f"curvd {server.version} at {target} does not say how it fares: update "
                "the server, or ask curvd info"
            )
            raise Unimplemented(msg)
        rates = {} if before is None else _rates(before, server.status)
        yield Look(target, server, server.status, client.sessions(), rates)
        before = server.status
        time.sleep(every_s)


def add_to(main: click.Group, config_of: Callable[..., ClientConfig]) -> None:
    """Add the command.

    Args:
        main: Its group.
        config_of: Makes a client's configuration of the options of a connection.
    """

    @main.command()
    @connection_options
    @click.option(
        "--every-s",
        type=click.FloatRange(min=0.01),
        default=1.0,
        show_default=True,
        help="Seconds between two looks.",
    )
    @click.option(
        "--once", is_flag=True, help="Look twice, for the rates, and print once."
    )
    @json_option
    def top(
        target: str, every_s: float, once: bool, as_json: bool, **options: Any
    ) -> None:
        """Show what a server does: queue, rates, memory, sessions, work under way.

        On a terminal it is written anew with each look, in a pipe one look follows the
        other; with --json each is an object on a line of its own. Ctrl-C ends it.
        """
        with (
            connect(target, config=config_of(**options)) as client,
            contextlib.suppress(KeyboardInterrupt),
        ):
            found = looks(client, target, every_s)
            if once:
                next(found)
                look = next(found)
                text = json.dumps(look.facts) if as_json else "\n".join(look.lines)
                click.echo(text)
                return
            for look in found:
                _show(look, as_json=as_json)


def _show(look: Look, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(look.facts))
    elif sys.stdout.isatty():
        width, height = shutil.get_terminal_size()
        lines = [line[:width] + _REST_OF_LINE for line in look.lines[: height - 1]]
        click.echo(_HOME + "\n".join(lines) + _REST, nl=False)
    else:
        click.echo("\n".join([*look.lines, ""]))


def _rates(before: ServerStatus, now: ServerStatus) -> dict[str, float]:
    """Say how much was done per second; nothing if the server began anew meanwhile."""
    passed_s = now.uptime_s - before.uptime_s
    if passed_s < _LEAST_S:
        return {}
    done = {name: getattr(now, name) - getattr(before, name) for name in _RATES}
    return {name: count / passed_s for name, count in done.items()}


def _server_lines(look: Look) -> list[str]:
    status, server = look.status, look.server
    per_s = {
        name: f"{look.rates[name]:.1f}/s" if look.rates else "-/s" for name in _RATES
    }
    held = ", ".join(
        f"{kind} {_size(n)}" for kind, n in sorted(status.memory_bytes.items()) if n
    )
    # Maps come in no order.
    tiers = sorted(
        status.operators, key=lambda tier: (tier == NATIVE, tier != Tier.FIRST)
    )
    operators = ", ".join(f"{status.operators[tier]} {tier}" for tier in tiers)
    return [
        f"curvd {server.version} at {look.target}, up {_span(status.uptime_s)}",
        *(
            f"device    {d.name}: {_size(d.free_bytes)} of {_size(d.total_bytes)} free"
            for d in server.devices
        ),
        *(
            f"worker    {w.rank} on {w.device}: {'ready' if w.ready else 'not ready'}, "
            f"{w.restarts} restarts"
            for w in server.workers
        ),
        f"calls     {per_s['calls']}, {status.calls_under_way} under way, "
        f"{status.calls} ended, {status.failed_calls} failed; "
        f"{status.connections} connections",
        f"products  {per_s['products']}, {per_s['columns']} columns, "
        f"{per_s['query_columns']} columns of queries; {status.products} in all",
        f"queue     {status.queue_requests} wait; {status.queue_columns} columns and "
        f"{_size(status.queue_bytes)} under way",
        f"memory    {held or 'nothing held'}, of {_size(status.memory_limit_bytes)}",
        f"sessions  {status.ready_sessions} ready, {status.cold_sessions} cold; "
        f"operators: {operators}",
        "",
    ]


_HEAD = ("SESSION", "NAME", "OWNER", "P", "N", "STATE", "VERSION", "OPERATORS")


def _session_row(session: SessionInfo) -> tuple[str, ...]:
    return (
        session.id,
        repr(session.name),  # a stranger's text cannot move the cursor
        repr(session.owner) if session.owner else "-",
        f"{session.layout.size}",
        f"{session.data_points}",
        f"{session.state}",
        f"{session.version}",
        ", ".join(f"{s.kind} {_tier(plan)}" for s, plan in session.operators) or "-",
    )


def _session_facts(session: SessionInfo) -> dict[str, Any]:
    return {
        "id": session.id,
        "name": session.name,
        "owner": session.owner,
        "parameters": session.layout.size,
        "data_points": session.data_points,
        "state": session.state,
        "version": session.version,
        "operators": [_operator_facts(s, plan) for s, plan in session.operators],
    }


def _operator_facts(spec: OperatorSpec, plan: PlanReport) -> dict[str, Any]:
    return {
        "kind": spec.kind,
        "tier": _tier(plan),
        "mode": plan.mode,
        "kept_bytes": plan.kept_bytes,
        "seconds_per_product": plan.seconds_per_product,
    }


def _tier(plan: PlanReport) -> str:
    return NATIVE if plan.compiled else str(plan.tier)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        .rstrip()
        for row in rows
    ]  # fmt: skip


def _activity_lines(activities: Sequence[Activity]) -> list[str]:
    lines = ["", "AT WORK"] if activities else []
    for a in activities:
        session = a.session_id or repr(a.session_name)
        subject = f" {a.subject}" if a.subject else ""
        lines.append(
            f"{a.work}{subject} of {session}: {a.progress}, {_span(a.elapsed_s)}"
        )
    return lines


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
