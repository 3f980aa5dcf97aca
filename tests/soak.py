"""Mixed load with faults for half an hour: errors, memory, descriptors.

`make soak`: users of both transports register, open and close sessions, and multiply one
and many columns, while strangers flood and hoard, and the server is killed (-9) now and
then and started again on the same data. Every product is compared with NumPy. Exits with
1 if a result is wrong, an error is none that a user may see, or memory or descriptors
grow while one server lives.
"""

import argparse
import itertools
import logging
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import hostile
import numpy as np
import storm_net

import curvd

FORGIVEN = (curvd.Unavailable, curvd.ResourceExhausted, curvd.DeadlineExceeded)
LIFE_S = 300.0
"""Time until a server is killed."""
WARM_S = 60.0
"""Memory is not looked at before."""
MOST_MB = 64
POINTS, INPUTS = 64, 8


class Load:
    """What users do until the end."""

    def __init__(self, target, end_s):
        self.target, self.end_s = target, end_s
        self.done, self.wrong = Counter(), Counter()

    def user(self, number):
        """One of them: sessions come and go."""
        rng = np.random.default_rng(number)
        transport = ("direct", "grpcio")[number % 2]
        config = curvd.ClientConfig(token=storm_net.TOKEN, transport=transport)
        while time.monotonic() < self.end_s:
            try:
                with curvd.connect(self.target, config=config) as client:
                    self.session(client, rng)
            except FORGIVEN as error:
                self.done[type(error).__name__] += 1
            except Exception as error:
                self.wrong[f"{type(error).__name__}: {str(error)[:200]}"] += 1

    def session(self, client, rng):
        """Least squares of a linear layer, whose Hessian NumPy knows."""
        x = rng.standard_normal((POINTS, INPUTS))
        points = {"x": x, "y": rng.standard_normal((POINTS, 1))}
        config = {"activation": "tanh", "widths": [INPUTS, 1]}
        state = {"1.weight": rng.standard_normal((1, INPUTS)), "1.bias": np.zeros(1)}
        model = client.register_model("mlp", config, state)
        data = client.register_dataset(
            points, inputs=["x"], target="y", batch_size=POINTS
        )
        wide = np.hstack([x, np.ones((POINTS, 1))])
        truth = 2 * wide.T @ wide / POINTS
        with client.create_session(model, data, loss="mse", dtype="F64") as session:
            operator = session.hessian()
            for _ in range(int(rng.integers(5, 60))):
                if time.monotonic() >= self.end_s:
                    return
                v = rng.standard_normal((INPUTS + 1, int(rng.integers(1, 40))))
                if not np.allclose(operator @ v, truth @ v, atol=1e-8):
                    self.wrong["a product differs from NumPy's"] += 1
                self.done["products"] += 1


def strangers(target, end_s):
    """One attack after the other."""
    names = itertools.cycle([*hostile.FLOODS, *hostile.HOARDS])
    while time.monotonic() < end_s:
        command = [sys.executable, hostile.__file__, next(names), target]
        subprocess.run([*command, str(random.choice([1, 5])), "5"], check=False)


def lives(target, folder, end_s):
    """Run servers one after the other; yield what the process held, at times."""
    while time.monotonic() < end_s:
        with storm_net.serving("direct", folder, None, listen=target) as (_, process):
            start_s, early = time.monotonic(), None
            until = min(end_s, start_s + LIFE_S)
            while time.monotonic() < until:
                time.sleep(5.0)
                now = storm_net.held(process)
                if early is None and time.monotonic() > start_s + WARM_S:
                    early = now
                yield early or now, now
            if time.monotonic() < end_s:
                process.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--users", type=int, default=4)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server ends with us
    logging.getLogger("curvd").setLevel(logging.ERROR)  # not each retry
    end_s = time.monotonic() + 60 * options.minutes
    with socket.create_server(("127.0.0.1", 0)) as free:
        target = f"127.0.0.1:{free.getsockname()[1]}"
    load, grown, most = Load(target, end_s), [0.0, 0.0], [0, 0.0]
    with tempfile.TemporaryDirectory() as name:
        threads = [
            threading.Thread(target=load.user, args=(number,), daemon=True)
            for number in range(options.users)
        ]
        stranger = threading.Thread(target=strangers, args=(target, end_s), daemon=True)
        threads.append(stranger)
        for thread in threads:
            thread.start()
        for early, now in lives(target, Path(name), end_s):
            grown = [max(g, b - a) for g, a, b in zip(grown, early, now, strict=True)]
            most = [max(pair) for pair in zip(most, now, strict=True)]
        for thread in threads:
            thread.join()
        log = (Path(name) / "direct.log").read_text()
    defects = log.count('"event": "defect"') + log.count("never retrieved")
    print(dict(load.done), "wrong:", dict(load.wrong), "defects:", defects)
    print(f"most: {most[0]} descriptors, {most[1]:.0f} MB; grown {grown[1]:.0f} MB")
    return int(bool(load.wrong) or defects > 0 or grown[1] > MOST_MB)


if __name__ == "__main__":
    raise SystemExit(main())
