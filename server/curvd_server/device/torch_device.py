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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvd.contract import (
    DatasetSpec,
    DeviceInfo,
    Dtype,
    LossSpec,
    Mode,
    ModelSpec,
    OperatorSpec,
    ParameterLayout,
    PlanReport,
    SerializedGraph,
    Tier,
    WorkerInfo,
)
from curvd.errors import InvalidSpec
from curvd.tensors import Pool, exact_allocator
from curvd_server.device.factored import FactoredOperator, SharedFactors
from curvd_server.device.translated import translated
from curvd_server.engine import (
    Compiler,
    Memory,
    Problem,
    building,
    check_gradient,
    choose_again,
    is_in_doubt,
    use_differentiable_attention,
    use_threads,
)
from curvd_server.engine.data_points import Points
from curvd_server.engine.operator import Operator
from curvd_server.models import BUILDERS, Models
from curvd_server.storage import Architecture
from curvd_server.system import Poll, Quotas, is_out_of_memory, usable_cores
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

Arrays = Mapping[str, NDArray[Any]]

_LARGE_BYTES = 64 << 20
"""What loading a model of this size takes meanwhile is given back at once."""
_RESIDENT_SHARE = 0.25
"""Of a CUDA device's free memory; larger datasets stay on the host."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What operators are built with."""

    plans: Memory
    """Plans of earlier operators."""
    compiler: Compiler | None
    """Makes native code of what is used long enough."""
    results: Pool
    """Memory of results on the host."""


def set_threads(count: int | None) -> None:
    """Set how many threads of this process compute one product at most.

    Args:
        count: How many; None: as many as cores may be used, or as OMP_NUM_THREADS says.
    """
    use_threads(count or min(usable_cores(), torch.get_num_threads()))


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
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            msg = f"torch cannot use device {device!r}: {str(error).splitlines()[0]}"
            raise InvalidSpec(msg, device=device) from error

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
            module = self._models.build(model, rows)
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


class TorchProblem:
    """An objective at one version of its parameters.

    Args:
        problem: The engine's.
        tools: What its operators are built with.
    """

    def __init__(self, problem: Problem, tools: Tools) -> None:
        self._problem, self._tools = problem, tools
        self._factors = SharedFactors()

    @property
    def layout(self) -> ParameterLayout:
        """What a vector of length P means."""
        return self._problem.layout

    @property
    def batches(self) -> int:
        """Mini-batches per pass over the data."""
        return self._problem.batches

    def with_parameters(self, values: Arrays) -> TorchProblem:
        """Make a new version; this one stays valid.

        Args:
            values: Parameters and buffers by name; what this objective does not use
                (running statistics in batch mode, for example) is passed over.

        Returns:
            The new version.
        """
        used = {*self._problem.layout.names, *self._problem.model.constants}
        with translated():
            tensors = as_tensors({n: v for n, v in values.items() if n in used})
            moved = self._problem.with_parameters(tensors)
            return TorchProblem(moved, self._tools)

    def sharing(self, other: TorchProblem) -> TorchProblem:
        """Take the parameters of the same model on other data, in the same memory."""
        return TorchProblem(self._problem.sharing(other._problem), self._tools)

    def gradient(self, *, cancelled: Poll) -> tuple[float, NDArray[Any]]:
        """Compute the loss and its gradient [P]."""
        with translated():
            loss, gradient = self._problem.gradient(cancelled=cancelled)
            return loss, gradient.cpu().numpy()

    def check(self, *, cancelled: Poll) -> None:
        """Compute a gradient of all data, and find out whether it is that of the loss."""
        with translated():
            check_gradient(self._problem, cancelled)

    def points(
        self,
        compute: Callable[[Callable[[Poll], Any]], Any],
        *,
        limit: int | None,
        expired: Callable[[], bool],
    ) -> Points:
        """Name its data points as what a query is about.

        Args:
            compute: Runs a job on the device, in its turn.
            limit: Most data points; None: all.
            expired: Whether the time is up.

        Returns:
            The data points.
        """

        def told(job: Callable[[Poll], Any]) -> Any:
            def inside(cancelled: Poll) -> Any:
                with translated():
                    return job(cancelled)

            return compute(inside)

        return Points(self._problem, compute=told, limit=limit, expired=expired)

    def build(
        self,
        spec: OperatorSpec,
        *,
        budget_bytes: int,
        cancelled: Poll,
        tier: Tier = Tier.FINAL,
    ) -> TorchOperator | FactoredOperator:
        """Verify and warm an operator; see `Problem.build` of the protocols.

        Native code takes over where a first tier did, and nowhere else.
        """
        if spec.kind.is_factored:
            return self.factored(spec, budget_bytes, cancelled)
        with translated():
            built = building.build(
                self._problem,
                spec,
                budget_bytes=budget_bytes,
                memory=self._tools.plans,
                compiler=self._tools.compiler if tier is Tier.FIRST else None,
                results=self._tools.results,
                tier=tier,
                cancelled=cancelled,
            )
            return TorchOperator(built)

    def improve(
        self, operator: TorchOperator, *, budget_bytes: int, cancelled: Poll
    ) -> TorchOperator:
        """Make the last tier of an operator; see `Problem.improve` of the protocols."""
        with translated():
            return operator.improved(self._tools.plans, budget_bytes, cancelled)

    def choose_again(
        self, operator: TorchOperator, *, budget_bytes: int, cancelled: Poll
    ) -> TorchOperator | None:
        """Choose its plan anew; see `Problem.choose_again` of the protocols."""
        with translated():
            return operator.chosen_again(self._tools.plans, budget_bytes, cancelled)

    def move(
        self, operator: TorchOperator | FactoredOperator
    ) -> TorchOperator | FactoredOperator:
        """Make the same operator for this version; nothing is computed yet."""
        if isinstance(operator, FactoredOperator):
            return self.refactored(operator)
        return operator.at(self._problem)

    def factored(
        self, spec: OperatorSpec, budget_bytes: int, cancelled: Poll
    ) -> FactoredOperator:
        """Make an operator of Kronecker factors, those that are there if there are some.

        Args:
            spec: Which.
            budget_bytes: Memory for factors.
            cancelled: Polled between mini-batches.
        """
        with translated():
            return self._factors.build(
                self._problem, spec, budget_bytes=budget_bytes, cancelled=cancelled
            )

    def refactored(self, operator: FactoredOperator) -> FactoredOperator:
        """Make the same at this version; factors are made when they are asked for."""
        return self._factors.move(operator, self._problem)


