"""Where tests compute: on the CPU, on a stand-in that is not it, on CUDA if it is there.

A test or a class marked `everywhere` runs at each; what is made with `here` is there.
`make gpu-test` picks what runs on CUDA, and `make standin-test` what runs on the stand-in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

STANDIN = pytest.param("standin", marks=pytest.mark.standin)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
PLACES, OTHERS = ["cpu", STANDIN, CUDA], [STANDIN, CUDA]
_here = "cpu"


def here() -> str:
    """The device that the running test is about."""
    return _here


def everywhere(test: Any) -> Any:
    """Run a test, or those of a class, on every device."""
    test = pytest.mark.usefixtures("place")(test)
    return pytest.mark.parametrize("place", PLACES, indirect=True)(test)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Register the stand-in if a test wants it, before any test runs.

    torch counts devices at the first backward pass of a process, and takes none in later.
    """
    if any(item.get_closest_marker("standin") for item in items):
        import support.standin  # noqa: F401


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device, while a test runs."""
    global _here
    torch = pytest.importorskip("torch")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    _here = request.param
    yield _here
    _here = "cpu"
