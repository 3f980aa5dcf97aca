"""The process that speaks with Ray: it places and ends workers as it is told, line by line.

Ray ends the processes of its drivers when its head is gone for a minute, so the front is
none. Lines of JSON come on standard input, and events go to standard output; what Ray
prints goes to standard error. Commands and tensors never pass through Ray: workers connect
to the front.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
from typing import Any

from curvd_server.fleet.launcher import Invitation

POLL_S = 0.25


class RayWorker:
    """An actor in whose process a worker runs until the front is gone."""

    def run(self, line: bytes) -> None:
        """Work; returns never, for the process ends.

        Args:
            line: The invitation.
        """
        from curvd_server.fleet.worker import work

        invitation = Invitation.read(line)
        sys.path += [p for p in invitation.path if p not in sys.path]
        work(invitation)


def main() -> None:
    """Connect to the cluster that the first line names, and follow the others."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import ray

    first = json.loads(sys.stdin.readline())
    ray.init(
        address=first["address"],
        namespace="curvd",
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    Driver(ray, gpus=first["gpus"], events=events).run()


class Driver:
    """Follows the launcher.

    Args:
        ray: The module, connected to a cluster.
        gpus: How many each worker has for itself.
        events: Where lines go.
    """

    def __init__(self, ray: Any, *, gpus: int, events: Any) -> None:
        self._ray, self._events = ray, events
        # Those of one fleet on as many nodes as there are; ours decide about restarts.
        self._class = ray.remote(RayWorker).options(
            num_cpus=1, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD"
        )
        self._actors: dict[int, Any] = {}
        self._runs: dict[Any, int] = {}
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def run(self) -> None:
        """Follow lines until there are no more."""
        threading.Thread(target=self._read, daemon=True).start()
        self._say(ready=True)
        while True:
            try:
                line = self._lines.get(timeout=POLL_S)
            except queue.Empty:
                self._look()
                continue
            if not line:
                return
            told = json.loads(line)
            if "start" in told:
                self._start(told["start"])
            else:
                self._end(told["end"])

    def _read(self) -> None:
        for line in sys.stdin:
            self._lines.put(line)
        self._lines.put("")

    def _start(self, given: dict[str, Any]) -> None:
        rank = given["rank"]
        actor = self._actors[rank] = self._class.remote()
        self._runs[actor.run.remote(json.dumps(given).encode())] = rank

    def _end(self, rank: int) -> None:
        actor = self._actors.pop(rank, None)
        self._runs = {run: r for run, r in self._runs.items() if r != rank}
        if actor is not None:
            self._ray.kill(actor, no_restart=True)

    def _look(self) -> None:
        """Tell whose process ended."""
        ended, _ = (
            self._ray.wait(list(self._runs), timeout=0) if self._runs else ([], [])
        )
        for run in ended:
            rank = self._runs.pop(run)
            try:
                self._ray.get(run)
                why = "its actor returned"
            except self._ray.exceptions.RayError as error:
                why = f"Ray ended it ({str(error).splitlines()[0]})"
            self._say(ended=rank, why=why)

    def _say(self, **event: Any) -> None:
        self._events.write(json.dumps(event) + "\n")