class TorchOperator:
    """An operator that is built.

    Args:
        operator: The engine's operator.
        report: How it is computed; by default as it says now.
    """

    def __init__(self, operator: Operator, report: PlanReport | None = None) -> None:
        self._operator = operator
        # Asked here, on the device's thread, because it may measure.
        self._report = report or operator.report

    @property
    def report(self) -> PlanReport:
        """How it is computed; whether in native code, as of now."""
        compiled, busy = self._operator.is_compiled, self._operator.choice.busy
        if (self._report.compiled, self._report.busy) != (compiled, busy):
            self._report = replace(self._report, compiled=compiled, busy=busy)
        return self._report

    @property
    def is_in_doubt(self) -> bool:
        """Whether its plan was chosen on a busy machine."""
        return is_in_doubt(self._operator)

    @property
    def spent_s(self) -> float:
        """Seconds that it has computed, at earlier versions included."""
        return self._operator.spent_s

    @property
    def runner(self) -> None:
        """Nobody runs algorithms elsewhere: vectors are whole here."""

    @property
    def shares(self) -> bool:
        """Whether columns go together, or share what is linearised for them."""
        report = self._report
        together = report.columns_at_once > 1 and self._operator.mixes
        return together or report.kept_batches < report.batches

    @property
    def size(self) -> int:
        """P, the length of the vectors that it multiplies."""
        return self._operator.problem.layout.size

    @property
    def dtype(self) -> torch.dtype:
        """Type of its products."""
        return self._operator.problem.result_dtype

    @property
    def device(self) -> torch.device:
        """Where its products are made."""
        return self._operator.problem.device

    def improved(
        self, plans: Memory, budget_bytes: int, cancelled: Poll
    ) -> TorchOperator:
        """Make its last tier.

        Args:
            plans: Plans of earlier operators.
            budget_bytes: Memory for cached linearisations.
            cancelled: Polled between mini-batches.
        """
        final = building.improve(
            self._operator,
            budget_bytes=budget_bytes,
            memory=plans,
            cancelled=cancelled,
        )
        return TorchOperator(final)

    def chosen_again(
        self, plans: Memory, budget_bytes: int, cancelled: Poll
    ) -> TorchOperator | None:
        """Choose its plan anew.

        Args:
            plans: Plans of earlier operators.
            budget_bytes: Memory for cached linearisations.
            cancelled: Polled between mini-batches.

        Returns:
            The operator with a better plan; None if there is none.
        """
        made = choose_again(
            self._operator,
            budget_bytes=budget_bytes,
            memory=plans,
            cancelled=cancelled,
        )
        return None if made is None else TorchOperator(made)

    def at(self, problem: Problem) -> TorchOperator:
        """Make the same operator at another version of its problem.

        Args:
            problem: The engine's.

        Returns:
            The operator; nothing is computed or measured yet.
        """
        return TorchOperator(self._operator.at(problem), self.report)

    def apply(
        self, columns: NDArray[Any], *, counts: Sequence[int] = (), cancelled: Poll
    ) -> NDArray[Any]:
        """Multiply columns: [K, P] -> [K, P]; see `Device`'s `Operator`."""
        with translated():
            rows = self._operator.apply(columns, counts=counts, cancelled=cancelled)
            return rows.cpu().numpy()

    def multiply(self, columns: Tensor, *, cancelled: Poll) -> Tensor:
        """Multiply columns that are on the device: [K, P] -> [K, P]."""
        with translated():
            return self._operator.apply(columns, cancelled=cancelled)

    def eigenvalues(self, *, cancelled: Poll) -> None:
        """Know none; see `Device`'s `Operator`."""

    def inverse(self, columns: Tensor, shift: float, *, cancelled: Poll) -> None:
        """Know none; see `Operator` of the protocols."""

    def close(self) -> None:
        """Return its memory."""
        self._operator.close()


def as_tensors(arrays: Arrays) -> dict[str, Any]:
    """Prepare arrays for torch.

    Args:
        arrays: By name. NumPy has no bfloat16; its bits come as uint16, which is no type
            of the wire.

    Returns:
        The same; tensors where there is no array of the type.
    """
    return {
        name: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        if a.dtype == np.uint16
        else a
        for name, a in arrays.items()
    }
