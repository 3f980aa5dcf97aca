"""The processes that hold the shards of a model, and what they do together.

Two process groups of torch: one for tensors, which meet in the order in which graphs use
them, and one for numbers, by which is agreed how to go on. Whenever numbers meet it is
compared what every process has sent before, so tensors that met others than they should
are never answered with: backends exchange what has the right size.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import socket
import struct
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from curvd.errors import CurvdError

WAIT_S = 600.0
"""How long a process waits for the others at one place. Those that fail, or are ended, are
known at once, by their connections; this is for what nobody thought of."""
_NUMBERS = 64
"""That meet at once: messages of one size cannot be taken for others by it."""


class Broken(Exception):
    """The others are gone, or somewhere else; nothing that was under way can be ended."""


class Group:
    """What this process knows of the others; a `Company`.

    Args:
        rank: Of this process.
        world: How many there are.
    """

    shares = True

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._numbers: dist.ProcessGroup | None = None
        self._path = 0
        self.whole_bytes = 0
        """Of whole tensors that were gathered and are alive."""
        self.most_whole_bytes = 0
        """The most that ever were."""

    @property
    def is_joined(self) -> bool:
        """Whether there are others to meet."""
        return self._numbers is not None

    def join(self, place: str, device: torch.device) -> None:
        """Meet the others; returns when all have come.

        Args:
            place: Path of a file that is not there yet, the same for all.
            device: Where the tensors are.

        Raises:
            Broken: If they do not come.
        """
        self.leave()
        wait = datetime.timedelta(seconds=WAIT_S)
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Or gloo would listen at whatever address the name of the machine has.
        os.environ["GLOO_SOCKET_IFNAME"] = _loopback()
        with self._breaking():
            dist.init_process_group(
                backend,
                store=dist.FileStore(place, self.world),  # type: ignore[attr-defined]
                rank=self.rank,
                world_size=self.world,
                timeout=wait,
            )
            self._numbers = dist.new_group(backend="gloo", timeout=wait)
        self._path = 0

    def leave(self) -> None:
        """Close the connections, so that whoever waits for this process goes on."""
        self._numbers = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def gather(self, shard: Tensor, place: int) -> Tensor:
        """Put the shards of all processes together.

        Args:
            shard: ``[length]``.
            place: Which tensor they are of.

        Returns:
            ``[world * length]``.

        Raises:
            Broken: If the others are gone.
        """
        flat = shard.new_empty(self.world * len(shard))
        self._count(flat)
        with self._meeting(1, place, len(flat)):
            dist.all_gather(list(torch.split(flat, len(shard))), shard.contiguous())
        return flat

    def exchange(self, flat: Tensor, place: int) -> Tensor:
        """Give each process its part of what this one has.

        Args:
            flat: ``[world * length]``, this process' summands of all parts.
            place: Which tensor they are of.

        Returns:
            ``[world, length]``, all processes' summands of this one's part.

        Raises:
            Broken: If the others are gone.
        """
        arrived = torch.empty_like(flat)
        with self._meeting(2, place, len(flat)):
            dist.all_to_all_single(arrived, flat)
        return arrived.view(self.world, -1)

    def total(self, values: Sequence[float]) -> list[float]:
        """Add numbers over all processes; see `Company`."""
        return [math.fsum(each) for each in self._met(values)]

    def norms(self, values: Sequence[float]) -> list[float]:
        """Make norms of whole vectors; see `Company`."""
        return [math.hypot(*each) for each in self._met(values)]

    def most(self, values: Sequence[float]) -> list[float]:
        """Find the largest; see `Company`."""
        return [max(each) for each in self._met(values)]

    def all_pass(self, check: Callable[[], None]) -> None:
        """Make a check that all have to pass; see `Company`.

        Raises:
            Broken: If another process did not pass it.
        """
        failed: CurvdError | None = None
        try:
            check()
        except CurvdError as error:
            failed = error
        (failures,) = self.total([float(failed is not None)])
        if failed is not None:
            raise failed
        if failures:
            msg = "another process did not pass a check, and says why"
            raise Broken(msg)

    def anyone(self, says: bool) -> bool:
        """Tell whether any process says so."""
        return any(self.most([float(says)]))

    def meet(self) -> None:
        """Find out that all processes have done the same.

        Raises:
            Broken: If they have not.
        """
        self._met([])

    def _met(self, values: Sequence[float]) -> list[list[float]]:
        """Exchange numbers; each with those of the others, by rank."""
        found = list[list[float]]()
        for start in range(0, max(len(values), 1), _NUMBERS):
            found += self._exchanged(values[start : start + _NUMBERS])
        return found

    def _exchanged(self, values: Sequence[float]) -> list[list[float]]:
        head = [float(self._path), float(len(values))]
        own = torch.zeros(len(head) + _NUMBERS, dtype=torch.float64)
        own[: len(head) + len(values)] = torch.tensor(
            [*head, *values], dtype=torch.float64
        )
        every = [torch.empty_like(own) for _ in range(self.world)]
        if self._numbers is None:
            msg = "this process has left the others"
            raise Broken(msg)
        with self._breaking():
            dist.all_gather(every, own, group=self._numbers)
        rows = [each.tolist() for each in every]
        if any(row[: len(head)] != rows[0][: len(head)] for row in rows):
            msg = (
                "processes that share parameters have used different ones, or in another "
                "order, which a model does whose path depends on its data"
            )
            raise Broken(msg)
        stop = len(head) + len(values)
        return [
            list(each)
            for each in zip(*(row[len(head) : stop] for row in rows), strict=True)
        ]

    @contextlib.contextmanager
    def _meeting(self, kind: int, place: int, size: int) -> Iterator[None]:
        """Take note of what meets, so that it can be compared."""
        if self._numbers is None:
            msg = "this process has left the others"
            raise Broken(msg)
        self._path = zlib.crc32(struct.pack("<BQQ", kind, place, size), self._path)
        with self._breaking():
            yield

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """Turn what torch says into an error that no one takes for one of the model."""
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            msg = f"the processes that share parameters have lost each other: {error}"
            raise Broken(msg.split("\n")[0]) from error

    def _count(self, whole: Tensor) -> None:
        """Count a whole tensor's memory for as long as it lives."""
        storage = whole.untyped_storage()
        nbytes = storage.nbytes()
        self.whole_bytes += nbytes
        self.most_whole_bytes = max(self.most_whole_bytes, self.whole_bytes)
        weakref.finalize(storage, self._freed, nbytes).atexit = False

    def _freed(self, nbytes: int) -> None:
        self.whole_bytes -= nbytes


def _loopback() -> str:
    """Name the interface of the loopback address."""
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family is socket.AF_INET and address.address == "127.0.0.1":
                return str(name)
    return "lo"
