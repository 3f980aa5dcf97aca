"""Sums over P: an algorithm asks its space for each, and makes none by itself."""

import sys

import pytest

pytest.importorskip("torch")
import torch
from support.algorithms import QUERIES, P, ask, size_of
from torch.utils._python_dispatch import TorchDispatchMode

from curvd_server.linalg import base, space

ALLOWED = {space.__file__}
LOOKED = (base.__file__, "_look")
"""Looks at products, where the map is: nothing is asked there of vectors in parts."""


class Watch(TorchDispatchMode):
    """Notes operations that leave nothing of an axis of length P.

    P is a prime that no other axis has.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if is_long(args) and not is_long(result) and not function.is_view:
            callers = list(_callers())
            if LOOKED not in callers and not ALLOWED & {file for file, _ in callers}:
                self.found.append((str(function), callers[:1]))
        return result


def is_long(value):
    if isinstance(value, list | tuple):
        return any(map(is_long, value))
    return isinstance(value, torch.Tensor) and P in value.shape


def _callers():
    frame = sys._getframe(2)
    while frame is not None:
        if "curvd_server" in frame.f_code.co_filename:
            yield frame.f_code.co_filename, frame.f_code.co_name
        frame = frame.f_back


@pytest.mark.parametrize("name", [n for n in QUERIES if "small map" not in n])
def test_an_algorithm_sums_over_elements_by_its_space_alone(name):
    with Watch() as watch:
        ask(name)
    assert watch.found == []


@pytest.mark.parametrize(
    "summed",
    [
        lambda V: V.sum(1),
        lambda V: V @ V.T,
        lambda V: torch.linalg.vector_norm(V),
        lambda V: V.abs().max(),
        lambda V: (V > 0).any(),
        lambda V: torch.einsum("ap,bp->ab", V, V),
        lambda V: float(V[0] @ V[1]),
    ],
)
def test_whoever_summed_by_himself_would_be_seen(summed):
    V = torch.ones(3, P)
    with Watch() as watch:
        summed(V)
    assert watch.found


@pytest.mark.parametrize("name", ["trace of a small map", "diagonal of a small map"])
def test_a_small_map_is_multiplied_as_a_whole(name):
    assert ask(name)[1] == size_of(name) < P
