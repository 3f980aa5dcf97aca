"""A worker that shares parameters and fails at its second mini-batch, where a file says so."""

import os
import sys
from pathlib import Path

from curvd_server.engine.batch_product import BatchProduct
from curvd_server.fleet import worker

FOLDER = "CURVD_TEST_FAILING"


def main():
    add = BatchProduct.add

    def failing(self, index, *args):
        rank = self._problem.model.company.rank
        if index == 1 and (Path(os.environ[FOLDER]) / f"fail-{rank}").exists():
            msg = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
            raise RuntimeError(msg)
        add(self, index, *args)

    BatchProduct.add = failing
    worker.main()


if __name__ == "__main__":
    sys.exit(main())
