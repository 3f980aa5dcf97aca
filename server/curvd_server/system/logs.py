"""Structured logs on top of the standard library's.

Nothing is set up on import: a program that embeds the server decides with `logging`
what becomes of the lines; `curvd serve` calls `set_up`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import structlog

_LONGEST = 200
"""Characters of a value in a line; names and ids of clients have any length."""


def _clipped(
    log: object, method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    for name, value in event.items():
        if isinstance(value, str) and len(value) > _LONGEST and name != "exception":
            more = len(value) - _LONGEST
            event[name] = f"{value[:_LONGEST]} … ({more} more characters)"
    return event


_SHARED: list[structlog.typing.Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.filter_by_level,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
    _clipped,
]


_HERE = logging.getLogger("curvd_server")
_LEVELS = {name.lower(): n for name, n in logging.getLevelNamesMapping().items()}
_JSON = structlog.processors.JSONRenderer()
_render: structlog.typing.Processor = _JSON
"""How this process writes a line; `set_up` chooses it, whenever loggers were made."""


def _rendered(log: Any, method: str, event: structlog.typing.EventDict) -> Any:
    return _render(log, method, event)


def _text(*, colors: bool) -> structlog.typing.Processor:
    """Make the renderer for people: time of day, level, event, and what belongs to it."""
    pretty = structlog.dev.ConsoleRenderer(
        colors=colors,
        pad_event_to=0,
        # A stranger's text cannot move the cursor or begin a line of its own.
        repr_native_str=True,
        exception_formatter=structlog.dev.plain_traceback,
    )

    def line(log: Any, method: str, event: structlog.typing.EventDict) -> str:
        moment = str(event.get("timestamp", ""))
        event["timestamp"] = moment.partition("T")[2].partition(".")[0]
        return pretty(log, method, event)

    return line


class _Logger(structlog.stdlib.BoundLogger):
    """Writes a traceback once: `logging` would add it to the line that has it already."""

    def exception(self, event: str | None = None, *args: Any, **values: Any) -> Any:
        """Log an error with the exception that is being handled."""
        values.setdefault("exc_info", True)
        return self.error(event, *args, **values)


def logger() -> structlog.stdlib.BoundLogger:
    """Make the server's logger.

    Returns:
        One whose lines are JSON objects in the logger ``curvd_server``, or for people
        where `set_up` says so.
    """
    bound: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger("curvd_server"),
        processors=[*_SHARED, _rendered],
        wrapper_class=_Logger,
    )
    return bound


def set_up(level: str, style: str = "auto") -> None:
    """Print the server's lines to stderr.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.
        style: ``json``, ``text`` for people, or ``auto``: text where stderr is a
            terminal, JSON in a pipe or a file.
    """
    global _render
    for_people = style == "text" or (style == "auto" and sys.stderr.isatty())
    _render = _text(colors=sys.stderr.isatty()) if for_people else _JSON
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("curvd_server")
    log.setLevel(level.upper())
    log.handlers, log.propagate = [handler], False


def is_written(level: str) -> bool:
    """Tell whether lines go anywhere, before anybody makes one.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.
    """
    return _HERE.isEnabledFor(_LEVELS[level])


def report_unhandled(loop: asyncio.AbstractEventLoop) -> None:
    """Log as a line of ours what nobody waited for and what failed.

    Args:
        loop: Where that may happen.
    """

    def report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        logger().error("defect", task=context["message"], exc_info=error)

    loop.set_exception_handler(report)
