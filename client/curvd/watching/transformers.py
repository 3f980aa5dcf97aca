"""A callback for the Trainer of Hugging Face's transformers; needs ``curvd[trainer]``."""

from __future__ import annotations

from typing import Any

from curvd.errors import missing
from curvd.remote import Session
from curvd.watching.following import Follower, logged
from curvd.watching.metrics import Metrics
from curvd.watching.outlets import Outlets
from curvd.watching.reading import Reading
from curvd.watching.watch import Watch

try:
    from transformers import (
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "transformers":
        raise
    raise missing(
        what="WatchCallback", module="transformers", extra="trainer"
    ) from error


class WatchCallback(TrainerCallback):
    """Watches the curvature of what a Trainer trains: one entry of ``callbacks=``.

    Readings become entries of ``trainer.state.log_history`` at the step of their
    snapshot, and the newest joins what is logged next; names begin with ``curvature/``.
    Only the first of several processes watches.

    Args:
        session: Of the module that is trained.
        every: See `curvd.watch`, as all that follows.
        metrics: What is asked for.
        to: Where readings go besides.

    Raises:
        InvalidSpec: If an argument is none of these. What fails later, a module that is not the
            session's, say, is logged, and the training goes on.

    Examples:
        >>> from curvd.watching.transformers import WatchCallback
        >>> callback = WatchCallback(session, every=20, metrics=("sharpness", "loss"))
        >>> callback.watch is None  # until trainer.train()
        True
    """

    def __init__(
        self,
        session: Session,
        *,
        every: int = 20,
        metrics: Metrics = ("sharpness", "trace"),
        to: Outlets = None,
    ) -> None:
        self._follower = Follower(session, every, metrics, to)
        self._newest: Reading | None = None

    @property
    def watch(self) -> Watch | None:
        """The watch, once the training has begun; None, too, if it could not begin."""
        return self._follower.watch

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **more: Any,
    ) -> None:
        """Begin to watch the model."""
        if state.is_world_process_zero:
            self._follower.begin(more["model"])

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **more: Any,
    ) -> None:
        """Count a step, and take over what is new."""
        self._take(self._follower.step(state.global_step), state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **more: Any,
    ) -> None:
        """Add the newest reading to what is shown."""
        newest, self._newest = self._newest, None
        if newest is not None and (logs := more.get("logs")) is not None:
            logs.update(logged(newest))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **more: Any,
    ) -> None:
        """Wait for the last snapshot."""
        self._take(self._follower.end(), state)

    def _take(self, news: Any, state: TrainerState) -> None:
        for reading in news:
            state.log_history.append({**logged(reading), "step": reading.step})
            self._newest = reading
