"""The engine behind plain arrays: the door between the server's middle and torch.

Everything but `TorchDevice.architecture` belongs to whoever has the device's turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import math
import platform
from collections.abc import Callable, Mapping, Sequence

import psutil
import torch

from curvd.contract import (
    DatasetSpec,
    DeviceInfo,
    Dtype,
    LossSpec,
    Mode,
    ModelSpec,
    SerializedGraph,
    WorkerInfo,
)
from curvd.errors import InvalidSpec
from curvd.tensors import Pool, exact_allocator
from curvd_server.device.torch_problem import Arrays, Tools, TorchProblem, as_tensors
from curvd_server.device.translated import translated
from curvd_server.engine import (
    Compiler,
    Cut,
    Memory,
    Problem,
    use_differentiable_attention,
    use_threads,
)
from curvd_server.models import BUILDERS, Models
from curvd_server.storage import Architecture
from curvd_server.system import Quotas, is_out_of_memory, usable_cores
from curvd_server.trials import Trials

_CANNOT_RUN = (
    TypeError,
    ValueError,
    LookupError,
    RuntimeError,
    AttributeError,
    AssertionError,
)
"""What modules raise when they see data that they were not made for."""

_LARGE_BYTES = 64 << 20
"""What loading a model of this size takes meanwhile is given back at once."""
_RESIDENT_SHARE = 0.25
"""Of a CUDA device's free memory; larger datasets stay on the host."""


def set_threads(count: int | None) -> None:
    """Set how many threads of this process compute one product at most.

    Args:
        count: How many; None: as many as cores may be used, or as OMP_NUM_THREADS says.
    """
    use_threads(count or min(usable_cores(), torch.get_num_threads()))


def check_device(device: str, use: Callable[[str], object] = torch.device) -> None:
    """Refuse what is no device.

    Args:
        device: For example ``cuda:0``.
        use: What is done with it; by default its name alone is read, as where another
            process is to compute on it.

    Raises:
        InvalidSpec: If torch cannot do that.
    """
    try:
        use(device)
    except (RuntimeError, AssertionError) as error:
        msg = f"torch cannot use device {device!r}: {str(error).splitlines()[0]}"
        raise InvalidSpec(msg, device=device) from error


