"""Workers as actors of a Ray cluster, which places them on its machines."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict

from curvd.errors import missing
from curvd_server.fleet.launcher import WITHHELD, Invitation

CONNECT_S = 60.0
"""How long connecting to the cluster may take."""


class RayLauncher:
    """Starts and ends actors, by a process that speaks with Ray (`ray_driver`).

    It is started when a worker has to be, and again when Ray ended it. Tokens of Ray
    (`RAY_AUTH_MODE`, `RAY_AUTH_TOKEN`) reach it by the environment.

    Args:
        address: Of the cluster, as `ray.init` takes it.
        gpus: How many each worker has for itself.

    Raises:
        ModuleNotFoundError: If Ray is not installed.
    """

    def __init__(self, address: str, *, gpus: int) -> None:
        try:
            import ray  # noqa: F401
        except ModuleNotFoundError as error:
            raise missing(what="--ray", module="ray", extra="ray") from error
        self._first = {"address": address, "gpus": gpus}
        self._driver: subprocess.Popen[str] | None = None
        self._changed = threading.Condition()
        self._is_ready = False
        self._ended: dict[int, str] = {}

    def start(self, invitation: Invitation) -> None:
        """Have an actor placed; see `Launcher.start`."""
        self._connect(invitation.path)
        self.end(invitation.rank)
        with self._changed:
            self._ended.pop(invitation.rank, None)
        self._tell(start=asdict(invitation))

    def ended(self, rank: int) -> str | None:
        """Say how an actor ended; see `Launcher.ended`."""
        with self._changed:
            if self._driver is not None and self._driver.poll() is not None:
                return "the process that speaks with Ray ended"
            return self._ended.get(rank)

    def end(self, rank: int) -> None:
        """Have an actor killed; a frozen one goes when Ray can reach it.

        It is no worker of the fleet any more: its connection is closed, and a new one is
        known by the number of its start.
        """
        with contextlib.suppress(OSError):
            self._tell(end=rank)

    def close(self) -> None:
        """End the process that speaks with Ray, and its actors with it."""
        if self._driver is not None:
            assert self._driver.stdin is not None
            with contextlib.suppress(OSError):
                self._driver.stdin.close()
            try:
                self._driver.wait(CONNECT_S)
            except subprocess.TimeoutExpired:
                self._driver.kill()
                self._driver.wait()

    def _connect(self, path: tuple[str, ...]) -> None:
        """Start the process, unless it runs, and wait until it is connected."""
        if self._driver is not None and self._driver.poll() is None:
            return
        kept = {n: v for n, v in os.environ.items() if n not in WITHHELD}
        driver = self._driver = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from curvd_server.fleet.ray_driver import main; main()",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**kept, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            text=True,
        )
        self._is_ready = False
        threading.Thread(target=self._read, args=(driver,), daemon=True).start()
        self._tell(**self._first)
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_ready or driver.poll() is not None, CONNECT_S
            )
        if not self._is_ready:
            driver.kill()
            msg = (
                f"Ray at {self._first['address']} cannot be reached within {CONNECT_S:g} s; "
                "look at the server's log, and at RAY_AUTH_MODE and RAY_AUTH_TOKEN"
            )
            raise OSError(msg)

    def _read(self, driver: subprocess.Popen[str]) -> None:
        assert driver.stdout is not None
        with driver.stdout:
            for line in driver.stdout:
                event = json.loads(line)
                with self._changed:
                    if "ready" in event:
                        self._is_ready = True
                    else:
                        self._ended[event["ended"]] = event["why"]
                    self._changed.notify_all()
        driver.wait()
        with self._changed:
            self._changed.notify_all()

    def _tell(self, **line: object) -> None:
        driver = self._driver
        if driver is None:
            return
        assert driver.stdin is not None
        driver.stdin.write(json.dumps(line) + "\n")
        driver.stdin.flush()
