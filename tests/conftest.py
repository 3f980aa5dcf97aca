"""One real server for the tests that talk to one."""

import pytest


@pytest.fixture(scope="session")
def live_target(tmp_path_factory):
    """The address of a real server on loopback, with the zoo's builders."""
    pytest.importorskip("torch")
    from curvd_server.app import serve_in_thread
    from curvd_server.config import ServerConfig

    config = ServerConfig(
        listen="127.0.0.1:0",
        data_dir=tmp_path_factory.mktemp("data"),
        builders={"zoo": "server.zoo:build"},
    )
    with serve_in_thread(config) as target:
        yield target
