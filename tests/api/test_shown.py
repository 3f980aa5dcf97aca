"""What people see: a line or two that lead with the value, and pictures that say what
they are."""

import dataclasses
import json
import re

import numpy as np
import pytest

import curvd
from curvd.contract import QUERIES, most_products
from curvd.contract.query_options.data_points import GradientNormsOptions
from curvd.remote import progress


@pytest.fixture(scope="module")
def found(tanh_session):
    """A result of each kind."""
    H, G = tanh_session.hessian(), tanh_session.ggn()
    _, gradient = tanh_session.gradient()
    return {
        "Eigenpairs": H.eigsh(k=5),
        "Estimate": G.trace(samples=10),
        "DiagonalEstimate": G.diagonal(samples=10),
        "Density": H.spectral_density(probes=2, steps=10),
        "Solution": G.solve(gradient, damping=0.1),
        "LogDeterminant": G.logdet(damping=1.0, probes=4),
        "GradientNorms": tanh_session.gradient_norms(),
        "GradientGram": tanh_session.gradient_gram(),
        "GradientSquares": tanh_session.gradient_squares(),
        "JacobianProduct": tanh_session.jacobian_product(gradient),
        "Sketch": G.sketch("a sketch", rank=5),
        "Influence": G.influence([3, 5], damping=0.1),
        "Predictive": G.predictive(np.ones((2, 4))),
        "PosteriorSamples": G.posterior_samples(2),
        "MarginalLikelihood": G.marginal_likelihood([0.1, 1.0]),
    }


BEGINNINGS = {
    "Eigenpairs": r"^<Eigenpairs -?[\d.e+-]+ ± [\d.e+-]+, .*, … 2 more; converged: \d+",
    "Estimate": r"^<Estimate [\d.e+-]+ ± [\d.e+-]+ \(95 %\); converged: 10 products in",
    "DiagonalEstimate": r"^<DiagonalEstimate elements from .* each within [\d.e+-]+; ",
    "Density": r"^<Density Ritz values from -[\d.e+-]+ to [\d.e+-]+; ",
    "Solution": r"^<Solution relative residual [\d.e+-]+; converged: ",
    "LogDeterminant": r"^<LogDeterminant -?[\d.e+-]+ ± [\d.e+-]+ \(95 %\); ",
    "Sketch": r"^<Sketch 'a sketch': 5 values, from [\d.e+-]+ to [\d.e+-]+; ",
    "Influence": r"^<Influence 2 queries, relative residual at most [\d.e+-]+; ",
    "Predictive": r"^<Predictive 2 inputs, deviations [\d.e+-]+ to [\d.e+-]+, median ",
    "PosteriorSamples": r"^<PosteriorSamples 2 draws, relative residual at most [\d.e+-]+",
    "MarginalLikelihood": r"^<MarginalLikelihood -?[\d.e+-]+ ± [\d.e+-]+ at a prior ",
    "GradientGram": r"^<GradientGram 20 gradients, median cosine of two -?[\d.]+; ",
    "GradientSquares": r"^<GradientSquares 43 sums of 20: [\d.e+-]+ to [\d.e+-]+; ",
    "JacobianProduct": r"^<JacobianProduct \[20\] by \w+; ",
    "GradientNorms": r"^<GradientNorms 20 norms: .* median [\d.e+-]+; ",
}


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_a_result_shows_its_value_and_error_first(found, kind):

    text = repr(found[kind])
    assert re.search(BEGINNINGS[kind], text), text
    assert len(text) < 200
    assert "\n" not in text


def test_no_repr_has_more_than_two_lines_of_a_terminal(live_target, tanh_session):
    with curvd.connect(live_target) as client:
        info = tanh_session.info
        data = {"x": np.ones((4, 4)), "y": np.zeros(4, int)}
        dataset = client.register_dataset(data, inputs="x", target="y", batch_size=2)
        state = {"1.weight": np.eye(3, 8), "1.bias": np.zeros(3)}
        model = client.register_model("mlp", {"widths": [8, 3]}, state)
        shown = [client, client.server_info(), model, dataset, info, info.layout]
        shown += [tanh_session, tanh_session.hessian(damping=0.1)]
        shown += [tanh_session.hessian() + 2 * tanh_session.ggn()]
        for value in shown:
            assert len(repr(value)) < 200, repr(value)
    assert repr(dataset).startswith("<DatasetInfo N=4 B=2: x [4, 4], y [4], id ")
    assert repr(model).startswith("<ModelInfo 'mlp' of 2 tensors, 408 bytes, id ")
    assert "<OperatorSum hessian + 2 * ggn, [43, 43]" in repr(shown[-1])
    assert repr(tanh_session).startswith("<Session P=43 N=20 F64 cross_entropy on cpu")


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_a_result_is_json(found, kind):
    def never(name):
        raise AssertionError(name)

    told = json.loads(json.dumps(found[kind].to_dict()), parse_constant=never)
    names = {field.name for field in dataclasses.fields(found[kind])}
    assert told.keys() == names | {"converged"}
    assert told["info"]["products"] == found[kind].products
    for name, value in told.items():
        mine = getattr(found[kind], name)
        if isinstance(mine, np.ndarray) and np.isfinite(mine).all():
            np.testing.assert_array_equal(value, mine)


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_a_picture_has_a_title_axes_and_a_legend(found, kind):
    pytest.importorskip("matplotlib")
    axes = found[kind].plot()
    assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel()
    assert all(text.get_text() for text in axes.get_legend().get_texts())
    axes.get_figure().canvas.draw()


