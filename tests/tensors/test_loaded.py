"""A library that another thread imports is waited for, and none is imported."""

import sys
import threading

from curvd.tensors import loaded

SOURCE = """\
import threading
begun, go_on = threading.Event(), threading.Event()
begun.set()
assert go_on.wait(300)
late = 1
"""


def test_what_nobody_imported_is_not_there():
    assert loaded("a_library_that_is_not_there") is None
    assert "a_library_that_is_not_there" not in sys.modules
    assert loaded("threading") is threading


def test_what_another_thread_imports_is_waited_for(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    importing = threading.Thread(target=__import__, args=("slow_to_import",))
    importing.start()
    while "slow_to_import" not in sys.modules or not hasattr(
        sys.modules["slow_to_import"], "go_on"
    ):
        pass
    half = sys.modules["slow_to_import"]
    assert half.begun.wait(300)
    found = []
    asking = threading.Thread(
        target=lambda: found.append(loaded("slow_to_import").late)
    )
    asking.start()
    half.go_on.set()
    asking.join(300)
    importing.join(300)
    assert found == [1]


def test_what_says_that_it_cannot_be_imported_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert loaded("torch") is None
