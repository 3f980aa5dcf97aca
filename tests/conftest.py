"""One real server for the tests that talk to one."""

import gc
import os

# Tests multiply small matrices; several threads for each would wait for one another
# far longer than they compute. Set before NumPy or torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest

pytest_plugins = [
    "support.client_fixtures",
    "support.disks",
    "support.places",
    "support.server_fixtures",
]


def pytest_collection_finish():
    """Look for garbage more rarely, and not in what was imported: it took a few percent."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 20)


@pytest.fixture(scope="session")
def live_target(tmp_path_factory):
    """The address of a real server on loopback, with the zoo's builders.

    With CURVD_TEST_DEVICES, for example ``cpu:0,cpu:1``, it has workers.
    """
    pytest.importorskip("torch")
    from curvd_server.app import serve_in_thread
    from curvd_server.config import ServerConfig

    config = ServerConfig(
        listen="127.0.0.1:0",
        data_dir=tmp_path_factory.mktemp("data"),
        builders={"zoo": "support.zoo:build"},
        devices=os.environ.get("CURVD_TEST_DEVICES", ""),
    )
    with serve_in_thread(config) as target:
        yield target
