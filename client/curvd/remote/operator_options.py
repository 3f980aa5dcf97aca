"""Options of operators: each argument of the methods that make them is declared once.

`makes` gives a method the signature of its options, and completes its docstring by what they
say of themselves, as `curvd.remote.asking` does for queries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Concatenate, ParamSpec, TypeVar

from curvd.contract import (
    FisherType,
    OperatorKind,
    OperatorSpec,
    WeightSharing,
    check_settings,
    setting,
)
from curvd.remote.asking import describe

S = TypeVar("S")  # the session
P = ParamSpec("P")
T = TypeVar("T")
Options = TypeVar("Options", bound="OperatorOptions")


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorOptions:
    """What every operator takes."""

    params: Sequence[str] | str | None = setting(
        None,
        "Globs over names that choose the parameters it acts on, in this order, the "
        "others fixed; None: all.",
    )
    damping: float = setting(0.0, "Added to the diagonal.")
    scale: float = setting(1.0, "Multiplies the operator, not the damping.")
    expected_version: int | None = setting(
        None, "Refuse to compute at another parameter version."
    )

    def __post_init__(self) -> None:
        check_settings(self)

    def spec(
        self, kind: OperatorKind, parameters: tuple[str, ...] | None
    ) -> OperatorSpec:
        """Name the operator.

        Args:
            kind: Which.
            parameters: Names of those that `params` chooses; None: all.
        """
        said: dict[str, Any] = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("params", "expected_version")
        }
        if said.get("mc_samples", 0) is None:
            said["mc_samples"] = 0  # as many as this kind takes at least
        return OperatorSpec(kind=kind, parameters=parameters, **said)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearisedOptions(OperatorOptions):
    """What an operator takes that is linearised."""

    block_sizes: Sequence[int] | None = setting(
        None, "Parameters (tensors) per diagonal block; None: one block."
    )


def _samples(default: int | None, help: str, least: int) -> Any:
    text = f"Sampled targets per data point; {help}."
    return setting(default, text, least=least)


def _seed() -> Any:
    return setting(0, "Fixes the sampled targets.")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgnOptions(LinearisedOptions):
    """What the Gauss-Newton takes."""

    mc_samples: int = _samples(0, "0: exact", least=0)
    seed: int = _seed()


@dataclass(frozen=True, slots=True, kw_only=True)
class FisherOptions(LinearisedOptions):
    """What the type-1 Fisher takes."""

    mc_samples: int = _samples(1, "at least 1", least=1)
    seed: int = _seed()


@dataclass(frozen=True, slots=True, kw_only=True)
class FactoredOptions(OperatorOptions):
    """What operators of Kronecker factors take."""

    fisher: FisherType | str = setting(
        FisherType.MC,
        "Which gradients: ``mc``, of sampled targets; ``type-2``, the columns of a root of "
        "the loss's Hessian, one backward pass per class; ``empirical``.",
    )
    sharing: WeightSharing | str = setting(
        WeightSharing.EXPAND,
        "How positions that share a weight are seen: ``expand``, each counts by itself; "
        "``reduce``, they are averaged and summed up.",
    )
    mc_samples: int | None = _samples(None, "None: 1 for ``mc``", least=1)
    seed: int = _seed()


def makes(
    options: Callable[P, Options],
) -> Callable[[Callable[[S, Options], T]], Callable[Concatenate[S, P], T]]:
    """Make a method that takes an operator's options as keyword arguments.

    Args:
        options: The class of the options.

    Returns:
        The decorator of a method that takes the options.
    """

    def decorate(make: Callable[[S, Options], T]) -> Callable[Concatenate[S, P], T]:
        @functools.wraps(make)
        def made(self: S, /, *args: P.args, **given: P.kwargs) -> T:
            return make(self, options(*args, **given))

        describe(make, options, OperatorOptions, made)
        return made

    return decorate
