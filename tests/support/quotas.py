"""A server with callers who have quotas."""

import contextlib

import pytest
from support.fake_device import FakeDevice
from support.served import As, Channels

from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig
from curvd_server.transport import token_file

TOKENS = {name: token_file.new_token() for name in ("ann", "ben")}


def written(path, text):
    """A file that only its owner reads."""
    path.write_text(text)
    path.chmod(0o600)
    return path


@contextlib.contextmanager
def targeted(folder, quotas, device=None, **options):
    """Start a server with quotas; gives its target.

    Args:
        folder: Where its files are.
        quotas: The text of the file.
        device: What computes; None: a fake; "real": a CPU.
        **options: Further settings.
    """
    lines = [token_file.line_of(name, token) for name, token in TOKENS.items()]
    config = ServerConfig(
        listen="127.0.0.1:0",
        data_dir=folder / "data",
        drain_s=0.0,
        tokens=written(folder / "tokens", "\n".join(lines) + "\n"),
        quotas=written(folder / "quotas.toml", quotas),
        **options,
    )
    device = None if device == "real" else device or FakeDevice()
    with serve_in_thread(config, device=device) as target:
        yield target


@contextlib.contextmanager
def served(folder, quotas, device=None, **options):
    """Start a server with quotas; gives a channel for each caller by name."""
    with (
        targeted(folder, quotas, device, **options) as target,
        Channels(target) as channels,
    ):
        yield {name: As(channels, token) for name, token in TOKENS.items()}


def refused(kind, quota, limit, act):
    """What Ann is told."""
    with pytest.raises(
        kind, match=rf"'ann' has .* of {limit} {quota}.*\[callers.ann\]"
    ) as (caught):
        act()
    told = caught.value.metadata
    assert (told["quota"], told["owner"], told["limit"]) == (quota, "ann", str(limit))
    return caught.value
