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


class RetryPolicy:
    """The time that one call has left, over all its attempts.

    Args:
        config: Deadline and retries.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, config: ClientConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._retry, self._clock = config.retry, clock
        # When it first failed since the last progress. An attempt may take longer than
        # the patience before it fails: a long product, a line that is found to be dead.
        self._failing_since: float | None = None
        self._deadline = (
            None if config.deadline_s is None else clock() + config.deadline_s
        )
        self._state: tenacity.RetryCallState | None = None

    def progressed(self) -> None:
        """Take note that something came through, so that giving up is put off."""
        self._failing_since = None

    def timeout(self) -> float | None:
        """Tell how long the next attempt may take.

        Returns:
            Seconds; None if there is no deadline.
        """
        return None if self._deadline is None else self._deadline - self._clock()

    def pause_after(self, error: CurvdError, *, recovers: bool = False) -> float:
        """Tell how long to wait before the next attempt.

        tenacity decides, and nothing of it is made before something fails: most calls
        succeed at once, and small ones take no longer than its preparations.

        Args:
            error: What the last attempt raised.
            recovers: Whether the call goes another way next.

        Returns:
            Seconds.

        Raises:
            CurvdError: The error itself, if another attempt is of no use.
        """
        try:
            if not (recovers or is_worth_a_retry(error)):
                raise error
            if self._failing_since is None:
                self._failing_since = self._clock()
            state = self._state = self._state or self._begun()
            state.set_exception((type(error), error, error.__traceback__))
            try:
                pause: Any = state.retry_object.iter(state)
            finally:
                # The error refers to the frames of the call, and so to its result.
                state.prepare_for_next_attempt()
            return float(pause)
        finally:
            del error  # this frame is one of them

    def _begun(self) -> tenacity.RetryCallState:
        retrying = tenacity.Retrying(
            wait=self._wait, stop=self._stop, before_sleep=_log, reraise=True
        )
        retrying.begin()
        return tenacity.RetryCallState(retrying, None, (), {})

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
        assert self._failing_since is not None, "nothing has failed"
        return next_attempt - self._failing_since >= self._retry.give_up_s


def _log(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    logger.warning("%s; again in %.1f s", error, state.upcoming_sleep)
