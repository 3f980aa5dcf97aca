"""A worker whose engine is held at its next step until it is told to stop.

Where the folder that the environment names has a file `hold`, each step of the engine is
written down in a file of the process's own, and waits there to be stopped: ``products`` in
it are mini-batches of products and gradients, ``loads`` those of openings, and tensors of
updates. So the file tells how many steps were begun, and how many of them
after somebody gave up: ``.!`` is one that was stopped, and none that followed. A process
whose number is in the file `refuses` has no memory for openings and updates.
"""

import os
import time
from pathlib import Path

from curvd_server.engine import batch_product
from curvd_server.engine.objective import objective
from curvd_server.fleet.worker import main
from curvd_server.system import cooperative

FOLDER = Path(os.environ["CURVD_TEST_HELD"])
BOUND_S = 300.0


def step(what, stopped):
    """Take note of a step, and wait to be stopped if that is wanted."""
    hold = FOLDER / "hold"
    if not (hold.exists() and what in hold.read_text()):
        return
    with open(FOLDER / f"steps-{os.getpid()}", "ab", buffering=0) as steps:
        steps.write(b".")
        until_s = time.monotonic() + BOUND_S
        while not stopped() and time.monotonic() < until_s:
            time.sleep(0.001)
        if stopped():
            steps.write(b"!")


def held_check(cancelled, _check=objective.check_cancelled):
    step("products", cancelled)
    _check(cancelled)


def held_yield_point(_yield_point=objective.yield_point):
    refuses = FOLDER / "refuses"
    if refuses.exists() and refuses.read_text() == str(os.getpid()):
        raise MemoryError
    step("loads", cooperative.given_up)
    _yield_point()


batch_product.check_cancelled = objective.check_cancelled = held_check
objective.yield_point = held_yield_point

if __name__ == "__main__":
    main()
