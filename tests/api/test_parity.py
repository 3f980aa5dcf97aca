"""The asyncio client has the names and signatures of the blocking one."""

import inspect

import pytest

import curvd
from curvd.remote import AsyncJacobian, AsyncOperatorSum, AsyncSubmatrix

PAIRS = [
    (curvd.Client, curvd.AsyncClient),
    (curvd.Session, curvd.AsyncSession),
    (curvd.RemoteOperator, curvd.AsyncOperator),
    (curvd.OperatorSum, AsyncOperatorSum),
    (curvd.Submatrix, AsyncSubmatrix),
    (curvd.Jacobian, AsyncJacobian),
]
ONLY_BLOCKING = {"to_scipy"}  # SciPy calls, and does not await
IN_MEMORY = {
    "adjoint",
    "dim",
    "inverse",
    "inverse_root",
    "loss_jacobian",
    "operator",
    "output_jacobian",
    "probe",
    "size",
    *curvd.OperatorKind,
}


def surface(kind):
    return {n: v for n, v in inspect.getmembers(kind) if not n.startswith("_")}


@pytest.mark.parametrize(("blocking", "asynchronous"), PAIRS)
def test_the_public_names_are_the_same(blocking, asynchronous):
    assert surface(blocking).keys() - ONLY_BLOCKING == surface(asynchronous).keys()


@pytest.mark.parametrize(("blocking", "asynchronous"), PAIRS)
def test_the_signatures_are_the_same(blocking, asynchronous):
    for name, method in surface(asynchronous).items():
        if inspect.isfunction(method):
            ours = inspect.signature(getattr(blocking, name)).parameters
            assert inspect.signature(method).parameters == ours, name


@pytest.mark.parametrize(("blocking", "asynchronous"), PAIRS)
def test_what_makes_a_call_is_awaited_and_nothing_else(blocking, asynchronous):
    for name, method in surface(asynchronous).items():
        if inspect.isfunction(method):
            awaited = inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(
                method
            )
            assert awaited == (name not in IN_MEMORY), name


def test_connect_is_the_same():
    ours = inspect.signature(curvd.connect).parameters
    assert inspect.signature(curvd.aio.connect).parameters == ours
