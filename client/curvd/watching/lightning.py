"""A callback for the Trainer of Lightning; needs ``curvd[lightning]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from curvd.errors import missing
from curvd.remote import Session
from curvd.watching.following import Follower, logged
from curvd.watching.metrics import Metrics
from curvd.watching.outlets import Outlets
from curvd.watching.reading import Reading
from curvd.watching.watch import Watch

try:
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "lightning":
        raise
    raise missing(
        what="WatchCallback", module="lightning", extra="lightning"
    ) from error

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class WatchCallback(Callback):
    """Watches the curvature of what a Trainer trains: one entry of ``callbacks=``.

    The session's module may be the LightningModule or any part of it. Readings go to
    the trainer's loggers at the step of their snapshot; names begin with
    ``curvature/``. Only the first of several processes watches.

    Args:
        session: Of the module that is trained.
        every: See `curvd.watch`, as all that follows; steps are ``trainer.global_step``.
        metrics: What is asked for.
        to: Where readings go besides.

    Raises:
        InvalidSpec: If an argument is none of these. What fails later, a module that is not the
            session's, say, is logged, and the training goes on.

    Examples:
        >>> from curvd.watching.lightning import WatchCallback
        >>> callback = WatchCallback(session, every=20, metrics=("sharpness", "loss"))
        >>> callback.watch is None  # until trainer.fit(...)
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

    @property
    def watch(self) -> Watch | None:
        """The watch, once the training has begun; None, too, if it could not begin."""
        return self._follower.watch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch the module."""
        if trainer.is_global_zero:
            self._follower.begin(pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take note of the steps, and log what is new."""
        _log(trainer, self._follower.step(trainer.global_step))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the last snapshot."""
        _log(trainer, self._follower.end())

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """End at once."""
        self._follower.end(wait_s=0.0)


def _log(trainer: Trainer, news: Sequence[Reading]) -> None:
    for reading in news:
        for logger in trainer.loggers:
            logger.log_metrics(logged(reading), step=reading.step)
