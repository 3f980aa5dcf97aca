"""A Gaussian posterior around the parameters: the queries, and how their priors travel.

What they find is told and drawn elsewhere (`posterior`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import numpy as np

from curvd._calls import Answer, Queries, QueryCall
from curvd.contract import (
    MarginalLikelihoodOptions,
    PosteriorSamplesOptions,
    PredictiveOptions,
    StoredVector,
    select,
)
from curvd.contract.query_options.laplace import check_one_prior
from curvd.errors import InvalidSpec
from curvd.remote.asking import asks, asks_about
from curvd.remote.queries.base import check_name
from curvd.remote.queries.influence import array_of, length_of
from curvd.remote.queries.posterior import (
    MarginalLikelihood,
    PosteriorSamples,
    Predictive,
)
from curvd.v1 import query_service_pb2 as query_pb

__all__ = ["LaplaceQueries"]

_LEAST = 1e-100
"""Precision of a prior; the largest is its inverse."""
_MOST_BYTES = 1 << 40
"""Of moments of outputs, whose number only the server knows."""


class LaplaceQueries:
    """The queries for a Gaussian posterior."""

    _queries: Queries

    @asks_about(PredictiveOptions)
    def predictive(  # noqa: D417 - options say themselves what they are
        self, inputs: Any, options: PredictiveOptions
    ) -> QueryCall[Predictive]:
        """Compute variances of linearised outputs under the posterior, exactly.

        The posterior's precision is ``scale * A + prior * I``, where scale undoes the
        objective's division: the number of targets, for mse over ``2 noise^2``. One system
        for each output of each input is solved on the server; only moments travel.

        Args:
            inputs: As in the dataset: an array [T, …], a tuple of these, or by name.

        Returns:
            The outputs, their variances, and how true the solutions are.

        Examples:
            >>> x = np.linspace(-1, 1, 8).reshape(2, 4)
            >>> found = session.predictive(x, prior=1.0)
            >>> found.mean.shape, found.variance.shape, found.converged
            ((2, 3), (2, 3), True)
            >>> bool(np.allclose(found.probabilities().sum(1), 1))
            True
        """
        if isinstance(inputs, Mapping):
            arrays = {str(name): array_of(v, name) for name, v in inputs.items()}
        else:
            parts = inputs if isinstance(inputs, tuple) else (inputs,)
            arrays = {str(i): array_of(v, i) for i, v in enumerate(parts)}
        length_of(arrays)
        check_one_prior(options.prior, options.priors)
        priors = self._priors_of(options.priors)

        def read(answer: Answer) -> Predictive:
            mean, covariance = answer.arrays["mean"], answer.arrays.get("covariance")
            variance = answer.arrays.get("variance")
            if covariance is not None:
                diagonal = np.diagonal(covariance, axis1=1, axis2=2)
                variance = np.array(diagonal).reshape(mean.shape)
            return answer.result(
                Predictive,
                variance=variance,
                covariance=covariance,
                loss=self._queries.session.loss.name,
            )

        return self._queries.call(
            "Predictive",
            options,
            read,
            arrays=arrays,
            max_bytes=_MOST_BYTES,
            priors=priors,
        )

    @asks(PosteriorSamplesOptions)
    def posterior_samples(
        self, options: PosteriorSamplesOptions
    ) -> QueryCall[PosteriorSamples]:
        """Draw from the posterior of precision ``scale * G + prior * I``, by systems.

        Exact but for the residuals (Antoran et al., ICLR 2023): a draw takes one backward
        pass of noise, and one column of a block solve.

        Returns:
            What is to be added to the parameters, draw by draw.

        Examples:
            >>> found = session.posterior_samples(3, prior=10.0, seed=1)
            >>> found.samples.shape
            (3, 43)
            >>> kept = session.posterior_samples(2, store="draws").stored
            >>> kept.shape
            (2, 43)
        """
        check_name(options.store)
        check_one_prior(options.prior, options.priors)
        queries = self._queries

        def read(answer: Answer) -> PosteriorSamples:
            stored = None
            if options.store is not None:
                shape = (options.k, queries.session.layout.size)
                stored = queries.stored(options.store, shape, answer)
            found = answer.arrays.get("samples")
            return answer.result(PosteriorSamples, samples=found, stored=stored)

        nbytes = options.k * queries.column_bytes
        priors = self._priors_of(options.priors)
        return queries.call(
            "PosteriorSamples", options, read, max_bytes=nbytes, priors=priors
        )

    @asks_about(MarginalLikelihoodOptions)
    def marginal_likelihood(  # noqa: D417 - options say themselves what they are
        self, priors: Any, options: MarginalLikelihoodOptions
    ) -> QueryCall[MarginalLikelihood]:
        """Compute the logarithm of Laplace's marginal likelihood for several priors.

        All priors share the products: small operators have all their eigenvalues computed,
        large ones a Lanczos run from each probe.

        Args:
            priors: Precisions, positive: a number, or several; or several that differ between
                parameters, each as `priors` of `predictive` takes them.

        Returns:
            The values, and their parts.

        Examples:
            >>> found = session.marginal_likelihood([0.1, 1.0, 10.0])
            >>> found.values.shape, found.exact, found.best in found.priors
            ((3,), True, True)
            >>> layers = [{"1.*": 1.0, "*": p} for p in (0.1, 10.0)]
            >>> session.marginal_likelihood(layers).best in layers
            True
        """
        if _differ(priors):
            several = priors if isinstance(priors, list | tuple) else [priors]
            return self._evidence(
                options,
                tuple(several),
                parameter_priors=[self._priors_of(one) for one in several],
            )
        wanted = np.atleast_1d(np.asarray(priors, dtype=np.float64))
        if wanted.ndim != 1 or not len(wanted) or not np.all(wanted > 0):
            msg = f"priors must be positive numbers, at least one, got {priors!r:.80}"
            raise InvalidSpec(msg, priors=str(priors)[:80])

        return self._evidence(options, wanted, priors=wanted.tolist())

    def _evidence(
        self, options: MarginalLikelihoodOptions, said: Any, **priors: Any
    ) -> QueryCall[MarginalLikelihood]:
        """Make the call; `said` is what the result says of its priors."""

        def read(answer: Answer) -> MarginalLikelihood:
            priors = said
            if answer.summary.found:
                layered = isinstance(said, tuple)
                priors = self._found(answer.summary.found, layered=layered)
            return answer.result(MarginalLikelihood, priors=priors)

        return self._queries.call("MarginalLikelihood", options, read, **priors)

    def _found(
        self, found: Iterable[query_pb.ParameterPriors], *, layered: bool
    ) -> Any:
        """Read priors that a search has found: numbers, or by the names of parameters."""
        several = [tuple(one.by_parameter) for one in found]
        names = self._queries.session.layout.names
        if not layered:
            return np.array([one[0] for one in several])
        return tuple(dict(zip(names, one, strict=True)) for one in several)

    def _priors_of(self, given: Any) -> query_pb.ParameterPriors | None:
        """Write precisions that differ between parameters.

        Args:
            given: By globs over names, or what the session stores; None: they do not.

        Returns:
            What travels.

        Raises:
            InvalidSpec: If a parameter has none, a glob matches nothing, or a precision is
                out of its range.
        """
        if given is None:
            return None
        if isinstance(given, str | StoredVector):
            name = given if isinstance(given, str) else given.name
            check_name(name)
            return query_pb.ParameterPriors(stored=name)
        names = self._queries.session.layout.names
        if not isinstance(given, Mapping):
            given = {"*": given}
        found: dict[str, float] = {}
        for glob, value in given.items():
            matched = select(names, [str(glob)], aliases={}, what="priors")
            found |= dict.fromkeys([n for n in matched if n not in found], value)
        if missing := [name for name in names if name not in found]:
            msg = (
                f"priors have no precision for {', '.join(missing[:3])}: add a glob that "
                'matches, such as "*" as the last'
            )
            raise InvalidSpec(msg, parameter=missing[0])
        for name, value in found.items():
            if not isinstance(value, Real) or not _LEAST <= value <= 1 / _LEAST:
                msg = (
                    f"the precision of a prior is a number in [{_LEAST:g}, {1 / _LEAST:g}], "
                    f"got {value!r:.80} for {name!r}; a vector [P] is stored first "
                    "(session.put), and named"
                )
                raise InvalidSpec(msg, parameter=name)
        by_parameter = [float(found[name]) for name in names]
        return query_pb.ParameterPriors(by_parameter=by_parameter)


def _differ(priors: Any) -> bool:
    """Tell whether priors are, or some of them are, different between parameters."""
    several = priors if isinstance(priors, list | tuple) else [priors]
    return any(isinstance(one, Mapping | str | StoredVector) for one in several)
