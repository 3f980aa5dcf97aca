"""A server that counts who waits for what, for bench/neighbours.py."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path


def serve(folder: str, options: str) -> None:
    """Serve until killed; count who waits for what, and write it down at the end."""
    from curvd_server import app
    from curvd_server.config import ServerConfig
    from curvd_server.device import batcher

    begun, waited, steps = [0], [], [0.0]
    now = threading.local()

    class Counting(batcher.Batcher):
        long = False

        def _submit(self, key, operator, ticket):
            ticket.turns = begun[0] - self.long
            return super()._submit(key, operator, ticket)

        def _advance(self, run):
            if run.operator is not None and not run.spent_s:
                waited.extend(begun[0] - t.turns for t in run.tickets)
            begun[0] += run.in_turns
            self.long = run.in_turns
            try:
                return super()._advance(run)
            finally:
                self.long = False

    class Timed(batcher.LongWork):
        def _poll(self):
            steps.append(time.thread_time() - now.start_s)
            stop = super()._poll()
            now.start_s = time.thread_time()
            return stop

        def _run(self):
            now.start_s = time.thread_time()
            super()._run()

    batcher.LongWork, app.Batcher = Timed, Counting
    path = Path(folder)
    config = ServerConfig(
        listen="127.0.0.1:0",
        data_dir=path / "data",
        drain_s=0.0,
        log_level="warning",
        builders={"own": "neighbours_builder:build"},
        **json.loads(options),
    )
    app.serve(config)
    found = {
        "turns": max(waited, default=0),
        "products": len(waited),
        "step_ms": 1e3 * max(steps),
        "steps": len(steps),
    }
    (path / "counted.json").write_text(json.dumps(found))


class Server:
    """A server in a process of its own."""

    def __init__(self, folder: Path, **options: object) -> None:
        command = [
            sys.executable,
            __file__,
            str(folder),
            json.dumps(options),
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.target = self._process.stdout.readline().split()[-1]
        self._folder = folder

    def stop(self) -> dict[str, float]:
        """End it; return what it counted."""
        self._process.terminate()
        self._process.wait(60)
        return json.loads((self._folder / "counted.json").read_text())


if __name__ == "__main__":
    serve(*sys.argv[1:])
