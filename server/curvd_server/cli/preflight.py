"""What can be judged of a configuration before torch is imported, which takes seconds.

`ServerConfig` has judged values and what they are to each other. Here files are read,
addresses and the data directory are taken and given back, and packages are looked for,
so that who mistyped an option is told at once. Nothing is kept: the server reads and
takes all of it again when it starts, because it may have changed since.

What torch alone knows is judged after it: whether it has a device, and whether a
builder's module can be imported.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import Mapping

from curvd.errors import InvalidSpec, install
from curvd_server.config import ServerConfig, check_libraries
from curvd_server.storage import owned
from curvd_server.system import Quotas
from curvd_server.transport import bound, cleared


def check(config: ServerConfig) -> None:
    """Refuse a configuration with which no server can start.

    Args:
        config: Everything about the server.

    Raises:
        InvalidSpec: If a file cannot be used, an address cannot be had, or a package that
            an option needs is not installed.
        FailedPrecondition: If another server uses the data directory, or others may write
            to it.
    """
    config.callers()
    config.tls_context()
    Quotas(config.quotas)
    check_libraries(config.libraries)
    _check_builders(config.builders)
    if config.traces:
        config.tracing("")
    if config.ray and importlib.util.find_spec("ray") is None:
        msg = f"ray={config.ray!r} needs Ray, which is not installed: {install('ray')}"
        raise InvalidSpec(msg, ray=config.ray)
    with owned(config.data_dir):
        asyncio.run(_check_addresses(config))


def _check_builders(entries: Mapping[str, str]) -> None:
    """Refuse builders of packages that are not there; importing them is for later."""
    for name, entry in entries.items():
        package = entry.partition(":")[0].partition(".")[0]
        try:
            found = importlib.util.find_spec(package)
        except ValueError:  # `python -c` and tests have modules without a file
            continue
        if found is None:
            msg = (
                f"builder {name!r}: cannot load {entry!r}: there is no module {package!r} on "
                "the server's path: install it, or name its folder in PYTHONPATH"
            )
            raise InvalidSpec(msg, builder=name, entry=entry)


async def _check_addresses(config: ServerConfig) -> None:
    """Take the addresses, all at once, and give them back."""
    with contextlib.ExitStack() as stack:
        for setting, address in _addresses(config).items():
            for sock in await bound(address, setting):
                stack.enter_context(sock)
            stack.callback(cleared, address)


def _addresses(config: ServerConfig) -> dict[str, str]:
    found = {"": config.listen}
    if config.metrics:
        found["metrics"] = config.metrics
    if config.ray:
        host = config.worker_listen
        found["worker_listen"] = f"[{host}]:0" if ":" in host else f"{host}:0"
    return found
