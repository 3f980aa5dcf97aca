"""Workers are killed and frozen while clients multiply, ask queries and update.

`make storm-workers`: a server with two workers on this machine; every 15 s, for five
minutes, one of them is killed (SIGKILL), or every third time frozen (SIGSTOP). Products are
compared with eager torch's Hessian, and to the bit with the first one of the same
parameters; eigenvalues with NumPy's. Updates change between two sets of parameters. Exits
with 1 if anything is wrong, or a client sees an error other than UNAVAILABLE of a query.
Prints the longest wait.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
from support.fleets import WIDTHS, B, arrays, eager_hessian, state

import curvd

PATIENT = curvd.ClientConfig(retry=curvd.RetryConfig(give_up_s=900.0))
WORKER = "curvd_server.fleet.worker"
LOSS = curvd.LossSpec(
    name="cross_entropy", ignore_index=-1, class_weights=(1.0, 2.0, 0.5)
)


@contextlib.contextmanager
def serving(folder, *workers):
    """A server in a process of its own, with workers as the options say."""
    code = "from curvd.cli.commands import main; main()"
    command = [sys.executable, "-c", code, "serve", "--listen", "127.0.0.1:0"]
    command += ["--data-dir", folder / "data", "--shards", "4", "--threads", "1"]
    command += ["--log-level", "warning", *workers]
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    try:
        yield process.stdout.readline().decode().split()[-1], process
    finally:
        process.terminate()
        process.wait(60)


class Storm:
    """Clients, and what they saw.

    Args:
        target: The server.
        end_s: When they stop, by `time.monotonic`.
    """

    def __init__(self, target, end_s):
        self.target, self.end_s = target, end_s
        self.done, self.wrong = Counter(), Counter()
        self.longest_s = Counter()
        self.values = [state(0), state(5)]
        self.truth = [eager_hessian(values) for values in self.values]
        self.bits = {}
        with curvd.connect(target, config=PATIENT) as client:
            model = client.register_model("mlp", WIDTHS, self.values[0])
            data = client.register_dataset(
                arrays(), inputs=["x"], target="y", batch_size=B
            )
            opened = client.create_session(
                model, data, loss=LOSS, dtype="F64", plan="final", lease_s=3600.0
            )
            self.session_id = opened.id

    def loop(self, what, forgiven, step):
        """Take steps until the end, each timed."""
        with curvd.connect(self.target, config=PATIENT) as client:
            session = client.session(self.session_id)
            while time.monotonic() < self.end_s:
                start_s = time.monotonic()
                try:
                    step(session)
                    self.done[what] += 1
                except forgiven as error:
                    self.done[f"{what}: {type(error).__name__}"] += 1
                except Exception as error:
                    self.wrong[f"{what}: {type(error).__name__}: {error!s:.200}"] += 1
                seconds = time.monotonic() - start_s
                self.longest_s[what] = max(self.longest_s[what], seconds)

    def multiply(self, session):
        """One product, of a version that may be either."""
        v = np.random.default_rng(3).standard_normal(len(self.truth[0]))
        operator = session.hessian()
        product = operator @ v
        which = (operator.last.version - 1) % 2
        if not np.allclose(product, self.truth[which] @ v, atol=1e-11):
            self.wrong["a product differs from eager torch's"] += 1
        if not np.array_equal(product, self.bits.setdefault(which, product)):
            self.wrong["a product has other bits than the first one"] += 1

    def query(self, session):
        """The three largest eigenvalues."""
        found = session.hessian().eigsh(k=3)
        which = (found.version - 1) % 2
        want = np.sort(np.linalg.eigvalsh(self.truth[which]))[::-1][:3]
        if not np.allclose(np.sort(found.values)[::-1], want, atol=1e-6):
            self.wrong["eigenvalues differ from NumPy's"] += 1

    def update(self, session):
        """The other set of parameters."""
        version = session.update_parameters(self.values[self.done["updates"] % 2 - 1])
        if version != self.done["updates"] + 2:
            self.wrong[f"an update made version {version}"] += 1
        threading.Event().wait(1.0)

    def run(self):
        """Run all clients to the end."""
        nothing, lost = (), curvd.Unavailable
        threads = [
            threading.Thread(target=self.loop, args=each)
            for each in (
                ("products", nothing, self.multiply),
                ("products", nothing, self.multiply),
                ("queries", lost, self.query),
                ("updates", nothing, self.update),
            )
        ]
        for thread in threads:
            thread.start()
        return threads

    def report(self):
        """Print what was done, the longest waits, and what was wrong."""
        done = sorted(self.done.items())
        print("; ".join(f"{count} {what}" for what, count in done))
        longest = sorted(self.longest_s.items())
        print("longest:", ", ".join(f"{what} {s:.1f} s" for what, s in longest))
        for what, count in self.wrong.items():
            print(f"WRONG {count} times: {what}")


def kill(server, count):
    """Kill one worker, or freeze it."""
    found = psutil.Process(server.pid).children(recursive=True)
    workers = [p for p in found if WORKER in " ".join(p.cmdline())]
    if workers:
        signal_number = signal.SIGSTOP if count % 3 == 2 else signal.SIGKILL
        os.kill(random.choice(workers).pid, signal_number)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--every", type=float, default=15.0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    devices = ",".join(f"cpu:{rank}" for rank in range(options.workers))
    here = ["--devices", devices, "--worker-patience-s", "5"]
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), *here) as (target, server),
    ):
        end_s = time.monotonic() + options.seconds
        storm = Storm(target, end_s)
        threads, kills = storm.run(), 0
        # The last one is early enough for what it interrupts to come back.
        while time.monotonic() + options.every < end_s:
            time.sleep(options.every)
            kill(server, kills)
            kills += 1
        for thread in threads:
            thread.join()
    print(f"{kills} workers killed or frozen in {options.seconds:.0f} s;", end=" ")
    storm.report()
    sys.exit(bool(storm.wrong))


if __name__ == "__main__":
    main()
