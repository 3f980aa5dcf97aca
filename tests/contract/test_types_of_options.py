"""Values of another type than an option's are refused by name, before anything travels."""

import numpy as np
import pytest

import curvd
from curvd.contract import EigshOptions, SolveOptions, TraceOptions
from curvd.contract.query_messages import request_type, write


@pytest.mark.parametrize(
    ("options", "given", "said"),
    [
        (EigshOptions, {"k": True}, "k must be a whole number, got True"),
        (EigshOptions, {"k": "a"}, "k must be a whole number, got 'a'"),
        (TraceOptions, {"samples": False}, "samples must be a whole number"),
        (TraceOptions, {"seed": 1.5}, "seed must be a whole number, got 1.5"),
        (SolveOptions, {"damping": "a"}, "damping must be a number, got 'a'"),
        (SolveOptions, {"damping": 1j}, "damping must be a number, got 1j"),
    ],
)
def test_numbers_are_numbers(options, given, said):
    with pytest.raises(curvd.InvalidSpec, match=said):
        options(**given)


@pytest.mark.parametrize("kind", [np.int64, np.float32, np.float64])
def test_numbers_of_numpy_are_numbers(kind):
    assert SolveOptions(damping=kind(2)).damping == 2


def test_an_array_is_no_name():
    message = request_type("Eigsh")()
    with pytest.raises(curvd.InvalidSpec, match=r"start cannot be a ndarray: .* name"):
        write(EigshOptions(k=2, start=np.zeros((4, 2))), message)
