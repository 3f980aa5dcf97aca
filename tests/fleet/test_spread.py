"""Queries that run on all workers: what one process finds, and the same bits on any number."""

import dataclasses
import itertools
import threading
import time

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from support.algorithms import QUERIES, A, P, ask, map_of, size_of
from support.fleets import fleet_of

from curvd.contract.enums import Distribution, Stop
from curvd.errors import Internal, NotFinite, Unavailable
from curvd_server.fleet.shards import segments
from curvd_server.fleet.spread import Spread
from curvd_server.linalg import (
    ALGORITHMS,
    EigshResult,
    NystromResult,
    Products,
    SolveResult,
    probes,
)
from curvd_server.linalg.band import Band
from curvd_server.linalg.base import drain

SHARDS = 4


def runner_of(fleet, name):
    return Spread(fleet, segments(size_of(name), SHARDS, len(fleet.seats)))


def flat(value):
    """All numbers of a result, with their places."""
    if isinstance(value, torch.Tensor | np.ndarray):
        yield np.asarray(value)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from flat(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from flat(item)
    else:
        yield np.asarray(value) if isinstance(value, int | float) else value


def same(one, other):
    for a, b in zip(flat(one), flat(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def fleets():
    """One to four workers."""
    with fleet_of(1) as a, fleet_of(2) as b, fleet_of(3) as c, fleet_of(4) as d:
        yield a, b, c, d


def essence(result):
    """What is unique: neither signs of eigenvectors nor the last residuals."""
    if isinstance(result, EigshResult):
        for x, value, wanted in zip(
            result.vectors, result.values, result.tolerances, strict=True
        ):
            assert float((A @ x - value * x).norm()) <= 1.01 * wanted
        return result.values
    if isinstance(result, NystromResult):
        low = result.sketch
        return (low.vectors.T * torch.from_numpy(low.values)) @ low.vectors
    if isinstance(result, SolveResult):
        return result.solution
    return [essence(one) for one in result] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_finds_what_one_process_finds_by_as_many_products(fleets, name):
    want, products = ask(name)
    found, spent = ask(name, runner_of(fleets[1], name))
    # Sums in another order may tip a decision near its limit.
    assert spent == pytest.approx(products, rel=0.05)
    want = tuple(want) if isinstance(want, list) else want
    for a, b in zip(flat(essence(found)), flat(essence(want)), strict=True):
        if isinstance(b, np.ndarray):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        else:
            assert a is b


@pytest.mark.parametrize("name", QUERIES)
def test_bits_do_not_depend_on_the_number_of_workers_nor_on_repetition(fleets, name):
    want, _ = ask(name, runner_of(fleets[0], name))
    for fleet in (*fleets, fleets[1]):
        found, _ = ask(name, runner_of(fleet, name))
        same(found, want)


def lose(fleet, rank):
    """Cut a worker off; returns when the front knows it."""
    seat = fleet.seats[rank]
    with fleet._changed:
        there = seat.incarnation
    fleet.launcher.end(rank)
    with fleet._changed:
        assert fleet._changed.wait_for(
            lambda: not seat.is_ready or seat.incarnation != there, timeout=60
        )


def cut_off(fleet, at):
    """A multiplication during which a worker is lost, once."""
    done = []

    def multiply(V):
        done.append(len(V))
        if sum(done) >= at > sum(done[:-1]):
            lose(fleet, 1)
        return V @ A

    return multiply


@pytest.mark.parametrize("name", [n for n in QUERIES if size_of(n) == P])
def test_a_query_whose_worker_is_lost_begins_again_and_finds_the_same_bits(
    fleets, name
):
    want, products = ask(name, runner_of(fleets[1], name))
    algorithm, arguments = QUERIES[name]
    map_ = Products(
        cut_off(fleets[1], products // 2 + 1),
        size=P,
        dtype=A.dtype,
        runner=runner_of(fleets[1], name),
    )
    found = drain(map_.begin(ALGORITHMS[algorithm], **arguments))
    same(found, want)
    assert map_.done > products  # what was multiplied in vain is counted


def test_a_query_whose_worker_is_lost_again_and_again_is_unavailable(fleets):
    fleet = fleets[1]

    def multiply(V):
        lose(fleet, 0)
        return V @ A

    map_ = Products(multiply, size=P, dtype=A.dtype, runner=runner_of(fleet, "eigsh"))
    with pytest.raises(Unavailable, match=r"begun 4 times .* worker 0 was lost") as e:
        drain(map_.begin(ALGORITHMS["eigsh"], k=2))
    assert "nothing of it is kept but what it was given" in str(e.value)
    ask("trace", runner_of(fleet, "trace"))  # the next one is answered


@pytest.mark.parametrize("lasting", [False, True])
def test_workers_never_part_in_silence(fleets, lasting, monkeypatch):
    """As where LAPACK rounds otherwise on another processor."""
    want, _ = ask("eigsh", runner_of(fleets[1], "eigsh"))
    ritz, odd = Band.ritz, []

    def otherwise(self):
        values, turn = ritz(self)
        if threading.current_thread().name == "segment-2" and self.count == 9:
            if lasting or not odd:
                odd.append(self)
                turn = turn * (1 + 2e-16)
        return values, turn

    monkeypatch.setattr(Band, "ritz", otherwise)
    if lasting:
        with pytest.raises(Unavailable, match="different numbers from the same sums"):
            ask("eigsh", runner_of(fleets[1], "eigsh"))
    else:
        found, _ = ask("eigsh", runner_of(fleets[1], "eigsh"))
        same(found, want)
    assert odd


def test_errors_of_the_map_and_of_an_algorithm_are_told_as_everywhere(fleets):
    runner = runner_of(fleets[1], "eigsh")
    bad = Products(lambda V: V / 0, size=P, dtype=A.dtype, runner=runner)
    with pytest.raises(NotFinite, match="product 1 of the query is"):
        drain(bad.begin(ALGORITHMS["eigsh"], k=2))
    with pytest.raises(Internal, match="a worker failed: TypeError"):
        drain(map_of(A, runner).begin(ALGORITHMS["eigsh"], k="no_such"))


def test_limits_end_a_query_with_what_it_has(fleets):
    runner = runner_of(fleets[1], "eigsh")
    few = map_of(A, runner, limit=7)
    found = drain(few.begin(ALGORITHMS["eigsh"], k=2))
    assert (found.stopped, found.products, few.done) == (Stop.PRODUCTS, 7, 7)
    late = map_of(A, runner, expired=lambda: late.done >= 5)
    found = drain(late.begin(ALGORITHMS["eigsh"], k=2))
    assert (found.stopped, found.products) == (Stop.TIME, 5)


def test_what_is_given_up_leaves_nothing_on_the_workers(fleets):
    fleet = fleets[1]
    query = map_of(A, runner_of(fleet, "eigsh")).begin(ALGORITHMS["eigsh"], k=2)
    for _ in range(3):
        next(query)
    query.close()
    workers = fleet.launcher.workers.values()
    until_s = time.monotonic() + 60
    while any(w._programs._running for w in workers) and time.monotonic() < until_s:
        time.sleep(0.01)
    assert not any(w._programs._running for w in workers)


def test_probes_have_the_bits_of_whole_ones_wherever_they_are_cut():
    """Chunks end within them; a cut is in no place that anything else knows."""
    size, cuts = 5_000_000, (0, 131_071, 131_073, 2_500_001, 4_194_305, 5_000_000)
    for distribution in Distribution:
        whole = probes(distribution, 3, [7], size, dtype=torch.float32)
        parts = [
            probes(
                distribution, 3, [7], size, dtype=torch.float32, part=range(start, stop)
            )
            for start, stop in itertools.pairwise(cuts)
        ]
        assert torch.equal(torch.cat(parts, 1), whole)
