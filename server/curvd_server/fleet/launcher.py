"""Starts and ends workers: plain processes on this machine.

A worker is invited by a line of JSON on its standard input, which nobody else can read:
where to connect, and the secret of the fleet. The input stays open as long as the front
lives; the system closes it however the front ends, and the worker ends too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

from curvd_server.system import uninterrupted

WITHHELD = ("CURVD_TOKEN",)
"""Variables that no worker needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """What a worker has to know to come."""

    address: str
    """Path of the front's Unix socket; or ``tcp:host:port``."""
    secret: str
    """In hexadecimal; both ends of each connection prove that they know it."""
    rank: int
    incarnation: int
    """How often this rank was started before."""
    device: str
    """Where it computes, for example ``cpu:0`` or ``cuda:1``."""
    threads: int
    """Threads that compute one product at most."""
    patience_s: float
    """How long the front waits for a word of it; a network that is gone for twice as long
    ends it, for the front has started another one."""
    builders: Mapping[str, str]
    libraries: tuple[str, ...]
    model_bytes: int
    idle_bytes: int
    log_level: str
    log_style: str
    path: tuple[str, ...]
    """Where the front finds modules; the worker's builders lie there, too."""
    world: int = 0
    """Workers that share the parameters of every model; 0: each holds all of them."""

    def written(self) -> bytes:
        """Write it as a line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def read(cls, line: bytes) -> Invitation:
        """Read a line that `written` wrote."""
        given = json.loads(line)
        for name in ("libraries", "path"):
            given[name] = tuple(given[name])
        return cls(**given)


class Launcher(Protocol):
    """Whoever starts processes, here or elsewhere."""

    def start(self, invitation: Invitation) -> None:
        """Start a worker; it connects when it is ready.

        Args:
            invitation: Names its rank; whoever had that rank before was ended.

        Raises:
            OSError: If it cannot be started.
        """

    def ended(self, rank: int) -> str | None:
        """Say how a worker ended by itself; None if it runs, as far as is known."""

    def end(self, rank: int) -> None:
        """End a worker at once, whatever it does, and wait until it is gone."""

    def close(self) -> None:
        """End all of them."""


class LocalLauncher:
    """Workers as child processes of the front.

    Args:
        code: What such a process runs.
    """

    def __init__(
        self, code: str = "from curvd_server.fleet.worker import main; main()"
    ) -> None:
        self._code = code
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, invitation: Invitation) -> None:
        """Start a process; see `Launcher.start`."""
        self.end(invitation.rank)
        kept = {n: v for n, v in os.environ.items() if n not in WITHHELD}
        with uninterrupted():
            process = subprocess.Popen(
                self.command(invitation),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env={
                    **kept,
                    "OMP_NUM_THREADS": str(invitation.threads),
                    "OMP_WAIT_POLICY": "passive",
                    "PYTHONPATH": os.pathsep.join(filter(None, invitation.path)),
                },
            )
        self._processes[invitation.rank] = process
        assert process.stdin is not None
        process.stdin.write(invitation.written())
        process.stdin.flush()  # and it stays open

    def command(self, invitation: Invitation) -> list[str]:
        """Say what is run for a worker, which is told the invitation on its input."""
        return [sys.executable, "-c", self._code]

    def ended(self, rank: int) -> str | None:
        """Say how a process ended; see `Launcher.ended`."""
        process = self._processes.get(rank)
        status = None if process is None else process.poll()
        return None if status is None else f"its process ended with status {status}"

    def end(self, rank: int) -> None:
        """End a process; see `Launcher.end`."""
        process = self._processes.pop(rank, None)
        if process is None:
            return
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()

    def close(self) -> None:
        """End all processes."""
        for rank in list(self._processes):
            self.end(rank)