class TorchDevice:
    """Builds models and loads objectives onto one device.

    Args:
        entries: The operator's own builders: name to ``module:callable``.
        device: The device, for example ``cuda:0``.
        plans: Plans of earlier operators; None: those of this object's life.
        compiler: Makes native code of what is used long enough; None: nothing does.
        allowed: Globs over models of libraries, for example ``timm:*``.
        model_bytes: Largest state of a model of a library.
        idle_bytes: Memory of results that is kept for the next ones.
        quotas: How long the models of one caller may be tried.

    Raises:
        InvalidSpec: If a builder cannot be loaded or the device is not there.
    """

    def __init__(
        self,
        entries: Mapping[str, str],
        device: str,
        plans: Memory | None = None,
        compiler: Compiler | None = None,
        *,
        allowed: Sequence[str] = (),
        model_bytes: int = 64 << 30,
        idle_bytes: int = 1 << 30,
        quotas: Quotas | None = None,
    ) -> None:
        use_differentiable_attention()
        # The first trace would import it: a second of Python in which nobody is served.
        importlib.import_module("torch._dynamo")
        self._tools = Tools({} if plans is None else plans, compiler, Pool(idle_bytes))
        self._name = device
        self._trials, self._one_builder = Trials(quotas), asyncio.Lock()
        self._models = Models(
            entries,
            allowed,
            model_bytes=model_bytes,
            memory_bytes=lambda: self.describe().total_bytes,
        )
        check_device(device, lambda name: torch.empty(0, device=name))

    @property
    def name(self) -> str:
        """For example ``cpu`` or ``cuda:0``."""
        return self._name

    @property
    def torch_version(self) -> str:
        """Of torch."""
        return torch.__version__

    @property
    def builders(self) -> tuple[str, ...]:
        """Names of the builders that are allowed, and globs over those of libraries."""
        return self._models.names

    def describe(self) -> DeviceInfo:
        """Describe the device and its memory."""
        if self.name.startswith("cuda"):
            free, total = torch.cuda.mem_get_info(self.name)
            return DeviceInfo(
                name=self.name,
                description=torch.cuda.get_device_name(self.name),
                total_bytes=total,
                free_bytes=free,
            )
        memory = psutil.virtual_memory()
        return DeviceInfo(
            name=self.name,
            description=platform.processor() or platform.machine(),
            total_bytes=memory.total,
            free_bytes=memory.available,
        )

    def workers(self) -> tuple[tuple[WorkerInfo, ...], int]:
        """Name none: this process computes."""
        return (), 0

    def architecture(self, spec: ModelSpec) -> Architecture:
        """Find out what a builder or a graph makes; on any thread.

        Args:
            spec: Builder and configuration, or graph.

        Returns:
            The tensors of its state.
        """
        return self._models.architecture(spec)

    async def try_model(self, spec: ModelSpec) -> Architecture | None:
        """Find out what a builder or a graph makes; see `Device.try_model`.

        Builders of libraries and of the server's operator are imported here, once, and
        work here, one at a time.
        """
        if spec.graph:
            return await self.try_graphs(spec.graph, SerializedGraph(), rows=2)
        if spec.builder in BUILDERS:
            return await self._trials.of_builder(spec.builder, spec.config)
        async with self._one_builder:
            return await asyncio.to_thread(self.architecture, spec)

    async def try_graphs(
        self, model: SerializedGraph, loss: SerializedGraph, *, rows: int
    ) -> Architecture | None:
        """Check what clients drew, in a process of its own; see `Device.try_graphs`."""
        limit_bytes = self.describe().total_bytes
        return await self._trials.of(model, loss, rows=rows, limit_bytes=limit_bytes)

    def load(
        self,
        model: ModelSpec,
        state: Arrays,
        arrays: Arrays,
        data: DatasetSpec,
        loss: LossSpec,
        mode: Mode,
        dtype: Dtype,
        params: tuple[str, ...] = (),
    ) -> TorchProblem:
        """Bring a model, a dataset and a loss together on the device.

        Args:
            model: Builder and configuration, or graph.
            state: Parameters and buffers by name.
            arrays: The dataset.
            data: How it becomes mini-batches.
            loss: The loss.
            mode: How BatchNorm behaves.
            dtype: The dtype of the computation.
            params: Globs that choose the parameters; none choose all.

        Returns:
            The objective.

        Raises:
            InvalidSpec: If they do not fit each other.
        """
        problem = self.objective(
            model, state, arrays, data, loss, mode, dtype, params=params
        )
        return TorchProblem(problem, self._tools)

    def objective(
        self,
        model: ModelSpec,
        state: Arrays,
        arrays: Arrays,
        data: DatasetSpec,
        loss: LossSpec,
        mode: Mode,
        dtype: Dtype,
        *,
        params: tuple[str, ...],
        first: int | None = None,
        held: Cut | None = None,
    ) -> Problem:
        """Make the engine's objective, of a dataset or of a part of it.

        Args:
            model: Builder and configuration, or graph.
            state: Parameters and buffers by name.
            arrays: The dataset.
            data: How it becomes mini-batches.
            loss: The loss.
            mode: How BatchNorm behaves.
            dtype: The dtype of the computation.
            params: Globs that choose the parameters; none choose all.
            first: Index of the first data point of a part; None: this is all of it.
            held: Takes the part of a parameter that is held here; see `Problem.load`.

        Returns:
            The objective.

        Raises:
            InvalidSpec: If they do not fit each other.
        """
        rows = min(data.batch_size, len(arrays[data.target]))
        large = sum(value.nbytes for value in state.values()) >= _LARGE_BYTES
        # A module's own values take as much memory as the state, and leave no hole.
        exactly = exact_allocator() if large else contextlib.nullcontext()
        with exactly:
            module = self._models.build(model, rows, given=state if held else None)
        with translated():
            try:
                return Problem.load(
                    module,
                    as_tensors(state),
                    as_tensors(arrays),
                    data,
                    loss,
                    mode,
                    dtype,
                    self.name,
                    params=params,
                    resident_bytes=self._resident_bytes(),
                    programs=self._models.programs(model),
                    first=first,
                    held=held,
                )
            except _CANNOT_RUN as error:
                if is_out_of_memory(error):
                    raise
                # Not our defect: what the model said when it saw the data.
                first_line = str(error).partition("\n")[0]
                msg = (
                    f"model {model.builder or 'graph'!r} cannot run on this dataset: "
                    f"{type(error).__name__}: {first_line}"
                )
                raise InvalidSpec(msg, builder=model.builder) from error

    def _resident_bytes(self) -> float:
        """Say how large a dataset may be that lies on the device."""
        if not self.name.startswith("cuda"):
            return math.inf
        return self.describe().free_bytes * _RESIDENT_SHARE
