"""A server that is killed at any step of what it does to its disk.

``python -m support.killed`` imports everything once; for each line of its input it forks a
server, which prints its process and its target. A server may be told to end itself, as by
``kill -9``, before the k-th of the steps after it has begun to serve: a transaction of either
file of the catalogue, or a file that is made, renamed or removed.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

STEPS = ("_transaction", "unlink", "touch", "rename")


class Fallible:
    """Servers that may be killed, on one data directory after the other."""

    def __init__(self):
        self._home = subprocess.Popen(
            [sys.executable, "-m", "support.killed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._running = None

    def start(self, folder, *, dies_at=0):
        """Fork a server, and wait until it serves.

        Args:
            folder: Its data directory.
            dies_at: The step before which it ends itself; 0: none.

        Returns:
            Its target.
        """
        order = {"folder": str(folder), "dies_at": dies_at}
        self._home.stdin.write(json.dumps(order) + "\n")
        self._home.stdin.flush()
        self._running, target = json.loads(self._home.stdout.readline())
        return target

    def kill(self):
        """End the server as nobody can prevent, unless it has done so itself."""
        self._home.stdin.write(json.dumps({"kill": self._running}) + "\n")
        self._home.stdin.flush()
        self._home.stdout.readline()

    def close(self):
        self._home.stdin.close()
        self._home.stdout.close()
        self._home.wait(300)


def main():
    from support.fake_device import FakeDevice

    from curvd_server.app import running
    from curvd_server.config import ServerConfig
    from curvd_server.storage import database

    async def serve(order, pipe):
        folder = Path(order["folder"])
        config = ServerConfig(listen="127.0.0.1:0", data_dir=folder, drain_s=0.0)
        async with running(config, device=FakeDevice()) as server:
            if order["dies_at"]:
                arm(order["dies_at"])
            os.write(pipe, server.target.encode())
            os.close(pipe)
            await asyncio.Event().wait()

    def arm(dies_at):
        """End this process before the step of that number."""
        taken = 0

        def stepping(step):
            def taking(*args, **kwargs):
                nonlocal taken
                taken += 1
                if taken == dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(*args, **kwargs)

            return taking

        database._transaction = stepping(database._transaction)
        for name in STEPS[1:]:
            setattr(Path, name, stepping(getattr(Path, name)))

    for line in sys.stdin:
        order = json.loads(line)
        if "kill" in order:
            os.kill(order["kill"], signal.SIGKILL)  # it is ours until it is waited for
            os.waitpid(order["kill"], 0)
            print("gone", flush=True)
            continue
        here, there = os.pipe()
        pid = os.fork()
        if not pid:
            sys.stdin.close()
            os.close(here)
            try:
                asyncio.run(serve(order, there))
            finally:
                os._exit(1)
        os.close(there)
        target = b""
        while piece := os.read(here, 1 << 10):
            target += piece
        os.close(here)
        print(json.dumps([pid, target.decode()]), flush=True)


if __name__ == "__main__":
    main()
