"""A server that is killed and attacked beside its users, for half an hour.

`make storm-server`: users of both transports register, open and close sessions, and multiply one
and many columns, while strangers flood and hoard, and the server is killed (-9) now and
then and started again on the same data. Every product is compared with NumPy. Exits with
1 if a result is wrong, an error is none that a user may see, or memory or descriptors
grow while one server lives.

What a process holds goes up and down with a thousand hoarders, and the allocator keeps
what was freed for up to a minute. So the least of two halves of a life is compared, each
as long as all attacks together: in both every attack begins and ends.
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
WARM_S = 60.0
"""Memory is not looked at before: caches fill, and libraries are loaded."""
ATTACK_S = 5
HALF_S = 190.0
"""All attacks, one after the other, on a machine that does other things, too."""
LIFE_S = WARM_S + 2 * HALF_S
"""Time until a server is killed."""
MOST_MB = 24
MOST_DESCRIPTORS = 8
"""What two looks at the same state may differ by: a user connects, or none does."""
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
        command += [str(random.choice([1, 5])), str(ATTACK_S)]
        subprocess.run(command, check=False)


def lives(target, folder, end_s):
    """Run servers one after the other; yield what each held: seconds of it, and what."""
    while time.monotonic() < end_s:
        with storm_net.serving("direct", folder, None, listen=target) as (_, process):
            start_s, seen = time.monotonic(), []
            until = min(end_s, start_s + LIFE_S)
            while time.monotonic() < until:
                time.sleep(2.0)
                seen.append((time.monotonic() - start_s, storm_net.held(process)))
            if time.monotonic() < end_s:
                process.kill()
        if seen:
            yield seen


def least(seen, begin_s, end_s):
    """Descriptors and MB that were held at least in a part of a life; None: too short."""
    if not seen or seen[-1][0] < end_s - ATTACK_S:
        return None
    held = [now for at_s, now in seen if begin_s <= at_s < end_s]
    return tuple(map(min, zip(*held, strict=True)))


def grown(lives_seen):
    """Print what each server held; return what one grew by at most."""
    most = [0, 0.0]
    for seen in lives_seen:
        early = least(seen, WARM_S, WARM_S + HALF_S)
        late = least(seen, WARM_S + HALF_S, LIFE_S)
        peak = [max(p) for p in zip(*(now for _, now in seen), strict=True)]
        print(
            f"{seen[-1][0]:.0f} s: at most {peak[0]} descriptors, {peak[1]:.0f} MB;",
            end=" ",
        )
        if late is None:
            print("too short to be compared")
            continue
        print(f"at least {early[0]}, {early[1]:.1f}, then {late[0]}, {late[1]:.1f}")
        most = [max(m, b - a) for m, a, b in zip(most, early, late, strict=True)]
    return most


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
    load = Load(target, end_s)
    with tempfile.TemporaryDirectory() as name:
        threads = [
            threading.Thread(target=load.user, args=(number,), daemon=True)
            for number in range(options.users)
        ]
        stranger = threading.Thread(target=strangers, args=(target, end_s), daemon=True)
        threads.append(stranger)
        for thread in threads:
            thread.start()
        seen = list(lives(target, Path(name), end_s))
        for thread in threads:
            thread.join()
        log = (Path(name) / "direct.log").read_text()
    defects = log.count('"event": "defect"') + log.count("never retrieved")
    print(dict(load.done), "wrong:", dict(load.wrong), "defects:", defects)
    descriptors, megabytes = grown(seen)
    print(f"grown by {descriptors} descriptors and {megabytes:.1f} MB in one life")
    too_much = descriptors > MOST_DESCRIPTORS or megabytes > MOST_MB
    return int(bool(load.wrong) or defects > 0 or too_much)


if __name__ == "__main__":
    raise SystemExit(main())
