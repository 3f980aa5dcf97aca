"""Vectors beyond 2 GiB through the real service, and the memory that they take.

    python bench/big.py [--gigabytes 2.2]

The device multiplies by two and needs no memory of its own, so what is measured is the
transport: the server's peak above idle, and every value of the result. Needs three times
the vector in free memory.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import wire

import curvd

WANT = 3.0


class Twice(wire.Identity):
    """An operator that doubles, in the memory of the operand."""

    def apply(self, columns, *, cancelled):
        columns *= 2
        return columns


class Doubling(wire.Echo):
    """A device whose sessions have one parameter and that operator."""

    def load(self, model, *rest):
        return Doubling(model.config["size"])

    def build(self, spec, *, budget_bytes, cancelled):
        return Twice()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        wire.serve(arguments.serve, Doubling())
        return 0
    curvd.tune_allocator()
    size = int(arguments.gigabytes * 1e9 / 4)
    process, line = wire.start(__file__, "--serve", "tcp")
    try:
        with wire.connected(line) as client:
            wire.SIZES = {0: size}
            operator = wire.open_sessions(client)[size]
            vector = np.arange(size, dtype=np.float32)
            idle = wire.resident_bytes(process.pid)
            wire.reset_peak(process.pid)
            start = time.perf_counter()
            result = operator @ vector
            seconds = time.perf_counter() - start
            peak = (wire.peak_bytes(process.pid) - idle) / vector.nbytes
            vector *= 2
            right = np.array_equal(result, vector)
    finally:
        process.kill()
    print(
        f"{vector.nbytes / 2**30:.2f} GiB each way in {seconds:.1f} s, server's peak "
        f"above idle {peak:.2f} vectors (want <= {WANT}), result "
        f"{'right' if right else 'WRONG'}"
    )
    return int(not right or peak > WANT)


if __name__ == "__main__":
    sys.exit(main())
