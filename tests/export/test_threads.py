"""Threads that export at once get what each would get alone."""

import gc
import threading

import pytest

import curvd
from curvd.graph.garbage import full_collections
from curvd_server.system.garbage import none_while_building

torch = pytest.importorskip("torch")

THREADS = 4


def module_of(number):
    """Each has a shape of its own, so that none is spared the tracing."""
    torch.manual_seed(number)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 5 + number), torch.nn.Tanh(), torch.nn.Linear(5 + number, 3)
    )


def test_exports_at_once_are_those_made_alone():
    modules = [module_of(number) for number in range(THREADS)]
    inputs = torch.randn(10, 4)
    found, errors = {}, []
    together = threading.Barrier(THREADS)

    def export(number):
        together.wait(300)
        try:
            found[number] = curvd.export(modules[number], inputs)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=export, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert errors == []
    for number, module in enumerate(modules):
        alone = curvd.export(module, inputs)
        assert found[number].graph == alone.graph
        assert found[number].parameters == alone.parameters


def test_no_full_collection_of_garbage_comes_into_an_export():
    torch.manual_seed(THREADS)
    module, inputs = module_of(THREADS), torch.randn(10, 4)
    usual, before = gc.get_threshold(), gc.get_stats()[2]["collections"]
    gc.set_threshold(*usual[:2], 0)  # one is due at once, and always
    try:
        assert gc.get_threshold()[2] == 0
        curvd.export(module, inputs)
        during = gc.get_stats()[2]["collections"] - before
        assert gc.get_threshold() == (*usual[:2], 0)
    finally:
        gc.set_threshold(*usual)
    assert during == 0


def test_what_a_process_has_frozen_stays_frozen_after_an_export():
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        curvd.export(module_of(THREADS + 1), torch.randn(10, 4))
        assert gc.get_freeze_count() > 0.9 * frozen  # what died was freed
    finally:
        gc.unfreeze()


def test_exports_that_follow_one_another_do_not_put_full_collections_off_for_ever():
    usual, inputs = gc.get_threshold(), torch.randn(10, 4)
    gc.collect()
    gc.set_threshold(50, 1, 10)  # many younger collections in each export
    try:
        for number in range(2, 2 + THREADS):
            curvd.export(module_of(THREADS + number), inputs)
        assert gc.get_count()[2] > 10  # the next is due
    finally:
        gc.set_threshold(*usual)


def test_an_export_beside_a_build_of_a_server_leaves_the_usual_thresholds():
    usual = gc.get_threshold()
    building, exporting = none_while_building(), full_collections.later()
    exporting.__enter__()
    building.__enter__()
    exporting.__exit__(None, None, None)
    assert gc.get_threshold() == usual
    exporting = full_collections.later()
    exporting.__enter__()
    building.__exit__(None, None, None)
    exporting.__exit__(None, None, None)
    assert gc.get_threshold() == usual
