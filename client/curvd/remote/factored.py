"""Operators of Kronecker factors, and functions of them, for both clients."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, TypeVar

from curvd.contract import (
    OperatorFunction,
    OperatorKind,
    OperatorSpec,
)
from curvd.errors import InvalidSpec
from curvd.remote.operator_options import FactoredOptions, OperatorOptions, makes

O = TypeVar("O")  # noqa: E741 - the operator type of the client


class FactoredOperators(ABC, Generic[O]):
    """What a session offers of them; makes no call."""

    @abstractmethod
    def _made(self, kind: OperatorKind, options: OperatorOptions) -> O:
        """Make an operator of some kind."""

    @makes(FactoredOptions)
    def kfac(self, options: FactoredOptions) -> O:
        """Kronecker-factored approximation of the Fisher: a block for each linear layer.

        A block is the product of the second moments of a layer's inputs, its bias
        included, and of the gradients of its outputs (Martens & Grosse, ICML 2015). What
        is in no linear layer has the exact block of its tensor, or the diagonal if that is
        large; `blocks` of the operator says which.

        Returns:
            ``scale * K + damping * I``.

        Examples:
            >>> K = session.kfac(fisher="type-2")
            >>> dense = K @ np.eye(43)
            >>> bool(np.all(dense[:25, 25:] == 0))  # a block for each layer
            True
            >>> v = np.ones(43)
            >>> np.allclose(K.inverse(damping=0.1) @ (K @ v + 0.1 * v), v)
            True
        """
        return self._made(OperatorKind.KFAC, options)

    @makes(FactoredOptions)
    def ekfac(self, options: FactoredOptions) -> O:
        """KFAC's eigenvectors, with the second moments of gradients along them.

        In this basis the diagonal is that of the Fisher's own block (George et al.,
        NeurIPS 2018); it takes a second pass over the data.

        Returns:
            ``scale * K + damping * I``.

        Examples:
            >>> K = session.ekfac(fisher="empirical")
            >>> F = session.empirical_fisher() @ np.eye(43)
            >>> bool(np.isclose(np.trace(K @ np.eye(43)), np.trace(F)))  # exactly its trace
            True
        """
        return self._made(OperatorKind.EKFAC, options)


class Functions(ABC, Generic[O]):
    """Functions of an operator of Kronecker factors; they make no call."""

    if TYPE_CHECKING:
        spec: OperatorSpec

    @abstractmethod
    def _like(self, spec: OperatorSpec) -> O:
        """Make another operator of the same session."""

    def inverse(self, *, damping: float = 0.0) -> O:
        """Invert an operator of Kronecker factors, with its damping, exactly.

        In the basis of eigenvectors, block by block: ``(A kron G + δ I)^-1`` and not the
        product of two damped inverses. Other operators have `solve`.

        Args:
            damping: Added to the operator's own.

        Returns:
            ``(scale * K + (damping + this) * I)^-1``.

        Raises:
            InvalidSpec: If this is no kfac or ekfac, or the scale is not positive.

        Examples:
            >>> K = session.kfac(damping=0.01)
            >>> v = np.ones(43)
            >>> np.allclose(K @ (K.inverse() @ v), v)
            True
            >>> session.hessian().inverse()
            Traceback (most recent call last):
                ...
            curvd.errors.InvalidSpec: hessian has no inverse in closed form; ...
        """
        return self._like(_function(self.spec, OperatorFunction.INVERSE, damping))

    def inverse_root(self, *, damping: float = 0.0) -> O:
        """Make the root of the inverse of an operator of Kronecker factors.

        It makes a draw from the Gaussian of precision ``scale * K + damping * I`` of
        standard normal noise, which need not travel.

        Args:
            damping: Added to the operator's own.

        Returns:
            ``(scale * K + (damping + this) * I)^(-1/2)``, symmetric.

        Raises:
            InvalidSpec: If this is no kfac or ekfac, or the scale is not positive.

        Examples:
            >>> root = session.kfac(scale=100.0, damping=1.0).inverse_root()
            >>> noise = session.probe("normal", seed=3, columns=5)
            >>> root.multiply(noise).shape  # 5 draws from the posterior, less its mean
            (43, 5)
        """
        return self._like(_function(self.spec, OperatorFunction.INVERSE_ROOT, damping))


def function_said(spec: OperatorSpec) -> str:
    """Write an operator's function of its kind as a formula, for people."""
    if spec.function is OperatorFunction.NONE:
        return str(spec.kind)
    power = "-1" if spec.function is OperatorFunction.INVERSE else "(-1/2)"
    inside = f"({spec.kind} + {spec.shift:g} * I)" if spec.shift else str(spec.kind)
    return f"{inside}^{power}"


def _function(
    spec: OperatorSpec, function: OperatorFunction, damping: float
) -> OperatorSpec:
    """Write ``f(scale * K + damping * I)`` as a scale before ``f(K + shift * I)``."""
    if not spec.kind.is_factored or spec.function is not OperatorFunction.NONE:
        what = spec.kind if spec.function is OperatorFunction.NONE else spec.function
        msg = (
            f"{what} has no inverse in closed form; kfac and ekfac have one, and solve "
            "computes that of a vector for any operator"
        )
        raise InvalidSpec(msg, operator=spec.kind)
    if not spec.scale > 0:
        msg = f"the inverse of scale * {spec.kind} needs a scale above 0, got {spec.scale}"
        raise InvalidSpec(msg, scale=spec.scale)
    power = -1.0 if function is OperatorFunction.INVERSE else -0.5
    return dataclasses.replace(
        spec,
        function=function,
        shift=(spec.damping + damping) / spec.scale,
        scale=spec.scale**power,
        damping=0.0,
    )
