"""The function that is differentiated: a model, a dataset and a loss as one sum.

    objective(θ) = (1 / normaliser) * sum over mini-batches b of loss_sum(f(θ, x_b), y_b)
                   + weight decay

A `Problem` is immutable: new parameters make a new one that shares model and data, so
work that runs on the old version is never disturbed. Not thread-safe: whoever has the
device's turn evaluates it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvd.contract import (
    DatasetSpec,
    Dtype,
    LossSpec,
    Mode,
    OperatorSpec,
    ParameterLayout,
    select,
)
from curvd.errors import InvalidSpec
from curvd_server.engine.objective.cancellation import check_cancelled, never
from curvd_server.engine.objective.data import (
    TORCH_DTYPES,
    Array,
    Batch,
    cut,
    exact,
    joined,
    rows_of,
    tensor_of,
)
from curvd_server.engine.objective.layer_patches import (
    Cut,
    aliased,
    aliases,
    fixed_rows,
    take_apart,
)
from curvd_server.engine.objective.losses import Loss
from curvd_server.engine.objective.model import Model
from curvd_server.engine.objective.parameter_slices import add_rows
from curvd_server.engine.objective.penalty import WeightDecay
from curvd_server.engine.objective.prefetch import Streamed
from curvd_server.engine.objective.trial import tried
from curvd_server.system import yield_point


@dataclass(frozen=True, slots=True)
class Problem:
    """An objective at one version of its parameters."""

    model: Model
    loss: Loss
    layout: ParameterLayout
    parameters: tuple[Tensor, ...]
    """In the order of `layout`."""
    data: Sequence[Batch]
    """On the device; those that are too large for it come there when asked for."""
    normaliser: float
    """What ``mean`` divides by, over the whole dataset; 1 for ``sum``."""
    mode: Mode
    decay: WeightDecay
    """Depends on no data, so it is part of no mini-batch's share."""

    @classmethod
    def load(
        cls,
        module: nn.Module,
        parameters: Mapping[str, Array],
        arrays: Mapping[str, Array],
        data: DatasetSpec,
        loss: LossSpec,
        mode: Mode = Mode.EVAL,
        dtype: Dtype = Dtype.FLOAT32,
        device: str | torch.device = "cpu",
        params: Sequence[str] = (),
        resident_bytes: float = math.inf,
        programs: dict[Any, Any] | None = None,
        first: int | None = None,
        held: Cut | None = None,
    ) -> Problem:
        """Assemble an objective.

        Memory is shared with arrays that have the right type and place already, so
        the caller must not write to them afterwards.

        Args:
            module: The architecture; it is copied, never modified. Parameters with
                ``requires_grad`` span the operators, in ``named_parameters`` order,
                tied ones once, unless `params` chooses among them.
            parameters: Values of parameters and buffers by name; those missing keep
                the module's values. Unknown names are the caller's to refuse.
            arrays: The dataset, each with the leading axis ``N``.
            data: How the arrays become mini-batches.
            loss: The loss and its reduction.
            mode: How BatchNorm behaves.
            dtype: The dtype of parameters, buffers and floating point data.
            device: Where to compute.
            params: Globs that choose the parameters and their order; the others are
                constants. Empty: all.
            resident_bytes: Larger datasets stay on the host, and are streamed.
            programs: What was traced of the same architecture; by default nothing.
            first: Index of the first data point, if the arrays are a part of a dataset;
                the part's share of the objective is not `normalised` yet. None: they
                are all of it.
            held: Takes the part of a parameter that is held here; what is made then is
                not tried, because its model cannot run with parts. None: all of it.

        Returns:
            The problem at these parameters.

        Raises:
            InvalidSpec: If data, model and loss do not fit each other.
        """
        mode, kind, place = Mode(mode), TORCH_DTYPES[Dtype(dtype)], torch.device(device)
        state = aliased(module, parameters)
        trained = {n: p.requires_grad for n, p in module.named_parameters()}
        if not any(trained.values()):
            msg = "the model has no parameter with requires_grad; nothing to multiply"
            raise InvalidSpec(msg)
        chosen = select(
            [name for name, free in trained.items() if free],
            params,
            aliases=aliases(module),
            frozen=[name for name, free in trained.items() if not free],
        )
        variables, constants, skeleton = take_apart(
            module, mode, state, kind, place, chosen, held
        )
        named = Loss.of(loss, kind, place)
        stays = sum(a.nbytes for a in arrays.values()) > resident_bytes
        batches: Sequence[Batch] = cut(
            arrays,
            data,
            kind,
            torch.device("cpu") if stays else place,
            prepare=functools.partial(named.prepared, kind),
            pin=stays and place.type == "cuda",
            first=first or 0,
        )
        if stays:
            batches = Streamed(batches, place)
        shapes = {name: tuple(p.shape) for name, p in variables.items()}
        problem = cls(
            model=Model(
                skeleton,
                constants,
                tuple(variables),
                data,
                fixed_rows(skeleton),
                {} if programs is None else programs,
            ),
            loss=named,
            layout=ParameterLayout.of(shapes),
            parameters=tuple(variables.values()),
            data=batches,
            normaliser=1.0,
            mode=mode,
            decay=WeightDecay.of(loss.weight_decay, tuple(variables), aliases(module)),
        )
        if held is None:
            problem.check_targets()
        return problem.normalised() if first is None else problem

    def check_targets(self) -> None:
        """Try the model, and refuse targets that do not fit its outputs.

        Raises:
            InvalidSpec: If model, data and loss do not fit each other.
        """
        outputs = tried(self)
        for batch in self.data:
            yield_point()
            self.loss.check(outputs, batch.targets)

    def counted(self) -> float:
        """Count the targets as ``mean`` does: the sum of their weights."""
        total = 0.0
        for batch in self.data:
            yield_point()
            total += float(self.loss.counts(batch.targets).sum())
        return total

    def normalised(self, counted: float | None = None) -> Problem:
        """Divide a ``mean`` by the targets that count.

        Args:
            counted: Their weight in the whole dataset; None: this is all of it.

        Returns:
            The objective.

        Raises:
            InvalidSpec: If none counts.
        """
        if counted is None:
            counted = self.counted()
        if not counted > 0:
            msg = "no target counts: all have ignore_index or class weight zero"
            raise InvalidSpec(msg, counted=counted)
        normaliser = counted if self.loss.is_mean else 1.0
        return dataclasses.replace(self, normaliser=normaliser)

    def part(self, batches: range, *, penalised: bool) -> Problem:
        """Take some of the mini-batches' share of the objective; nothing moves.

        Args:
            batches: Their indices, consecutive.
            penalised: Whether the weight decay, which belongs to no data, is in it.

        Returns:
            A term of the sum.
        """
        data = self.data[batches.start : batches.stop]
        decay = self.decay if penalised else self.decay.none()
        return dataclasses.replace(self, data=data, decay=decay)

    def with_parameters(self, parameters: Mapping[str, Array]) -> Problem:
        """Make a new version; this one stays valid.

        Args:
            parameters: New values of some or all parameters (or constants) by name.

        Returns:
            A problem that shares model and data with this one.

        Raises:
            InvalidSpec: If a name is unknown or a shape differs.
        """
        old = dict(zip(self.layout.names, self.parameters, strict=True))
        constants = dict(self.model.constants)
        for name, value in parameters.items():
            home = old if name in old else constants
            if name not in home or tuple(value.shape) != tuple(home[name].shape):
                want = tuple(home[name].shape) if name in home else "no such parameter"
                msg = f"parameter {name!r}: got shape {tuple(value.shape)}, want {want}"
                raise InvalidSpec(msg, parameter=name)
            yield_point()
            home[name] = tensor_of(value).to(home[name], copy=True).contiguous()
        model = dataclasses.replace(self.model, constants=constants)
        return dataclasses.replace(self, model=model, parameters=tuple(old.values()))

    def sharing(self, other: Problem) -> Problem:
        """Take the parameters and constants of another objective of the same model.

        Args:
            other: With the same layout, mode and types, on other data perhaps.

        Returns:
            This objective at that one's parameters, in the same memory.
        """
        assert other.layout == self.layout
        model = dataclasses.replace(self.model, constants=other.model.constants)
        return dataclasses.replace(self, model=model, parameters=other.parameters)

    def on(self, data: Sequence[Batch]) -> Problem:
        """Make the same objective on other mini-batches, with a normaliser of its own.

        Args:
            data: Of data points like those of this objective, as its loss wants them.

        Returns:
            The objective.

        Raises:
            InvalidSpec: If model, data and loss do not fit each other.
        """
        moved = dataclasses.replace(self, data=data, normaliser=1.0)
        moved.check_targets()
        return moved.normalised()

    def restricted(self, spec: OperatorSpec) -> Problem:
        """Make the same objective as a function of an operator's parameters alone.

        Args:
            spec: The operator.

        Returns:
            A problem in whose model all other parameters are constants.

        Raises:
            InvalidSpec: If it names a parameter that is not there.
        """
        layout = self.layout.of_operator(spec)
        if spec.parameters is None:
            return self
        values = dict(zip(self.layout.names, self.parameters, strict=True))
        chosen = tuple(values.pop(name) for name in layout.names)
        model = self.model.restricted(layout.names, values)
        decays = dict(zip(self.layout.names, self.decay.coefficients, strict=True))
        return dataclasses.replace(
            self,
            model=model,
            layout=layout,
            parameters=chosen,
            decay=WeightDecay(tuple(decays[name] for name in layout.names)),
        )

    @property
    def dtype(self) -> torch.dtype:
        """In which products are computed."""
        return self.parameters[0].dtype

    @property
    def result_dtype(self) -> torch.dtype:
        """In which products are accumulated and returned; at least float32."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """Where products are computed."""
        return self.parameters[0].device

    @property
    def batches(self) -> int:
        """Number of mini-batches."""
        return len(self.data)

    @property
    def device_bytes(self) -> int:
        """Memory of parameters, constants and data."""
        tensors = [*self.parameters, *self.model.constants.values()]
        if not isinstance(self.data, Streamed):
            tensors += [t for b in self.data for t in (*b.inputs, b.targets)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def outputs(self, parameters: Sequence[Tensor], batch: Batch) -> Tensor:
        """Run the model on a mini-batch, ``[B, ...]``."""
        return self.model(parameters, batch)

    def batch_loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Compute a mini-batch's share of the objective from the model's outputs."""
        return self.loss.sum(outputs, batch.targets) / self.normaliser_of(batch)

    def normaliser_of(self, batch: Batch) -> float:
        """Say what a mini-batch's share is divided by; infinite if it counts nothing."""
        return math.inf if batch.silent else self.normaliser

    def objective(self, parameters: Sequence[Tensor], batch: Batch) -> Tensor:
        """Compute a mini-batch's share of the objective, a scalar."""
        return self.batch_loss(self.outputs(parameters, batch), batch)

    def batch_gradient(self, batch: Batch) -> tuple[Tensor, list[Tensor | None]]:
        """Differentiate one mini-batch's share.

        Returns:
            The loss, and one tensor per parameter or None where it is not used.
        """
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in self.parameters]
            loss = self.objective(leaves, batch)
            if not loss.requires_grad:
                return loss, [None] * len(leaves)
            rows = torch.autograd.grad(loss, leaves, allow_unused=True)
        return loss.detach(), list(rows)

    def gradient(
        self, *, cancelled: Callable[[], bool] = never
    ) -> tuple[float, Tensor]:
        """Differentiate the objective.

        Args:
            cancelled: Polled before each mini-batch.

        Returns:
            The loss and its gradient ``[P]`` in `result_dtype`.
        """
        gradient = torch.zeros(
            self.layout.size, dtype=self.result_dtype, device=self.device
        )
        total = 0.0
        for batch in self.data:
            check_cancelled(cancelled)
            loss, rows = self.batch_gradient(batch)
            add_rows(gradient, self.layout, rows)
            del rows  # before the next mini-batch's
            total += float(loss)
        self.decay.add_gradient(gradient, self.parameters, self.layout)
        return total + self.decay.value(self.parameters), gradient

    def joined(self, count: int) -> Problem:
        """Make the same objective with `count` mini-batches at a time as one.

        Larger matrix products are faster, and the objective is a sum over data points,
        so this changes rounding only. Batch statistics forbid it; then nothing changes.
        """
        if count == 1 or self.mode is Mode.BATCH_STATISTICS:
            return self
        data = self.data
        if isinstance(data, Streamed):
            return dataclasses.replace(self, data=data.joined(count))
        return dataclasses.replace(self, data=joined(data, count))

    def exactly(
        self,
        batch: Batch,
        parameters: tuple[Tensor, ...],
        constants: Mapping[str, Tensor],
    ) -> Problem:
        """Make one mini-batch's share in float64 on the CPU, whatever holds the parameters.

        Args:
            batch: The mini-batch.
            parameters: Of the same shapes, in float64.
            constants: By name, likewise.

        Returns:
            The same term of the sum, with the same normaliser.
        """
        inputs = tuple(map(exact, batch.inputs))
        return dataclasses.replace(
            self,
            model=self.model.exactly(constants),
            loss=Loss.of(self.loss.spec, torch.float64, torch.device("cpu")),
            parameters=parameters,
            data=(Batch(batch.start, inputs, exact(batch.targets), batch.silent),),
        )

    def excerpt(self, rows: int) -> Problem:
        """Take a small problem of one mini-batch, in float64 on the CPU.

        Args:
            rows: How many data points; the first whose targets count are taken.

        Returns:
            The excerpt, with its own normaliser, and parameters of its own that may
            be written to.
        """
        chosen: list[tuple[Tensor, ...]] = []
        for batch in self.data:
            yield_point()
            counts = self.loss.counts(batch.targets)
            weight = counts.reshape(len(counts), -1).sum(1)
            for row in weight.nonzero().flatten()[: rows - len(chosen)].tolist():
                one = rows_of(batch, slice(row, row + 1))
                chosen.append((*one.inputs, one.targets))
            if len(chosen) == rows:
                break
        if not chosen and self.model.company.shares:
            # The others have targets that count, and this process computes with them.
            return self._silent_excerpt(rows)
        *inputs, targets = (exact(torch.cat(t)) for t in zip(*chosen, strict=True))
        return self._small(Batch(0, tuple(inputs), targets)).normalised()

    def _silent_excerpt(self, rows: int) -> Problem:
        few = rows_of(self.data[0], slice(0, rows))
        inputs = tuple(map(exact, few.inputs))
        return self._small(Batch(0, inputs, exact(few.targets), silent=True))

    def _small(self, batch: Batch) -> Problem:
        """Make the objective of one mini-batch, with parameters of its own."""
        constants = {name: exact(t) for name, t in self.model.constants.items()}
        return Problem(
            model=self.model.exactly(constants),
            loss=Loss.of(self.loss.spec, torch.float64, torch.device("cpu")),
            layout=self.layout,
            parameters=tuple(map(_own, self.parameters)),
            data=(batch,),
            normaliser=1.0,
            mode=self.mode,
            decay=self.decay,
        )


def _own(parameter: Tensor) -> Tensor:
    """Copy a parameter to the CPU in float64."""
    yield_point()
    return parameter.to("cpu", torch.float64, copy=True)
