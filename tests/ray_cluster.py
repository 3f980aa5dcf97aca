"""Workers on a Ray cluster of a head and two nodes on loopback addresses, with a token.

`make ray-test`: clients multiply, ask queries and update, and are compared with eager torch
and NumPy as in `storm_workers`, while

1. a worker is killed every 15 s, for three minutes; Ray places another one;
2. a node is killed (its raylet, as when a machine goes): its worker comes back on the other;
3. the head is killed, for 45 s: products go on;
4. Ray then ends what is left of the cluster: a call fails with UNAVAILABLE, and the server
   goes on; a new cluster at the same address, and products are right again;
5. the server is killed: its workers end.

Who has no token is refused. With `--by-client` the server is no machine of the cluster, but asks
its head (`ray://`). Needs the extra `ray`; takes about ten minutes. Exits with 1 if
anything is wrong.
"""

import argparse
import contextlib
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from cut_workers import go_on, say, try_once, until
from storm_workers import Storm, serving

import curvd

HEAD, NODES, PORT = "127.0.0.2", ("127.0.0.3", "127.0.0.4"), 26379
ADDRESS = f"{HEAD}:{PORT}"
OF_RAY = {
    "RAY_raylet_start_wait_time_s": "240",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_metrics_collection": "0",
}


class Cluster:
    """A head without processors, and nodes with two each."""

    def __init__(self, folder):
        self.folder, self.parts = folder, {}

    def start(self):
        """Start all of it, one after the other: a part gives up on a busy machine."""
        temporary = f"--temp-dir={self.folder}"
        self._start(HEAD, "--head", f"--port={PORT}", "--num-cpus=0", temporary)
        for node in NODES:
            self._start(node, f"--address={ADDRESS}", "--num-cpus=2")

    def _start(self, address, *arguments):
        log = self.folder / f"{address}.log"
        for _ in range(5):
            log.write_bytes(b"")
            self._try(address, *arguments)
            while b"Ray runtime started" not in log.read_bytes():
                if self.parts[address].poll() is not None:
                    break
                time.sleep(0.5)
            else:
                return
        sys.exit(f"{address} cannot be started: {log.read_text()[-2000:]}")

    def _try(self, address, *arguments):
        command = ["ray", "start", "--block", "--disable-usage-stats"]
        command += [f"--node-ip-address={address}", "--include-log-monitor=false"]
        command += ["--object-store-memory", "100000000", *arguments]
        if "--head" in arguments:
            command.append("--include-dashboard=false")
        with open(self.folder / f"{address}.log", "ab") as log:
            self.parts[address] = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, **OF_RAY},
                start_new_session=True,
            )

    def processes(self, address):
        """All processes of a part, workers included."""
        with contextlib.suppress(psutil.NoSuchProcess):
            part = psutil.Process(self.parts[address].pid)
            return [part, *part.children(recursive=True)]
        return []

    def kill(self, address):
        """End a part at once, as when its machine goes: all its processes."""
        for process in self.processes(address):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.parts[address].wait()

    def end(self):
        for address in list(self.parts):
            self.kill(address)


def is_refused_without_token():
    """Whether Ray lets nobody in who does not know the token."""
    code = f"import ray; ray.init('{ADDRESS}', log_to_driver=False)"
    environment = {n: v for n, v in os.environ.items() if n != "RAY_AUTH_TOKEN"}
    environment["RAY_AUTH_MODE"] = "disabled"
    quiet = subprocess.DEVNULL
    with contextlib.suppress(subprocess.TimeoutExpired):
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            timeout=60,
            check=False,
            stderr=quiet,
            stdout=quiet,
        )
        return ran.returncode != 0
    return True


def workers_of(target):
    with curvd.connect(target) as client:
        return client.server_info().workers


def node_of(cluster, pid):
    """The node on which a process is."""
    for node in NODES:
        if pid in {process.pid for process in cluster.processes(node)}:
            return node
    return None


