"""Structured logs on top of the standard library's.

Nothing is set up on import: a program that embeds the server decides with `logging`
what becomes of the lines; `curvd serve` calls `set_up`.
"""

from __future__ import annotations

import logging
import sys

import structlog

_SHARED: list[structlog.typing.Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.filter_by_level,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
]


def logger() -> structlog.stdlib.BoundLogger:
    """Make the server's logger.

    Returns:
        One whose lines are JSON objects in the logger ``curvd_server``.
    """
    bound: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger("curvd_server"),
        processors=[*_SHARED, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    return bound


def set_up(level: str) -> None:
    """Print the server's lines to stderr.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("curvd_server")
    log.setLevel(level.upper())
    log.handlers, log.propagate = [handler], False
