"""What a specification of a model stands for: a builder's, a library's, or a graph's."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from curvd.contract import ModelSpec
from curvd.errors import BuilderNotFound, CurvdError, InvalidSpec
from curvd_server.config import check_libraries
from curvd_server.engine import check_batch_axis
from curvd_server.graph.execution import GraphModule
from curvd_server.models import builders, libraries
from curvd_server.models.size_limit import watch
from curvd_server.models.state import architecture_of, parameters_on_meta
from curvd_server.models.tried_graphs import TriedGraphs
from curvd_server.storage import Architecture

_ARCHITECTURES = 32
"""Whose traced programs are remembered; a program holds no parameters and no data."""


class Models:
    """Makes modules of specifications, as far as the server's operator allows.

    Args:
        entries: The operator's own builders: name to ``module:callable``.
        allowed: Globs over models of libraries, for example ``timm:*``.
        model_bytes: Largest state of a model of a library.
        memory_bytes: Says what the device has; a graph that needs more is refused.

    Raises:
        InvalidSpec: If a builder cannot be loaded.
    """

    def __init__(
        self,
        entries: Mapping[str, str],
        allowed: Sequence[str],
        *,
        model_bytes: int,
        memory_bytes: Callable[[], int],
    ) -> None:
        watch()
        self._builders = builders.resolve(entries)
        self._allowed = check_libraries(allowed)
        self._model_bytes, self._memory_bytes = model_bytes, memory_bytes
        self._programs: dict[str, dict[Any, Any]] = {}
        self._graphs = TriedGraphs(_ARCHITECTURES)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the builders that are allowed, and globs over those of libraries."""
        return (*self._builders, *self._allowed)

    def architecture(self, spec: ModelSpec) -> Architecture:
        """Find out what a builder makes; without memory if it can be built so.

        A graph is checked and tried on two data points, also without memory.

        Args:
            spec: Builder and configuration, or graph.

        Returns:
            The tensors of its state.
        """
        if spec.graph:
            self.build(spec, rows=3)  # the outputs must follow
            module = self.build(spec, rows=2)
        else:
            try:
                with torch.device("meta"):
                    module = self._built(spec)
            except CurvdError:
                raise
            except Exception:  # it looks at values while it builds
                module = self._built(spec)
        return architecture_of(module)

    def build(
        self, spec: ModelSpec, rows: int, *, given: Collection[str] | None = None
    ) -> nn.Module:
        """Make a module.

        Args:
            spec: Builder and configuration, or graph.
            rows: Data points of a mini-batch; a graph is tried without memory first.
            given: Names of all values that there will be, so that parameters need no
                memory of their own; None: they are to have values.

        Returns:
            The module.

        Raises:
            BuilderNotFound: If no such builder is allowed.
            InvalidSpec: If the builder refuses the configuration.
            InvalidGraph: If the graph is not sound.
        """
        if not spec.graph:
            lean = None if given is None else self._without_values(spec, given)
            return lean or self._built(spec)
        interpreter, outputs = self._graphs.tried(
            spec.graph, rows, self._memory_bytes()
        )
        check_batch_axis(outputs[0].shape, rows)
        return GraphModule(interpreter)

    def programs(self, spec: ModelSpec) -> dict[Any, Any]:
        """Find what was traced of an architecture, so that its next session is quick."""
        config = json.dumps(dict(spec.config), sort_keys=True)
        key = f"{spec.graph.digest} {spec.builder} {config}"
        found = self._programs.pop(key, {})
        self._programs[key] = found  # the latest last
        if len(self._programs) > _ARCHITECTURES:
            del self._programs[next(iter(self._programs))]
        return found

    def _without_values(
        self, spec: ModelSpec, given: Collection[str]
    ) -> nn.Module | None:
        """Build a module whose parameters have no memory; None: it needs their values."""
        try:
            with parameters_on_meta():
                module = self._built(spec)
        except CurvdError:
            raise
        except Exception:  # it looks at values while it builds
            return None
        names: dict[int, bool] = {}
        for name, p in module.named_parameters(remove_duplicate=False):
            names[id(p)] = names.get(id(p), False) or name in given
        return module if all(names.values()) else None

    def _built(self, spec: ModelSpec) -> nn.Module:
        builder = self._builders.get(spec.builder) or libraries.find(
            spec.builder, self._allowed, limit_bytes=self._model_bytes
        )
        if builder is None:
            known = ", ".join(self.names)
            msg = (
                f"no builder {spec.builder!r} is allowed on this server; known: {known}"
            )
            raise BuilderNotFound(msg, builder=spec.builder)
        try:
            return builder(spec.config)
        except (TypeError, ValueError, KeyError) as error:
            msg = (
                f"builder {spec.builder!r} refuses its config: "
                f"{type(error).__name__}: {error}"
            )
            raise InvalidSpec(msg, builder=spec.builder) from error
