"""Graphs are kept, and given again to a module that does the same: see `structure`."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from curvd.graph.manifest import CONSTANTS, Inputs, check_memory, manifest
from curvd.graph.structure import SIZES, structure
from curvd.v1 import graph_pb2 as graph_pb

GRAPHS = 64
"""That are kept, the latest used."""
BYTES = 64 << 20
"""Of them all, with the constants of their code."""


@dataclass(frozen=True, slots=True)
class Key:
    """What a module does, and of which classes it is."""

    digests: tuple[bytes, ...]
    classes: tuple[type[nn.Module], ...]
    """Two classes of one name, of a notebook's cell that ran twice, are two."""


@dataclass(frozen=True, slots=True)
class _Kept:
    graph: bytes
    constants: Mapping[str, Tensor]
    """Copies: the module's own may be written to."""

    @property
    def nbytes(self) -> int:
        return len(self.graph) + sum(t.nbytes for t in self.constants.values())


@dataclass
class Graphs:
    """The graphs of a process, for all of its threads.

    Args:
        most: How many are kept.
        most_bytes: Of them all.
    """

    most: int = GRAPHS
    most_bytes: int = BYTES
    _kept: OrderedDict[Key, _Kept] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def key(self, wrapper: nn.Module, rows: Inputs) -> Key | None:
        """Find out what a module does.

        Args:
            wrapper: Calls what is exported.
            rows: What with.

        Returns:
            The key of its graph; None if that cannot be told, so that it has to be traced.
        """
        digests = structure(wrapper, rows)
        if digests is None:
            return None
        return Key(digests, tuple(type(m) for m in wrapper.modules()))

    def still(self, key: Key, wrapper: nn.Module, rows: Inputs) -> bool:
        """Tell whether a module does what it did before it was traced.

        One that counts its calls, say, was traced while it did something else.

        Args:
            key: From `key`, before.
            wrapper: Calls what is exported.
            rows: What with.

        Returns:
            Whether its graph may be kept.
        """
        return structure(wrapper, rows, SIZES[:1]) == key.digests[:1]

    def find(
        self, key: Key, module: nn.Module
    ) -> tuple[graph_pb.Graph, Mapping[str, Tensor]] | None:
        """Find the graph of a module that did the same.

        Args:
            key: From `key`, in this call.
            module: Whose tensors the graph gets.

        Returns:
            A graph of the caller's own, and its tensors by name; None if there is none.

        Raises:
            InvalidGraph: If parameters of this module share memory with other tensors.
        """
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept.move_to_end(key)
        graph = graph_pb.Graph.FromString(found.graph)
        check_memory(module, found.constants)
        listed = manifest(module, {n: t.clone() for n, t in found.constants.items()})
        if [described for _, described in listed.entries] != list(graph.tensors):
            return None
        return graph, listed.tensors

    def keep(
        self, key: Key, graph: graph_pb.Graph, tensors: Mapping[str, Tensor]
    ) -> None:
        """Keep a graph for modules that do the same.

        Args:
            key: From `key`, before it was traced.
            graph: What was traced.
            tensors: Its tensors by name.
        """
        prefix = f"{CONSTANTS}."
        constants = {
            name.removeprefix(prefix): tensor.clone()
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        kept = _Kept(graph.SerializeToString(), constants)
        with self._lock:
            self._kept[key] = kept
            self._kept.move_to_end(key)
            while len(self._kept) > self.most or self.nbytes > self.most_bytes:
                self._kept.popitem(last=False)

    @property
    def nbytes(self) -> int:
        """What is kept."""
        return sum(kept.nbytes for kept in self._kept.values())

    def clear(self) -> None:
        """Forget them."""
        with self._lock:
            self._kept.clear()


KEPT = Graphs()
"""Those of this process."""
