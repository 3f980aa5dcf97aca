"""When a failed call is made again, and when no more."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import tenacity

from curvd.config import ClientConfig
from curvd.errors import CurvdError, ResourceExhausted, Unavailable

logger = logging.getLogger("curvd")


def is_worth_a_retry(error: BaseException) -> bool:
    """Tell whether the same call may succeed later.

    Args:
        error: What it raised.

    Returns:
        True if the server was away, or said when to come back.
    """
    return isinstance(error, Unavailable) or (
        isinstance(error, ResourceExhausted) and error.retry_after_s is not None
    )


def never() -> None:
    """Refer to nothing: the call goes no other way."""


class Patience:
    """The time that one call has left, over all its attempts.

    Args:
        config: Deadline and retries.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, config: ClientConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._retry, self._clock = config.retry, clock
        self._progress = clock()
        self._deadline = (
            None if config.deadline_s is None else self._progress + config.deadline_s
        )

    def progressed(self) -> None:
        """Take note that something came through, so that giving up is put off."""
        self._progress = self._clock()

    def timeout(self) -> float | None:
        """Tell how long the next attempt may take.

        Returns:
            Seconds; None if there is no deadline.
        """
        return None if self._deadline is None else self._deadline - self._clock()

    def policy(
        self, recovers: Callable[[], Callable[[BaseException], bool] | None] = never
    ) -> dict[str, Any]:
        """Spell it for tenacity, blocking or not.

        Args:
            recovers: Refers to what tells of an error whether the call goes another way
                next. Weakly: tenacity's objects refer to each other, and a call with
                its result must not wait for the garbage collector.

        Returns:
            Keyword arguments of `tenacity.Retrying` and `tenacity.AsyncRetrying`.
        """

        def worth_it(error: BaseException) -> bool:
            recovered = recovers()
            return is_worth_a_retry(error) or bool(recovered and recovered(error))

        return {
            "retry": tenacity.retry_if_exception(worth_it),
            "wait": self._wait,
            "stop": self._stop,
            "before_sleep": _log,
            "reraise": True,
        }

    def _wait(self, state: tenacity.RetryCallState) -> float:
        pause = tenacity.wait_random_exponential(
            multiplier=self._retry.first_s, max=self._retry.longest_s
        )(state)
        error = state.outcome.exception() if state.outcome else None
        after = error.retry_after_s if isinstance(error, CurvdError) else None
        # The server's word is the earliest moment; the jitter goes on top of it.
        return pause + (after or 0.0)

    def _stop(self, state: tenacity.RetryCallState) -> bool:
        next_attempt = self._clock() + state.upcoming_sleep
        if self._deadline is not None and next_attempt >= self._deadline:
            return True
        return next_attempt - self._progress >= self._retry.give_up_s


def _log(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    logger.warning("%s; again in %.1f s", error, state.upcoming_sleep)
