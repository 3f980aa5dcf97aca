"""Algorithms on a worker: one member for each segment of their vectors, all in step.

A member runs the algorithm as it is, on a thread of its own, with its segment's elements of
every vector. Where it needs what the others have it pauses; when all members of this worker
do, the front is told what each contributes, and its answer lets them go on. A member is
whatever the number of workers: so a worker that has two segments computes the same bits as
two workers with one.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvd.errors import CurvdError
from curvd_server.device.torch_device import TorchDevice
from curvd_server.device.translated import translated
from curvd_server.fleet import messages
from curvd_server.fleet.connection import Array, Frame
from curvd_server.fleet.holdings import Said, refused
from curvd_server.fleet.messages import Ask, Begin, End, Part, Paused, Resume
from curvd_server.fleet.packing import pack, unpack
from curvd_server.linalg import ALGORITHMS, Products, Progress, Space

Say = Callable[[int, Said], None]
"""Sends an answer under the number of its command."""


class Programs:
    """Those that are under way on this worker.

    Args:
        device: Where they compute.
        say: Sends their answers.
    """

    def __init__(self, device: TorchDevice, say: Say) -> None:
        self._device, self._say = device, say
        self._running: dict[int, _Program] = {}
        self._lock = threading.Lock()

    def take(self, frame: Frame) -> None:
        """Begin, resume or end a program; returns at once."""
        message = frame.message
        assert isinstance(message, Begin | Resume | End)
        with self._lock:
            program = self._running.get(message.program)
            if isinstance(message, Begin):
                program = _Program(message, frame.arrays, self._device, self._say)
                self._running[message.program] = program
            elif isinstance(message, End):
                self._running.pop(message.program, None)
        if isinstance(message, End):
            if program is not None:
                program.end()
        elif program is None:
            text = f"this worker has no program {message.program}"
            self._say(frame.number, (messages.Failed(message=text, trace=""), ()))
        elif isinstance(message, Begin):
            program.begin(frame.number)
        else:
            program.resume(frame.number, message, frame.arrays)

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            running, self._running = list(self._running.values()), {}
        for program in running:
            program.end()


@dataclass(frozen=True, slots=True)
class _Answer:
    """What lets a member go on."""

    array: Array
    expired: bool


@dataclass(frozen=True, slots=True)
class _Pause:
    """What a member needs, or how it ended."""

    ask: Ask | Said
    """A message, if it raised an error."""
    digest: str = ""
    arrays: Sequence[Array] = ()
    result: str = ""
    small: Sequence[Array] = ()


class _Ended(BaseException):
    """Nobody wants the result any more."""


class _Program:
    """The members of one program on this worker.

    Args:
        begin: What is to be run.
        arrays: Its arguments.
        device: Where it computes.
        say: Sends its answers.
    """

    def __init__(
        self, begin: Begin, arrays: Sequence[Array], device: TorchDevice, say: Say
    ) -> None:
        self._say, self._lock = say, threading.Lock()
        small, rest = arrays[: begin.small], arrays[begin.small :]
        count = len(begin.segments)
        each = len(rest) // count
        self._members = [
            _Member(self, i, begin, small, rest[i * each : (i + 1) * each], device)
            for i in range(count)
        ]
        self._number = 0
        self._paused: dict[int, _Pause] = {}
        self.progress: list[Progress] = []
        """Of the first member, since it was last resumed."""

    def begin(self, number: int) -> None:
        """Start the members; the first pause of all answers."""
        self._number = number
        for member in self._members:
            threading.Thread(
                target=member.run, name=f"segment-{member.index}", daemon=True
            ).start()

    def resume(self, number: int, message: Resume, arrays: Sequence[Array]) -> None:
        """Let the members go on.

        Args:
            number: Of the command, which their next pause answers.
            message: The command.
            arrays: One for all, or one for each.
        """
        self._number = number
        if len(arrays) == 1:
            arrays = [arrays[0]] * len(self._members)
        for member, array in zip(self._members, arrays, strict=True):
            member.inbox.put(_Answer(array, message.expired))

    def end(self) -> None:
        """Have the members stop where they wait next."""
        for member in self._members:
            member.inbox.put(None)

    def pause(self, index: int, pause: _Pause) -> None:
        """Take note that a member pauses; the last one tells the front."""
        with self._lock:
            self._paused[index] = pause
            if len(self._paused) < len(self._members):
                return
            all_ = [self._paused[i] for i in range(len(self._members))]
            progress, self.progress = tuple(self.progress), []
            self._paused, number = {}, self._number
        self._say(number, _said(all_, progress))


def _said(pauses: Sequence[_Pause], progress: tuple[Progress, ...]) -> Said:
    """Put what the members say into one answer."""
    asks = list[Ask]()
    for pause in pauses:
        if not isinstance(pause.ask, str):
            return pause.ask
        asks.append(pause.ask)
    message = Paused(
        asks=tuple(asks),
        digests=tuple(pause.digest for pause in pauses),
        progress=progress,
        result=pauses[0].result,
        small=len(pauses[0].small),
    )
    return message, [*pauses[0].small, *(a for pause in pauses for a in pause.arrays)]


class _Member:
    """An algorithm on one segment; the group of its space.

    Args:
        program: Where it belongs.
        index: Among the members of this worker.
        begin: What is to be run.
        small: Arrays among the arguments.
        vectors: Its elements of the vectors among them.
        device: Where it computes.
    """

    def __init__(
        self,
        program: _Program,
        index: int,
        begin: Begin,
        small: Sequence[Array],
        vectors: Sequence[Array],
        device: TorchDevice,
    ) -> None:
        self._program, self._index, self._begin = program, index, begin
        self._small, self._vectors = small, vectors
        self._place = torch.device(device.name)
        self._segment: Part = begin.segments[index]
        self._expired = begin.expired
        self.index = self._segment.index
        """Of its segment."""
        self._digest = hashlib.blake2b(digest_size=8)
        self.inbox: queue.SimpleQueue[_Answer | None] = queue.SimpleQueue()

    def run(self) -> None:
        """Run to the end, whatever that is; on a thread of its own."""
        try:
            with translated(), torch.no_grad():
                pause = self._run()
        except _Ended:
            return
        except CurvdError as error:
            pause = _Pause(refused(error))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            failed = messages.Failed(message=text, trace=traceback.format_exc())
            pause = _Pause((failed, ()))
        self._program.pause(self._index, pause)

    def total(self, partial: Tensor) -> Tensor:
        """Add what all members have; see `Group`."""
        # Members of one worker share the answer, and may write to what they get.
        found = self._ask("sum", partial.cpu().numpy()).copy()
        return torch.from_numpy(found).to(self._place)

    def joined(self, V: Tensor) -> Tensor:
        """Put together what all members have; see `Group`."""
        found = self._ask("join", V.cpu().numpy()).copy()
        return torch.from_numpy(found).to(self._place)

    def witness(self, values: Tensor) -> None:
        """Take note of numbers that all members must have alike; see `Group`."""
        self._digest.update(values.detach().cpu().contiguous().numpy().tobytes())

    def _run(self) -> _Pause:
        begin, own = self._begin, range(self._segment.start, self._segment.stop)
        dtype: torch.dtype = getattr(torch, begin.dtype)
        products = Products(
            self._multiply,
            size=begin.size,
            dtype=dtype,
            device=self._place,
            limit=begin.limit,
            expired=lambda: self._expired,
            space=Space(begin.size, dtype, self._place, own=own, group=self),
        )
        vectors = [torch.from_numpy(a).to(self._place) for a in self._vectors]
        arguments = unpack(begin.arguments, vectors, self._small)
        self._vectors = ()
        query = ALGORITHMS[begin.algorithm](products, **arguments)
        while True:
            try:
                progress = next(query)
            except StopIteration as end:
                result: Any = end.value
                break
            # What a query tells of itself is what it decides by.
            seen = (*progress.estimates, *progress.residuals)
            self._digest.update(np.array(seen, np.float64).tobytes())
            if self._index == 0:
                self._program.progress.append(progress)
        found = pack(result)
        self._digest.update(found.text.encode())
        return _Pause(
            "result",
            self._digest.hexdigest(),
            [vector.cpu().numpy() for vector in found.vectors],
            found.text,
            found.small,
        )

    def _multiply(self, V: Tensor) -> Tensor:
        return torch.from_numpy(self._ask("product", V.cpu().numpy())).to(self._place)

    def _ask(self, ask: Ask, array: Array) -> Array:
        """Pause until what is asked for is there."""
        # Vectors differ from member to member in their last axis.
        shape = array.shape if ask == "sum" else array.shape[:-1]
        self._digest.update(f"{ask}{shape}".encode())
        self._program.pause(self._index, _Pause(ask, self._digest.hexdigest(), [array]))
        answer = self.inbox.get()
        if answer is None:
            raise _Ended
        self._expired = answer.expired
        return answer.array
