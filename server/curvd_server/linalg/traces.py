"""Traces: Hutchinson, Hutch++ and XTrace."""

from __future__ import annotations

import math
from dataclasses import replace

from curvd.contract import Estimator, Stop, TraceOptions
from curvd_server.linalg.base import Products, Progress, Query
from curvd_server.linalg.definition import Definition, Room
from curvd_server.linalg.intervals import Mean, few, mean_of, student_975
from curvd_server.linalg.sampling import (
    LEAST_SAMPLES,
    Estimate,
    Target,
    sample_mean,
    vectors_of,
)
from curvd_server.linalg.sketch import Sketch
from curvd_server.linalg.whole import is_small, known_or, number_of


def trace(
    products: Products,
    *,
    estimator: Estimator = Estimator.EXCHANGEABLE,
    target: Target,
    seed: int = 0,
    block: int = 8,
) -> Query[Estimate]:
    """Estimate the trace of a symmetric map.

    Args:
        products: The map.
        estimator: Which method. Hutchinson spends one product per sample and its
            error falls with the square root of their number. The others spend part
            of them on the map's leading eigenspace and win when eigenvalues decay.
        target: When to stop.
        seed: The seed of the probes.
        block: Probes multiplied together.

    Returns:
        The estimate.
    """

    def estimate() -> Query[Estimate]:
        if is_small(products, target):
            return number_of(products, block, lambda A: A.trace())
        method = {
            Estimator.HUTCHINSON: hutchinson,
            Estimator.HUTCHPP: hutchpp,
            Estimator.EXCHANGEABLE: xtrace,
        }[estimator]
        return method(products, target=target, seed=seed, block=block)

    return known_or(products, lambda values: values, estimate)


def hutchinson(
    products: Products, *, target: Target, seed: int = 0, block: int = 8
) -> Query[Estimate]:
    """Average ``w.Aw`` (Hutchinson, Commun. Stat. Simul. Comput. 18, 1989).

    Args:
        products: The map A.
        target: When to stop.
        seed: The seed of the probes.
        block: Probes multiplied together.

    Returns:
        The estimate.
    """
    return sample_mean(
        products,
        lambda W, AW: products.space.dots(W, AW).tolist(),
        target=target,
        seed=seed,
        block=block,
    )


def hutchpp(
    products: Products, *, target: Target, seed: int = 0, block: int = 8
) -> Query[Estimate]:
    """Split the trace as Hutch++ does (Meyer, Musco, Musco & Woodruff, SOSA 2021).

    ``tr(A) = tr(Q'AQ) + tr((I - QQ')A(I - QQ'))``, with Q an orthonormal basis of
    ``AS`` for a sketch S. The first term is exact, the second is sampled; its sample
    variance is the error estimate. A sketch takes two products and a sample one, so
    thirds of ``target.samples`` go to each. Probes are random directions: signs coincide
    on the few coordinates that a map may touch, and few samples would agree on a wrong trace.

    Args:
        products: The map A.
        target: When to stop; ``samples`` counts products.
        seed: The seed of the probes.
        block: Probes multiplied together.

    Yields:
        The exact term while the sketch grows, then the estimate.

    Returns:
        The estimate.
    """
    sketch = Sketch(products, seed)
    budget = target.samples if products.limit is None else products.limit
    columns = min(min(budget, target.samples) // 3, products.size)
    while sketch.count < columns and not sketch.complete:
        wanted = min(block, columns - sketch.count)
        if products.refusal(2 * wanted):
            break
        sketch.grow(wanted)
        yield Progress(
            iteration=sketch.count,
            products=products.done,
            estimates=(sketch.exact_trace(),),
        )
    used = products.done
    if sketch.complete:
        return _estimate(products, _exact(sketch), sketch.count, Stop.CONVERGED)
    rest = Target(
        relative=target.relative,
        absolute=target.absolute,
        samples=max(2, target.samples - used),
    )
    found = yield from sample_mean(
        products,
        lambda W, AW: products.space.dots(W, AW).tolist(),
        target=rest,
        seed=seed,
        block=block,
        draw=lambda indices: sketch.without(products.space.directions(seed, indices)),
        shift=sketch.exact_trace(),
        first=sketch.count,
    )
    # The exact term has been rounded, however well the samples agree.
    return replace(
        found,
        standard_error=max(found.standard_error, sketch.rounding),
        half_width=max(found.half_width, sketch.rounding),
    )


def xtrace(
    products: Products, *, target: Target, seed: int = 0, block: int = 8
) -> Query[Estimate]:
    """Use every probe for both terms (Epperly, Tropp & Webber, SIMAX 45, 2024).

    For each probe, the sketch of all others gives the exact term and the probe itself
    samples the remainder; the mean over probes is the estimate. Probes are random
    directions, see `hutchpp`.

    The estimates of the probes share a sketch. Let V_r be the part of the variance that
    interactions of r probes cause (Hoeffding's decomposition). The spread of the
    estimates sees V_r / r, and the jackknife r V_r (Efron & Stein, Ann. Stat. 9, 1981):
    one too small, one too large, and their geometric mean no smaller than the sum of
    V_r by the Cauchy-Schwarz inequality, with equality where one order rules.

    Args:
        products: The map.
        target: When to stop; ``samples`` counts products, two per probe.
        seed: The seed of the probes.
        block: Probes multiplied together.

    Yields:
        The estimate and its error.

    Returns:
        The estimate.
    """
    sketch = Sketch(products, seed)
    mean, stopped = Mean(math.nan, math.inf, math.inf), Stop.CONVERGED
    while products.done + 2 <= max(target.samples, 4):
        wanted = min(block, (max(target.samples, 4) - products.done) // 2)
        if products.limit is not None:
            wanted = max(1, min(wanted, products.allowed(2 * wanted) // 2))
        reason = products.refusal(2 * wanted)
        if reason is not None:
            stopped = reason
            break
        sketch.grow(wanted)
        values = sketch.exchanged_traces()
        spread = mean_of(values)
        jackknife = sketch.jackknife_error(spread.value)
        # Of one or two probes nothing is known, whatever they agree on.
        known = math.isfinite(jackknife)
        error = math.sqrt(spread.standard_error * jackknife) if known else math.inf
        width = error * few(len(values)) * student_975(max(1, len(values) - 1))
        mean = Mean(spread.value, error, width)
        if sketch.complete:
            mean = _exact(sketch)
        yield Progress(
            iteration=sketch.count,
            products=products.done,
            estimates=(mean.value,),
            residuals=(mean.standard_error,),
        )
        if sketch.complete or (len(values) >= LEAST_SAMPLES and target.reached(mean)):
            break
    return _estimate(products, mean, sketch.count, stopped)


def _exact(sketch: Sketch) -> Mean:
    """Return the trace of a map whose range a sketch spans."""
    return Mean(sketch.exact_trace(), sketch.rounding, sketch.rounding)


def _estimate(products: Products, mean: Mean, samples: int, stopped: Stop) -> Estimate:
    return Estimate(
        value=mean.value,
        standard_error=mean.standard_error,
        half_width=mean.half_width,
        samples=samples,
        products=products.done,
        stopped=stopped,
    )


def _begin(products: Products, options: TraceOptions, room: Room) -> Query[Estimate]:
    return products.begin(
        trace,
        estimator=Estimator(options.estimator),
        target=Target.of(options, options.samples),
        seed=options.seed,
        block=room.block,
    )


DEFINITION = Definition(
    options=TraceOptions,
    vectors=lambda options, room: vectors_of(
        Estimator(options.estimator), options.samples, room.block
    ),
    begin=_begin,
)
