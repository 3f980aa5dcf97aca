"""What torch prints while it traces is kept from the user: errors are ours to tell."""

from __future__ import annotations

import builtins
import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from torch.export import _trace

_local = threading.local()
_original = builtins.print


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what torch logs, prints and warns of in this thread for a while."""
    here = threading.get_ident()

    def kept(record: logging.LogRecord) -> bool:
        return record.thread != here or not record.name.startswith("torch")

    handlers = list(_handlers())
    for handler in handlers:
        handler.addFilter(kept)
    # torch.export prints what it had traced when a forward looked at values. Others'
    # exports go on printing, so this stays: a name that their code finds first.
    vars(_trace)["print"] = _print
    before, _local.quiet = getattr(_local, "quiet", False), True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _local.quiet = before
        for handler in handlers:
            handler.removeFilter(kept)


def _print(*values: Any, **options: Any) -> None:
    """Print for all threads but those that are quiet."""
    if not getattr(_local, "quiet", False):
        _original(*values, **options)


def _handlers() -> Iterator[logging.Handler]:
    """Walk through all handlers that may print a record of torch."""
    if logging.lastResort is not None:
        yield logging.lastResort
    yield from logging.getLogger().handlers
    for name, logger in list(logging.Logger.manager.loggerDict.items()):
        if name.startswith("torch") and isinstance(logger, logging.Logger):
            yield from logger.handlers
