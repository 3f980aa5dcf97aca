"""The same model and loss on other data points, or on a random part of the session's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from curvd.errors import InvalidSpec
from curvd_server.engine.objective.data import Array, cut, tensor_of
from curvd_server.engine.objective.objective import Problem
from curvd_server.engine.objective.prefetch import on_host
from curvd_server.system import yield_point


def with_data(problem: Problem, arrays: Mapping[str, Array]) -> Problem:
    """Take the same loss of the same model on other data points.

    Args:
        problem: The objective.
        arrays: Inputs and targets by their names in the dataset, each [M, ...].

    Returns:
        A problem with a normaliser of its own; where no target counts it is 1, and each
        data point's own loss 0.

    Raises:
        InvalidSpec: If an array is missing, or its data points are of another kind than
            those of the dataset, or the targets do not fit the loss.
    """
    spec = problem.model.data
    _check_names(arrays, (*spec.inputs, spec.target))
    _check_inputs(problem, arrays)
    prepare = functools.partial(problem.loss.prepared, problem.dtype)
    data = cut(arrays, spec, problem.dtype, problem.device, prepare=prepare)
    moved = dataclasses.replace(problem, data=data, normaliser=1.0)
    moved.check_targets()
    return moved.normalised() if moved.counted() > 0 else moved


def on_inputs(problem: Problem, arrays: Mapping[str, Array]) -> Problem:
    """Take the same model on other inputs, without targets: for its outputs alone.

    Args:
        problem: The objective.
        arrays: Inputs by their names in the dataset, each [M, ...].

    Returns:
        A problem whose outputs are defined, and whose loss is not.

    Raises:
        InvalidSpec: If an array is missing, or of another kind than in the dataset.
    """
    spec = problem.model.data
    _check_names(arrays, spec.inputs)
    _check_inputs(problem, arrays)
    targets = torch.zeros(len(arrays[spec.inputs[0]]), dtype=torch.int64)
    own = {**arrays, spec.target: targets}
    data = cut(own, spec, problem.dtype, problem.device, prepare=lambda same: same)
    return dataclasses.replace(problem, data=data, normaliser=1.0)


def part_of(problem: Problem, count: int, seed: int) -> Problem:
    """Take the same objective on a random part of the data.

    Args:
        problem: The objective.
        count: How many data points, drawn without replacement.
        seed: Of the draw; the same seed, the same part.

    Returns:
        A problem with a normaliser of its own; the same one if the part is all of it.

    Raises:
        InvalidSpec: If no target of the part counts.
    """
    host = on_host(problem.data)
    total = sum(len(batch.targets) for batch in host)
    if count >= total:
        return problem
    generator = torch.Generator().manual_seed(seed % 2**32)
    drawn = torch.randperm(total, generator=generator)[:count].sort().values
    pieces: list[tuple[Tensor, ...]] = []
    for batch in host:
        yield_point()
        stop = batch.start + len(batch.targets)
        here = drawn[(drawn >= batch.start) & (drawn < stop)] - batch.start
        rows = here.to(batch.targets.device)
        pieces.append(tuple(t[rows] for t in (*batch.inputs, batch.targets)))
    tensors = (torch.cat(t).to(problem.device) for t in zip(*pieces, strict=True))
    spec = problem.model.data
    own: dict[str, Array] = dict(zip((*spec.inputs, spec.target), tensors, strict=True))
    # Targets are as the loss wants them already.
    data = cut(own, spec, problem.dtype, problem.device, prepare=lambda same: same)
    return problem.on(data)


def _check_names(arrays: Mapping[str, Array], names: tuple[str, ...]) -> None:
    if set(arrays) != set(names):
        msg = f"data points have the tensors {sorted(names)}, got {sorted(arrays)}"
        raise InvalidSpec(msg, given=", ".join(sorted(arrays)))


def _check_inputs(problem: Problem, arrays: Mapping[str, Array]) -> None:
    """Refuse inputs of another kind than those of the dataset."""
    own = on_host(problem.data)[0].inputs
    for name, known in zip(problem.model.data.inputs, own, strict=True):
        given = tensor_of(arrays[name])
        kinds = [t.is_floating_point() for t in (given, known)]
        if given.ndim == known.ndim and given.shape[1:] == known.shape[1:]:
            if kinds[0] == kinds[1]:
                continue
        msg = (
            f"{name!r} is {given.dtype} {list(given.shape)}; a data point of the dataset "
            f"is {known.dtype} {list(known.shape[1:])}"
        )
        if given.shape == known.shape[1:] and kinds[0] == kinds[1]:
            msg += f", and n of them have a leading axis: give one as {name}[None]"
        raise InvalidSpec(msg, tensor=name)
