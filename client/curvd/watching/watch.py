"""A training's curvature, asked for beside it.

The training thread copies the parameters and goes on; a thread of the watch's own sends the
copy, asks, and writes what it learns. There is memory for one copy (`handover`).
"""

from __future__ import annotations

import atexit
import dataclasses
import threading
import time
import weakref
from types import TracebackType

from curvd._transport import Connection, current_process
from curvd.errors import CurvdError, InvalidSpec, SessionNotFound
from curvd.remote import Session
from curvd.watching.counting import Optimizers, StepCounter
from curvd.watching.handover import Due, Handover
from curvd.watching.metrics import Metrics, Moment, Value, chosen
from curvd.watching.outlets import Outlets, opened
from curvd.watching.reading import Reading
from curvd.watching.snapshot import Snapshot, Watched, followed, identities
from curvd.watching.troubles import Troubles

_KEPT = 10_000
"""Readings that a watch remembers, the newest."""
_READING = "a reading"

_watches: weakref.WeakValueDictionary[str, Watch] = weakref.WeakValueDictionary()
"""By the session's id: the next watch of a session takes over."""


def watch(
    session: Session,
    module: Watched,
    *,
    every: int = 20,
    metrics: Metrics = ("sharpness", "trace"),
    to: Outlets = None,
    optimizer: Optimizers | None = None,
) -> Watch:
    """Follow a module's curvature while it trains, without holding the training up.

    After each step of an optimiser that trains the module, the watch counts; every so
    many steps it copies the parameters and buffers, on the thread that trains, where
    nobody writes them meanwhile. The rest happens on a thread of its own: the copy
    becomes the next version of the session, the metrics are asked for at that version,
    and the reading is written. Where asking takes longer than training, the newest
    snapshot is asked about and the others are skipped. There is memory for one copy: a
    snapshot that is due while one is being sent is taken at the first step after that.

    A server that is away costs readings, never steps: errors are counted, the first of
    each outage is logged, and the watch goes on when the server is back.

    Args:
        session: Of the module; nobody else is to update it.
        module: What trains: the module that `Client.session_for` was given, also inside
            a wrapper (DistributedDataParallel, torch.compile); tensors by the session's
            names, such as an optimiser's float32 copies; or a function that returns such.
        every: Steps between two snapshots.
        metrics: ``sharpness`` (largest eigenvalue of the Hessian), ``trace`` (of it),
            ``ggn_sharpness``, ``gradient_norm``, ``loss`` (over the session's data);
            functions of a session, which return a number, a number and its error, or the
            result of a query; or either of these by a name of your own.
        to: A path that ends in ``.csv``; another path, where TensorBoard's files go; a
            SummaryWriter; a function that is called with each `Reading`; or several.
        optimizer: Whose steps count, if not those of every optimiser of torch that
            trains one of the parameters. ``()``: nobody's; call `Watch.step`.

    Returns:
        The watch. It ends with the process, with `Watch.close`, or with a ``with``.

    Raises:
        InvalidSpec: If the module is not the session's, or an argument is none of these.

    Examples:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).double()
        >>> x, y = torch.randn(60, 4).double(), torch.randint(3, (60,))
        >>> loss = torch.nn.CrossEntropyLoss()
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> session = client.session_for(net, loss, (x, y), batch_size=20)
        >>> with curvd.watch(session, net, every=2, metrics=("trace", "loss")) as watch:
        ...     for _ in range(4):
        ...         loss(net(x), y).backward()
        ...         optimizer.step()
        >>> sorted(watch.readings[-1].values)
        ['loss', 'trace']
    """
    return Watch(
        session, module, every=every, metrics=metrics, to=to, optimizer=optimizer
    )


