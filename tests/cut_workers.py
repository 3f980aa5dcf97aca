"""Nodes are cut off from the network while clients multiply, ask queries and update.

A server, and two nodes for its two workers, each a network namespace behind a pair of virtual
interfaces, all in a namespace of their own. A stand-in for a scheduler places workers on
nodes whose link is up, and cannot reach those that are cut off, as a cluster's cannot. Taking
a link down loses all packets and says so to nobody. In this order:

1. for less than the patience: nobody is replaced, and products go on;
2. a node for long: its worker is replaced on the other node, and the one that was left behind
   ends by itself;
3. all nodes: a call fails with UNAVAILABLE within the bound that was set, and products are
   right again when links are up.

Products and queries are compared as in `storm_workers`. Exits with 1 if anything is wrong. Run
by `make storm-workers`; needs the right to make network namespaces, and says so without it.
"""

import contextlib
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from storm_workers import WORKER, Storm

import curvd
from curvd_server import app
from curvd_server.config import ServerConfig
from curvd_server.fleet import LocalLauncher

PATIENCE_S, START_S = 10.0, 180.0
HOST = "10.231.0.1"
"""Of the server; on the loopback interface, which its namespace has for itself."""
CODE = "from curvd_server.fleet.worker import main; main()"


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Node:
    """A namespace, and the server's end of the link to it."""

    def __init__(self, index):
        self.name, self.link = f"curvd-{os.getpid()}-{index}", f"to{index}"
        here, there = f"10.231.{index}.1", f"10.231.{index}.2"
        ip("netns", "add", self.name)
        inside = ["-n", self.name]
        ip("link", "add", self.link, "type", "veth", "peer", "eth0", "netns", self.name)
        ip("addr", "add", f"{here}/30", "dev", self.link)
        ip(*inside, "addr", "add", f"{there}/30", "dev", "eth0")
        ip(*inside, "link", "set", "eth0", "up")
        ip(*inside, "link", "set", "lo", "up")
        self.set("up")
        ip(*inside, "route", "add", "default", "via", here)

    def set(self, state):
        self.is_up = state == "up"
        ip("link", "set", self.link, state)

    def remove(self):
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("netns", "del", self.name)


class Scheduler(LocalLauncher):
    """Places workers on the node with the fewest, of those that it can reach."""

    def __init__(self, nodes):
        super().__init__(CODE)
        self.nodes, self.places, self.left_behind = nodes, {}, []
        self.starts, self._asked = 0, queue.SimpleQueue()
        # Always the same thread: the system ends a worker with the thread that began it.
        threading.Thread(target=self._place, daemon=True).start()

    def start(self, invitation):
        self.starts += 1
        self._asked.put(invitation)

    def _place(self):
        """Begin what was asked for, when there is a node; until then say nothing."""
        while True:
            invitation = self._asked.get()
            while not any(n.is_up for n in self.nodes):
                time.sleep(0.1)
            super().start(invitation)

    def command(self, invitation):
        taken = list(self.places.values())
        node = min((n for n in self.nodes if n.is_up), key=taken.count)
        self.places[invitation.rank] = node
        return ["ip", "netns", "exec", node.name, *super().command(invitation)]

    def end(self, rank):
        node = self.places.pop(rank, None)
        if node is None or node.is_up:
            super().end(rank)
        elif rank in self._processes:
            process = self._processes.pop(rank)
            self.left_behind.append((process, time.monotonic()))
            # Its input stays open: nobody there knows.


def say(*words):
    print(*words, flush=True)


def until(what, done, bound_s):
    """Wait for something, and tell how long it took."""
    start_s = time.monotonic()
    while not done():
        if time.monotonic() - start_s > bound_s:
            sys.exit(f"WRONG: {what} took more than {bound_s:g} s")
        time.sleep(0.05)
    return time.monotonic() - start_s


def products_of(storm):
    return storm.done["products"]


def go_on(storm, bound_s):
    """How long until a product that began now, or later, is there."""
    before = products_of(storm)
    # Each of two clients has one under way.
    return until("a product", lambda: products_of(storm) >= before + 3, bound_s)


def try_once(target, session_id):
    """What a client sees that does not try again, and after how long."""
    once = curvd.ClientConfig(retry=curvd.RetryConfig(give_up_s=0.1))
    start_s = time.monotonic()
    with curvd.connect(target, config=once) as client:
        operator = client.session(session_id).hessian()
        try:
            operator @ np.ones(operator.shape[0])
            told = "no error"
        except curvd.CurvdError as error:
            told = f"{type(error).__name__}: {error}"
    return told, time.monotonic() - start_s