def test_ranks_are_whole_numbers(found):
    pytest.importorskip("matplotlib")
    for kind in ("Eigenpairs", "Estimate", "Solution"):
        axes = found[kind].plot()
        axes.get_figure().canvas.draw()
        ticks = axes.get_xticks()
        np.testing.assert_array_equal(ticks, np.round(ticks))


def test_a_trace_plot_shows_what_its_samples_said(found):
    pytest.importorskip("matplotlib")
    on_the_way = tuple(
        curvd.QueryProgress(
            iteration=n,
            products=n,
            estimates=(float(n),),
            residuals=(1.0 / n,),
            elapsed_s=0.1 * n,
        )
        for n in (1, 2, 5)
    )
    estimate = dataclasses.replace(found["Estimate"], history=on_the_way)
    points, last = (line[0] for line in estimate.plot().containers)
    np.testing.assert_array_equal(points.get_xdata(), [1, 2, 5])
    np.testing.assert_array_equal(points.get_ydata(), [1.0, 2.0, 5.0])
    np.testing.assert_array_equal(last.get_ydata(), [estimate.value])


def test_what_arrived_on_the_way_is_kept(tanh_session):
    seen = []
    found = tanh_session.ggn().trace(samples=43, progress=seen.append)
    assert list(found.history) == seen
    assert all(p.total == 43 for p in seen)


MOST = {
    "samples": (curvd.contract.TraceOptions(samples=7), 7),
    "a limit": (curvd.contract.TraceOptions(samples=70, max_products=9), 9),
    "probes and steps": (curvd.contract.SpectralDensityOptions(probes=3, steps=5), 15),
    "a rank": (curvd.contract.SketchOptions(rank=8), 8),
    "until it is good": (curvd.contract.EigshOptions(k=3), None),
    "data points": (GradientNormsOptions(), 20),
}


@pytest.mark.parametrize(("options", "most"), MOST.values(), ids=MOST)
def test_progress_knows_its_end(tanh_session, options, most):
    rpc = next(rpc for rpc, query in QUERIES.items() if query.options is type(options))
    assert most_products(rpc, options, tanh_session.info.data_points) == most


def test_progress_says_how_far_it_is_and_what_is_left():
    at = curvd.QueryProgress(
        iteration=1,
        products=25,
        estimates=(2.0,),
        residuals=(0.5,),
        elapsed_s=50.0,
        total=100,
    )
    assert str(at) == "25 of 100 products, estimates 2, errors 5.0e-01"
    assert at.left_s == 150.0
    assert progress._line("Trace", at).startswith(
        "Trace, 25 of 100 products, estimate 2"
    )
    assert progress._left(at.left_s) == "at most 2:30 left"
    assert progress._left(dataclasses.replace(at, total=None).left_s) == ""


@pytest.mark.parametrize(
    "ask",
    [
        lambda H, **limit: H.spectral_density(**limit),
        lambda H, **limit: H.logdet(damping=5.0, **limit),
        lambda H, **limit: H.trace(**limit),
        lambda H, **limit: H.diagonal(**limit),
    ],
    ids=["density", "logdet", "trace", "diagonal"],
)
@pytest.mark.parametrize(
    "limit", [{"max_products": 1}, {"time_limit_s": 1e-9}], ids=str
)
def test_what_ran_out_before_any_number_says_so(tanh_session, ask, limit):
    found = ask(tanh_session.hessian(), **limit)
    assert not found.converged
    assert "nothing was computed: raise max_products" in str(found)
    assert "nothing was computed" in repr(found) and "definite" not in str(found)
    json.dumps(found.to_dict(), allow_nan=False)
    found.plot()


def test_a_log_determinant_that_may_be_minus_infinite_says_so(tanh_session):
    """The classes' biases and weights of a softmax have directions without curvature."""
    found = tanh_session.ggn().logdet(probes=6, steps=12)
    assert found.info.stopped is curvd.Stop.STAGNATED and not found.converged
    assert "possibly singular, which would be -inf" in str(found)
    assert "or -inf: possibly singular; stagnated" in repr(found)
    assert len(repr(found)) < 200
