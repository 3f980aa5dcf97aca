"""Errors of torch in the words of this project."""

from __future__ import annotations

import re

from curvd.errors import InvalidSpec, OutOfMemory
from curvd_server.system import is_out_of_memory

_OUTSIDE = re.compile(r"^index .*out of (range|bounds)")
"""How torch says that a table has no such row."""


class translated:
    """Turns what memory and data are to blame for into ours; everything else passes."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: object, error: BaseException | None, trace: object
    ) -> None:
        if is_out_of_memory(error):
            msg = (
                "the device has not enough memory: use a smaller batch_size, a smaller "
                "budget_bytes, or delete sessions"
            )
            raise OutOfMemory(msg) from error
        if isinstance(error, IndexError | RuntimeError) and _OUTSIDE.search(str(error)):
            msg = (
                f"the model fails on the data: {str(error).splitlines()[0]}. Integers in "
                "the data index a table of the model: they must be below its size"
            )
            raise InvalidSpec(msg) from error