def kill_workers(storm, target, seconds, every_s):
    """The storm: one worker at a time, whichever."""
    kills, end_s = 0, time.monotonic() + seconds
    while time.monotonic() + every_s < end_s:
        time.sleep(every_s)
        pids = [w.pid for w in workers_of(target) if w.pid]
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(random.choice(pids), signal.SIGKILL)
                kills += 1
    last_s = go_on(storm, 600)
    done = sum(n for what, n in storm.done.items() if "Unavailable" not in what)
    say(
        f"1. {kills} workers killed in {seconds:.0f} s, {done} answers; a product "
        f"{last_s:.1f} s after the last one"
    )


def kill_node(storm, cluster, target):
    places = [node_of(cluster, worker.pid) for worker in workers_of(target)]
    say(f"   workers are on {places}")
    if None in places:
        storm.wrong[f"a worker is on no node: {places}"] += 1
    gone = places[0] or NODES[0]
    cluster.kill(gone)
    seconds = go_on(storm, 600)
    until("the worker's return", lambda: all(w.ready for w in workers_of(target)), 300)
    places = [node_of(cluster, worker.pid) for worker in workers_of(target)]
    say(f"2. node {gone} killed: a product after {seconds:.1f} s, workers on {places}")
    if gone in places:
        storm.wrong[f"a worker is on the node that was killed: {places}"] += 1


def kill_head(storm, cluster, target, watch_s):
    pids = [worker.pid for worker in workers_of(target)]
    cluster.kill(HEAD)
    start_s, before = time.monotonic(), storm.done["products"]
    time.sleep(watch_s)
    count = storm.done["products"] - before
    say(f"3. head killed: {count} products in the {watch_s:g} s after it")
    if count < 2:
        storm.wrong["no products without the head"] += 1
    until(
        "the end of the workers by Ray",
        lambda: not any(map(psutil.pid_exists, pids)),
        240,
    )
    ended_s = time.monotonic() - start_s
    cluster.end()
    told, seconds = try_once(target, storm.session_id)
    if not told.startswith("Unavailable"):
        storm.wrong[f"a call without a cluster: {told}"] += 1
    say(
        f"4. Ray ended the workers {ended_s:.0f} s after the head; a call told, after "
        f"{seconds:.0f} s, {told:.120}"
    )
    cluster.start()
    say(f"   a new cluster: a product {go_on(storm, 600):.0f} s after it was started")


def kill_server(target, server):
    pids = [worker.pid for worker in workers_of(target) if worker.pid]
    server.kill()
    seconds = until(
        "the end of the workers", lambda: not any(map(psutil.pid_exists, pids)), 120
    )
    say(f"5. server killed: its {len(pids)} workers ended after {seconds:.1f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--every", type=float, default=15.0)
    parser.add_argument("--without-head", type=float, default=45.0)
    parser.add_argument(
        "--by-client",
        action="store_true",
        help="reach the cluster from outside, by ray://",
    )
    parser.add_argument("--only-nodes", action="store_true", help="leave out 3 and 4")
    options = parser.parse_args()
    # So that nothing of the cluster stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    address = f"ray://{HEAD}:10001" if options.by_client else ADDRESS
    on_ray = ["--ray", address, "--ray-workers", "2", "--worker-listen", "127.0.0.1"]
    on_ray += ["--worker-patience-s", "20", "--worker-start-s", "240"]
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            start_s = time.monotonic()
            say("a head and two nodes")
            with serving(Path(folder), *on_ray) as (target, server):
                say(
                    f"a server with two workers {time.monotonic() - start_s:.0f} s after "
                    "the nodes were started"
                )
                storm = Storm(target, float("inf"))
                threads = storm.run()
                try:
                    go_on(storm, 600)
                    kill_workers(storm, target, options.seconds, options.every)
                    if not is_refused_without_token():
                        storm.wrong["who has no token was let in"] += 1
                    kill_node(storm, cluster, target)
                    if not options.only_nodes:
                        kill_head(storm, cluster, target, options.without_head)
                finally:
                    storm.end_s = 0.0
                    for thread in threads:
                        thread.join(900)
                kill_server(target, server)
        finally:
            cluster.end()
    storm.report()
    sys.exit(bool(storm.wrong))


if __name__ == "__main__":
    main()
