"""Queries that a session answers by its Gauss-Newton, for both clients."""

from __future__ import annotations

from typing import Any

from curvd.remote.asking import for_both
from curvd.remote.queries import (
    Influence,
    MarginalLikelihood,
    PosteriorSamples,
    Predictive,
    Sketch,
)


class GgnQueries:
    """What needs an operator that is positive semi-definite; a base of sessions."""

    @for_both
    def influence(self: Any, /, queries: Any = None, **options: Any) -> Influence:
        """Compute what each data point has to do with the losses of queries, by the GGN.

        Args:
            queries: Data points, by name as in the dataset or a tuple of inputs and
                targets; or indices of the session's own; or None, all of these; or all of
                a session with the same parameters (`on`); or gradients that the session
                stores, [P] or [P, M], or their name.
            **options: Those of [`influence`][curvd.RemoteOperator.influence] of an
                operator.

        Returns:
            The scores, and how true the solutions are.

        Examples:
            >>> found = session.influence([0, 1], damping=0.1, top=3)
            >>> found.converged, found.indices.shape
            (True, (2, 2, 3))
            >>> session.influence(damping=0.1, self_only=True).self_influence.shape
            (60,)
        """
        found: Influence = self.ggn().influence(queries, **options)
        return found

    @for_both
    def predictive(self: Any, /, inputs: Any, **options: Any) -> Predictive:
        """Compute variances of predictions under the posterior of the GGN.

        Args:
            inputs: As in the dataset: an array [T, …], a tuple of these, or by name.
            **options: Those of [`predictive`][curvd.RemoteOperator.predictive] of an
                operator.

        Returns:
            The outputs, their variances, and how true the solutions are.

        Examples:
            >>> x = np.zeros((1, 4))
            >>> narrow, wide = (session.predictive(x, prior=p) for p in (100.0, 0.1))
            >>> bool(np.all(narrow.variance < wide.variance))
            True
        """
        found: Predictive = self.ggn().predictive(inputs, **options)
        return found

    @for_both
    def posterior_samples(self: Any, /, k: int = 1, **options: Any) -> PosteriorSamples:
        """Draw from the posterior of the GGN.

        Args:
            k: How many.
            **options: Those of
                [`posterior_samples`][curvd.RemoteOperator.posterior_samples] of an
                operator.

        Returns:
            What is to be added to the parameters, draw by draw.

        Examples:
            >>> session.posterior_samples(2, prior=10.0).samples.shape
            (2, 43)
        """
        found: PosteriorSamples = self.ggn().posterior_samples(k, **options)
        return found

    @for_both
    def marginal_likelihood(
        self: Any, /, priors: Any, **options: Any
    ) -> MarginalLikelihood:
        """Compute Laplace's log marginal likelihood for several priors, by the GGN.

        Args:
            priors: Precisions, positive: a number, or several.
            **options: Those of
                [`marginal_likelihood`][curvd.RemoteOperator.marginal_likelihood] of an
                operator.

        Returns:
            The values, and their parts.

        Examples:
            >>> session.marginal_likelihood(np.logspace(-2, 2, 9)).best
            1.0
        """
        found: MarginalLikelihood = self.ggn().marginal_likelihood(priors, **options)
        return found

    @for_both
    def sketch(self: Any, /, name: str = "sketch", **options: Any) -> Sketch:
        """Sketch the GGN, to precondition systems of it and of the Hessian.

        Args:
            name: Under which the session keeps it.
            **options: Those of [`sketch`][curvd.RemoteOperator.sketch] of an operator.

        Returns:
            The values, and what the session stores.

        Examples:
            >>> session.sketch("top", rank=30).stored.name
            'top'
            >>> b = session.gradient()[1]
            >>> session.hessian().solve(b, damping=1.0, preconditioner="top").converged
            True
        """
        found: Sketch = self.ggn().sketch(name, **options)
        return found
