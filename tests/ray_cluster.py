"""Workers on a Ray cluster of a head and a node on loopback addresses, with a token.

`make ray-test`: products equal eager torch's Hessian, a worker that is killed is placed
anew and the bits stay, a front without the token is refused, and products go on when the
head is killed. Takes about two minutes; needs the extra `ray`.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
from support.fleets import device_of, eager_hessian, invite, load, never

from curvd.contract.specs import OperatorSpec
from curvd_server.fleet import Fleet
from curvd_server.fleet.ray_launcher import RayLauncher

HEAD, NODE, PORT = "127.0.0.2", "127.0.0.3", 26379
ADDRESS = f"{HEAD}:{PORT}"


def started(*arguments):
    """A part of the cluster, in a process of its own."""
    command = ["ray", "start", "--block", "--disable-usage-stats", *arguments]
    environment = {**os.environ, "RAY_raylet_start_wait_time_s": "120"}
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )


@contextlib.contextmanager
def cluster():
    """A head without processors, and a node with two."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        few = ["--object-store-memory", "100000000"]
        head = started(
            "--head",
            f"--node-ip-address={HEAD}",
            f"--port={PORT}",
            "--num-cpus=0",
            "--include-dashboard=false",
            f"--temp-dir={folder}",
            *few,
        )
        parts = [head]
        try:
            # A node gives up if the head is not there, and the head does not get there
            # while it is asked.
            time.sleep(20)
            own = [f"--node-ip-address={NODE}", "--num-cpus=2"]
            parts.append(started(f"--address={ADDRESS}", *own, *few))
            yield head
        finally:
            for part in parts:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(part.pid, signal.SIGKILL)
                part.wait()


def dense(operator):
    return operator.apply(np.eye(operator.size), cancelled=never)


def is_refused_without_token():
    """Whether Ray lets nobody in who does not know the token."""
    code = f"import ray; ray.init('{ADDRESS}', log_to_driver=False)"
    environment = {n: v for n, v in os.environ.items() if n != "RAY_AUTH_TOKEN"}
    environment["RAY_AUTH_MODE"] = "disabled"
    command = [sys.executable, "-c", code]
    with contextlib.suppress(subprocess.TimeoutExpired):
        quiet = subprocess.DEVNULL
        ran = subprocess.run(
            command,
            env=environment,
            timeout=60,
            check=False,
            stderr=quiet,
            stdout=quiet,
        )
        return ran.returncode != 0
    return True


def main():
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with cluster() as head:
        start_s = time.monotonic()
        launcher = RayLauncher(ADDRESS, gpus=0)
        devices = ("cpu", "cpu")
        fleet = Fleet(launcher, invite, devices, patience_s=60.0, host="127.0.0.1")
        try:
            fleet.wait()
            print(f"two workers after {time.monotonic() - start_s:.0f} s")
            problem = load(device_of(fleet))
            operator = problem.build(
                OperatorSpec(), budget_bytes=1 << 30, cancelled=never
            )
            want = dense(operator)
            np.testing.assert_allclose(want, eager_hessian(), atol=1e-13)
            print("products equal eager torch's Hessian")
            for rank in (0, 1):
                start_s = time.monotonic()
                os.kill(fleet.seats[rank].hello.pid, signal.SIGKILL)
                np.testing.assert_array_equal(dense(operator), want)
                print(f"killed: same bits after {time.monotonic() - start_s:.1f} s")
            assert is_refused_without_token()
            print("who has no token is refused")
            os.killpg(head.pid, signal.SIGKILL)
            end_s, count = time.monotonic() + 20, 0
            while time.monotonic() < end_s:
                np.testing.assert_array_equal(dense(operator), want)
                count += 1
            print(f"head killed: {count} products to the bit in the 20 s after it")
        finally:
            fleet.close()


if __name__ == "__main__":
    main()