class Watch:
    """What follows a training; `curvd.watch` makes it.

    Args:
        session: See `watch`.
        module: See `watch`.
        every: See `watch`.
        metrics: See `watch`.
        to: See `watch`.
        optimizer: See `watch`.
    """

    def __init__(
        self,
        session: Session,
        module: Watched,
        *,
        every: int,
        metrics: Metrics,
        to: Outlets,
        optimizer: Optimizers | None,
    ) -> None:
        check(session, every)
        self._every, self._metrics = every, chosen(metrics)
        state = followed(module, session.layout, session._origin)
        self._handover = Handover(Snapshot(state))
        self._outlets = opened(to, tuple(self._metrics))
        self._session, self._retry = _apart(session), session._connection._config.retry
        self._troubles = Troubles(f"the watch of session {session.id}")
        self._readings: tuple[Reading, ...] = ()
        self._steps = 0
        self._is_owed = False
        self._process = current_process()
        if (former := _watches.get(session.id)) is not None:
            former.close(wait_s=0.0)
        _watches[session.id] = self
        self._counter = StepCounter(optimizer, identities(module), self._reached)
        # A daemon: others are waited for before `atexit` can tell them to end.
        self._thread = threading.Thread(
            target=self._work, name="curvd-watch", daemon=True
        )
        self._thread.start()
        atexit.register(self.close)

    @property
    def readings(self) -> tuple[Reading, ...]:
        """What was found so far, oldest first; the newest 10,000."""
        return self._readings

    @property
    def skipped(self) -> int:
        """Snapshots that were due and are in no reading."""
        return self._handover.skipped

    @property
    def errors(self) -> int:
        """How often sending, asking or writing failed."""
        return self._troubles.count

    @property
    def last_error(self) -> Exception | None:
        """The latest of them."""
        return self._troubles.last

    @property
    def closed(self) -> bool:
        """Whether it takes no more snapshots, by `close` or because the session is gone."""
        return self._handover.closed

    def step(self, number: int | None = None) -> None:
        """Say that a step was made, in a training whose optimiser does not say so.

        Call it on the thread that trains, after the last optimiser's step. From the
        first call on, optimisers are not listened to any more.

        Args:
            number: How many steps there are now; None: one more than before.
        """
        if self._process != current_process():
            return
        if self._counter.stop() and number is None:
            number = max(self._steps, 1)  # the optimiser has said so already
        self._reached(self._steps + 1 if number is None else number)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until every snapshot taken so far is read and written, or has failed.

        Args:
            timeout_s: Longest time to wait; None: as long as it takes.

        Returns:
            Whether that is so.
        """
        return self._handover.wait(timeout_s)

    def close(self, *, wait_s: float = 10.0) -> None:
        """Take no more snapshots; what was taken is read and written.

        Args:
            wait_s: Give that up after so long.
        """
        if self._process != current_process():
            return  # a child that was forked: thread and connection are the parent's
        self._end()
        atexit.unregister(self.close)
        if self._thread is threading.current_thread():
            return  # called by a metric or an outlet
        self._thread.join(wait_s)
        if self._thread.is_alive():
            self._session._connection.close()  # which cancels the call under way

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.close(wait_s=0.0)

    def __repr__(self) -> str:
        last = f", last {self.readings[-1]!r}" if self.readings else ""
        return (
            f"<Watch every {self._every} steps, {len(self.readings)} readings, "
            f"{self.skipped} skipped, {self.errors} errors{last}>"
        )

    def _reached(self, steps: int) -> None:
        """Take a snapshot if one is due; on the thread that trains."""
        is_next = steps // self._every > self._steps // self._every
        self._steps = max(steps, self._steps)
        if not (is_next or self._is_owed) or self._process != current_process():
            return
        if is_next and self._is_owed:
            self._handover.skip()
        try:
            self._is_owed = not self._handover.offer(steps)
        except Exception as error:
            # Whatever it is, it is no reason for a training to end.
            self._is_owed = False
            self._handover.skip()
            self._troubles.add("a snapshot", error)

    def _work(self) -> None:
        """Send, ask and write, until the end."""
        while (due := self._handover.next()) is not None:
            pause_s = None
            try:
                self._read(due)
            except Exception as error:
                pause_s = self._pause_after(error)
            self._handover.done(failed_for_s=pause_s)
        for outlet in self._outlets:
            try:
                outlet.close()
            except Exception as error:
                self._troubles.add(f"closing {outlet}", error)
        self._session._connection.close()

    def _read(self, due: Due) -> None:
        """Make a reading of a snapshot, and write it."""
        version = self._session.update_parameters(self._handover.values(), copy=False)
        self._handover.sent()
        found = self._asked(Moment(self._session, version))
        self._troubles.over(_READING)
        self._handover.read(due)
        self._write(
            Reading(
                step=due.step,
                version=version,
                parameters_digest=self._session.info.parameters_digest,
                values={name: value for name, (value, _) in found.items()},
                errors={n: e for n, (_, e) in found.items() if e is not None},
                skipped=due.skipped,
                delay_s=time.monotonic() - due.taken_s,
            )
        )

    def _asked(self, moment: Moment) -> dict[str, Value]:
        """Ask for the metrics; one that fails is left out, unless it is the last."""
        found: dict[str, Value] = {}
        failed: dict[str, Exception] = {}
        for name, metric in self._metrics.items():
            try:
                found[name] = metric(moment)
            except Exception as error:
                failed[name] = error
        if not found:
            raise next(iter(failed.values()))
        for name in found:
            self._troubles.over(f"metric {name!r}")
        for name, failure in failed.items():
            self._troubles.add(f"metric {name!r}", failure)
        return found

    def _write(self, reading: Reading) -> None:
        self._readings = (*self._readings, reading)[-_KEPT:]
        for outlet in self._outlets:
            try:
                outlet.write(reading)
            except Exception as error:
                self._troubles.add(f"writing to {outlet}", error)
            else:
                self._troubles.over(f"writing to {outlet}")

    def _pause_after(self, error: Exception) -> float:
        """Tell for how long a failure makes snapshots useless, in seconds."""
        ends = isinstance(error, SessionNotFound)
        in_a_row = self._troubles.add(_READING, error, ends=ends)
        if ends:
            self._end()
        asked = error.retry_after_s if isinstance(error, CurvdError) else None
        pause = self._retry.first_s * 2.0 ** min(in_a_row - 1, 60)
        return max(min(pause, self._retry.longest_s), asked or 0.0)

    def _end(self) -> None:
        self._counter.stop()
        self._handover.close()


def check(session: Session, every: int) -> None:
    """Refuse what no watch can follow.

    Args:
        session: See `watch`.
        every: See `watch`.

    Raises:
        InvalidSpec: If the session is of no client, or there are no steps between snapshots.
    """
    if not isinstance(session, Session):
        what = type(session).__name__
        msg = f"a watch needs a session of a client of curvd.connect, got a {what}"
        raise InvalidSpec(msg)
    if every < 1:
        msg = f"every must be at least 1 step, got {every}"
        raise InvalidSpec(msg, every=every)


def _apart(session: Session) -> Session:
    """Open a connection of the watch's own, which may be broken off.

    Its calls are made once: where one fails, the next snapshot is better than this one.
    """
    theirs = session._connection
    retry = dataclasses.replace(theirs._config.retry, give_up_s=0.0)
    config = dataclasses.replace(theirs._config, retry=retry)
    return Session(Connection(theirs.target, config), session.info)
