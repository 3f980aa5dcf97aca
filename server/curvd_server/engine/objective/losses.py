"""The losses in sum form, and how many targets they count.

An objective is ``(1 / normaliser) * sum over mini-batches of sum(outputs, targets)``.
Because the normaliser is counted over the whole dataset, how the data is cut into
mini-batches changes a result by rounding only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from curvd.contract import LossName, LossSpec, Reduction
from curvd.errors import InvalidSpec
from curvd_server.graph.execution import CustomLoss

_IGNORED = -100  # what torch ignores if nothing else is asked for


@dataclass(frozen=True, slots=True)
class Loss:
    """A `LossSpec` with its constants on a device.

    Half precision outputs are upcast: a sum over many targets needs the digits.
    """

    spec: LossSpec
    weights: Tensor | None
    """Per class (cross_entropy, nll) or per output (bce ``pos_weight``), or None."""
    custom: CustomLoss | None = None
    """What computes it, if it has no name."""

    @classmethod
    def of(cls, spec: LossSpec, dtype: torch.dtype, device: torch.device) -> Loss:
        """Place the constants of `spec` for outputs of `dtype` on `device`."""
        if spec.name is LossName.CUSTOM:
            return cls(spec, None, CustomLoss.of(spec.graph, _wide(dtype), device))
        if spec.class_weights is None:
            return cls(spec, None)
        weights = torch.tensor(spec.class_weights, dtype=_wide(dtype), device=device)
        return cls(spec, weights)

    def prepared(self, dtype: torch.dtype, targets: Tensor) -> Tensor:
        """Bring a dataset's targets into the form that the other methods want.

        Args:
            dtype: The dtype of numbers.
            targets: ``[N, ...]``, as they were registered.

        Returns:
            Class indices in int64, numbers in `dtype`; with ``shift`` each position
            has the target of the next one, and the last position one that is ignored.

        Raises:
            InvalidSpec: If the loss cannot use such targets.
        """
        name = self.spec.name
        if self.custom is not None:
            return self.custom.prepared(dtype, targets)
        if targets.is_floating_point():
            if name is LossName.NLL or self.spec.shift:
                what = "shift" if self.spec.shift else "nll"
                msg = (
                    f"{what} needs targets that are class indices, got {targets.dtype}"
                )
                raise InvalidSpec(msg, dtype=targets.dtype)
            return targets
        targets = targets.to(torch.int64 if name.has_classes else dtype)
        if not self.spec.shift:
            return targets
        if targets.ndim < 2:
            msg = f"shift needs targets [N, T, ...], got {tuple(targets.shape)}"
            raise InvalidSpec(msg, targets=tuple(targets.shape))
        last = torch.full_like(targets[:, :1], self.ignore_index)
        return torch.cat((targets[:, 1:], last), 1)

    def sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum the losses of all targets.

        Args:
            outputs: What the model returned.
            targets: As `prepared` makes and `check` accepts them.

        Returns:
            A scalar, differentiable in `outputs` as often as one likes.
        """
        outputs = outputs.to(_wide(outputs.dtype))
        if self.custom is not None:
            return self.custom.sum(outputs, targets)
        if self.spec.name is LossName.MSE:
            # note: F.mse_loss has no second derivative in forward mode (torch 2.13).
            return (outputs - targets).square().sum()
        if self.spec.name is LossName.SMOOTH_L1:
            return F.smooth_l1_loss(
                outputs, targets, beta=self.spec.beta, reduction="sum"
            )
        if self.spec.name is LossName.BCE_WITH_LOGITS:
            return F.binary_cross_entropy_with_logits(
                outputs, targets, pos_weight=self.weights, reduction="sum"
            )
        if self.spec.name is LossName.NLL:
            return F.nll_loss(
                classes_second(outputs, targets),
                targets,
                weight=self.weights,
                ignore_index=self.ignore_index,
                reduction="sum",
            )
        return F.cross_entropy(
            classes_second(outputs, targets),
            targets,
            weight=self.weights,
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.spec.label_smoothing,
        )

    def counts(self, targets: Tensor) -> Tensor:
        """Weigh the targets as torch's ``reduction="mean"`` would.

        Args:
            targets: ``[B, ...]``; probabilities have their class axis second.

        Returns:
            The weight of each, ``[B, ...]``, in float64.
        """
        if self.custom is not None:
            return self.custom.counts(targets)
        if not self.spec.name.has_classes:
            return torch.ones_like(targets, dtype=torch.float64)
        if targets.is_floating_point():
            return torch.ones_like(targets[:, 0], dtype=torch.float64)
        counted = targets != self.ignore_index
        if self.weights is None:
            return counted.double()
        weights = self.weights.double()[targets.where(counted, 0)]
        return weights.where(counted, 0.0)

    @property
    def ignore_index(self) -> int:
        """The class index that counts nothing."""
        index = self.spec.ignore_index
        return _IGNORED if index is None else index

    @property
    def is_mean(self) -> bool:
        """Whether the objective divides by the counted targets."""
        return self.spec.reduction is Reduction.MEAN

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse targets that do not fit the outputs.

        Args:
            outputs: The outputs of the first rows, to learn their shape.
            targets: The targets of a mini-batch, ``[B, ...]``.

        Raises:
            InvalidSpec: If shapes, types or class indices do not fit.
        """
        if self.custom is not None:
            self.custom.check(outputs, targets)
            return
        name, got = self.spec.name, (tuple(outputs.shape[1:]), tuple(targets.shape[1:]))
        if not name.has_classes or targets.is_floating_point():
            if got[0] != got[1]:
                msg = (
                    f"{name} needs outputs and targets of one shape, got {got[0]} and "
                    f"{got[1]} per data point"
                )
                raise InvalidSpec(msg, outputs=got[0], targets=got[1])
            return
        self._check_axis(*got)
        rows = min(len(outputs), len(targets))
        classes = classes_second(outputs[:rows], targets[:rows]).shape[1]
        if self.weights is not None and len(self.weights) != classes:
            msg = f"class_weights has {len(self.weights)} entries for {classes} classes"
            raise InvalidSpec(msg, class_weights=len(self.weights), classes=classes)
        counted = targets[targets != self.ignore_index]
        if counted.numel() and not 0 <= counted.min() <= counted.max() < classes:
            low, high = int(counted.min()), int(counted.max())
            msg = (
                f"targets are class indices in [{low}, {high}], but the model has "
                f"{classes} classes; set ignore_index if one marks padding"
            )
            raise InvalidSpec(msg, lowest=low, highest=high, classes=classes)

    def _check_axis(self, outputs: tuple[int, ...], targets: tuple[int, ...]) -> None:
        """Refuse shapes of a data point that do not say which axis has the classes.

        With shift there is no doubt: that is said of language models alone.
        """
        if len(outputs) < 2 or not outputs[:-1] == outputs[1:] == targets:
            return
        if self.spec.shift:
            return
        msg = (
            f"outputs {outputs} with class indices {targets} per data point have their "
            "classes in the second axis or in the last, which would be different losses: "
            "give the loss as a function, by session_for or curvd.export_loss"
        )
        raise InvalidSpec(msg, outputs=outputs, targets=targets)


def classes_last(outputs: Tensor, targets: Tensor) -> bool:
    """Tell where the class axis of the outputs is.

    It is the last one if the others match the targets, as language models have it
    (``[B, T, C]`` with targets ``[B, T]``); else the second, as torch has it
    (``[B, C, ...]`` with targets ``[B, ...]``). Probabilities have it second.

    Args:
        outputs: Logits.
        targets: Class indices ``[B, ...]`` or probabilities of the logits' shape.

    Returns:
        Whether the class axis is the last one.

    Raises:
        InvalidSpec: If the shapes match neither way.
    """
    shape, rest = tuple(outputs.shape), tuple(targets.shape)
    if targets.is_floating_point() and shape == rest:
        return len(shape) == 2
    if shape[:-1] == rest:
        return True
    if len(shape) >= 2 and (shape[0], *shape[2:]) == rest:
        return False
    msg = (
        f"class indices need outputs [B, C, ...] or [B, ..., C] for targets [B, ...], "
        f"got outputs {shape} and targets {rest}"
    )
    raise InvalidSpec(msg, outputs=shape, targets=rest)


def classes_second(outputs: Tensor, targets: Tensor) -> Tensor:
    """View the outputs as torch's losses of classes want them: ``[B, C, ...]``."""
    return outputs.movedim(-1, 1) if classes_last(outputs, targets) else outputs


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
