"""Code that runs as somebody, without a server."""

import contextlib

from curvd_server.system import CALLING


@contextlib.contextmanager
def calls_as(identity):
    """Run what is inside as a caller."""
    token = CALLING.set(identity)
    try:
        yield
    finally:
        CALLING.reset(token)
