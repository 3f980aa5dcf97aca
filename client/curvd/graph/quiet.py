"""What torch prints while it traces is kept from the user: errors are ours to tell."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop torch's log records and warnings of this thread for a while."""
    here = threading.get_ident()

    def kept(record: logging.LogRecord) -> bool:
        return record.thread != here or not record.name.startswith("torch")

    handlers = list(_handlers())
    for handler in handlers:
        handler.addFilter(kept)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(kept)


def _handlers() -> Iterator[logging.Handler]:
    """Walk through all handlers that may print a record of torch."""
    if logging.lastResort is not None:
        yield logging.lastResort
    yield from logging.getLogger().handlers
    for name, logger in list(logging.Logger.manager.loggerDict.items()):
        if name.startswith("torch") and isinstance(logger, logging.Logger):
            yield from logger.handlers
