"""Threads that export at once get what each would get alone."""

import threading

import pytest

import curvd

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