def storm_of(scheduler, nodes, folder):
    app.RayLauncher = lambda address, gpus: scheduler
    config = ServerConfig(
        listen="127.0.0.1:0",
        data_dir=folder / "data",
        ray="nodes",
        ray_workers=2,
        worker_listen=HOST,
        worker_patience_s=PATIENCE_S,
        worker_start_s=START_S,
        shards=4,
        threads=1,
        log_level="error",
    )
    with app.serve_in_thread(config) as target:
        storm = Storm(target, float("inf"))
        threads = storm.run()
        go_on(storm, 600)
        try:
            cut_off(storm, scheduler, nodes, target)
        finally:
            storm.end_s = 0.0
            for node in nodes:
                node.set("up")
            for thread in threads:
                thread.join(300)
    return storm


def cut_off(storm, scheduler, nodes, target):
    one, other = nodes

    starts = scheduler.starts
    one.set("down")
    time.sleep(PATIENCE_S / 4)
    one.set("up")
    seconds = go_on(storm, 300)
    assert scheduler.starts == starts, (
        "a worker was replaced that was not gone for long"
    )
    say(
        f"1. a link down for {PATIENCE_S / 4:g} s: no worker replaced; a product after "
        f"{seconds:.1f} s"
    )

    one.set("down")
    seconds = go_on(storm, 600)
    assert scheduler.starts > starts, "nobody was replaced"
    assert one not in scheduler.places.values()
    process, left_s = scheduler.left_behind[0]
    until("the end of who was left behind", lambda: process.poll() is not None, 60)
    say(
        f"2. a node cut off: a product, with its worker on the other node, after "
        f"{seconds:.1f} s; who was left behind ended by itself "
        f"{time.monotonic() - left_s:.0f} s after it was replaced, at the latest"
    )
    one.set("up")

    other.set("down")
    one.set("down")
    told, seconds = try_once(target, storm.session_id)
    if not told.startswith("Unavailable"):
        storm.wrong[f"a call with no node to be had: {told}"] += 1
    bound_s = START_S + 2 * PATIENCE_S + 10
    if seconds > bound_s:
        storm.wrong[f"UNAVAILABLE after {seconds:.0f} s, above {bound_s:g}"] += 1
    say(f"3. all nodes cut off: after {seconds:.0f} s {told:.160}")
    one.set("up")
    other.set("up")
    say(f"   links up: a product after {go_on(storm, 600):.1f} s")


def can_make_namespaces():
    """Whether this process may; else why not."""
    name = f"curvd-{os.getpid()}"
    try:
        ip("netns", "add", name)
    except FileNotFoundError:
        return "there is no `ip` (Debian's iproute2)"
    except subprocess.CalledProcessError as error:
        return error.stderr.decode().strip()
    ip("netns", "del", name)
    return ""


def main():
    why_not = can_make_namespaces()
    if why_not:
        say(f"skipped: network namespaces cannot be made here: {why_not}")
        return
    if "--inside" not in sys.argv:
        own = f"curvd-{os.getpid()}-front"
        ip("netns", "add", own)
        try:
            command = ["ip", "netns", "exec", own, sys.executable, __file__, "--inside"]
            sys.exit(subprocess.run(command, check=False).returncode)
        finally:
            ip("netns", "del", own)
    ip("link", "set", "lo", "up")
    ip("addr", "add", f"{HOST}/32", "dev", "lo")
    nodes = []
    try:
        nodes += [Node(1), Node(2)]
        with tempfile.TemporaryDirectory() as folder:
            scheduler = Scheduler(nodes)
            storm = storm_of(scheduler, nodes, Path(folder))
        for process, _ in scheduler.left_behind:
            until(
                "the end of who was left behind",
                lambda p=process: p.poll() is not None,
                60,
            )
    finally:
        for node in nodes:
            node.remove()
    children = psutil.Process().children(recursive=True)
    left = [p.pid for p in children if WORKER in " ".join(p.cmdline())]
    if left:
        storm.wrong[f"processes left behind: {left}"] += 1
    storm.report()
    sys.exit(bool(storm.wrong))


if __name__ == "__main__":
    main()
