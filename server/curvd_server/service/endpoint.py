"""Serving the services at an address: who has the port, and how it is given back."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from curvd.contract import RPCS
from curvd.errors import InvalidSpec
from curvd_server.config import MESSAGE_BYTES, ServerConfig
from curvd_server.service.handlers import generic_handlers
from curvd_server.storage import private_folder
from curvd_server.system import Quotas, logs
from curvd_server.transport import (
    AccessLog,
    Callers,
    Calls,
    Drops,
    Front,
    Gate,
    StallGuard,
    Tally,
    TokenInterceptor,
    cleared,
    target_of,
)

if TYPE_CHECKING:  # of an extra, which few have
    from curvd_server.transport.tracing import Tracing

_GOODBYE_S = 0.5
"""Seconds for statuses that are on their way to the client."""
_WAITING_CALLS = 512
"""Calls of clients that are not ours that wait for the event loop."""
_SERVICES = sorted({rpc.service for rpc in RPCS.values()})


@contextlib.asynccontextmanager
async def serving(
    config: ServerConfig,
    services: list[object],
    callers: Callers,
    quotas: Quotas,
    tally: Tally,
    tracing: Tracing | None = None,
) -> AsyncIterator[str]:
    """Serve the services with health and reflection; drain at the end.

    Clients of ours are served by the front itself, all others by grpcio behind it;
    everybody by grpcio, if the configuration says so.

    Args:
        config: Address, encryption, token and limits.
        services: Objects with a method for each RPC.
        callers: Those who may call.
        quotas: How many calls each may make at once.
        tally: Counts calls and connections.
        tracing: Makes spans of calls; None: nobody does.

    Yields:
        The target for clients on this machine.

    Raises:
        InvalidSpec: If the address cannot be had.
    """
    drops = Drops()
    tally.dropped = drops.counts
    access = AccessLog(config.log_calls)
    gate = Gate(callers, drops, quotas, tally, access, tracing)
    stalls = StallGuard(config.connections.stall_s, drops)
    interceptors = interceptors_of(callers, drops)
    server = grpc.aio.server(interceptors=interceptors, options=_grpc_options(config))
    calls = Calls(interceptors, MESSAGE_BYTES, stalls)
    reporter = health.aio.HealthServicer()
    for end in (calls, server):
        end.add_generic_rpc_handlers(generic_handlers(services, gate, stalls))
        health_pb2_grpc.add_HealthServicer_to_server(reporter, end)
    names = (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    port = _direct if config.transport == "direct" else _grpcio_alone
    async with port(config, server, calls, drops, tally) as target:
        for name in ("", *_SERVICES):
            await reporter.set(name, health_pb2.HealthCheckResponse.SERVING)
        log = logs.logger()
        log.info("serving", target=target, device=config.device)
        try:
            yield target
        finally:
            log.info("draining", grace_s=config.drain_s)
            await reporter.enter_graceful_shutdown()
            await gate.drain(config.drain_s)
    log.info("stopped", dropped=dict(drops.counts))


def _grpc_options(config: ServerConfig) -> list[tuple[str, int]]:
    """Spell the options of the gRPC server, the only place that does.

    Args:
        config: Its limits of connections.

    Returns:
        Name and value of each.
    """
    return [
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        # The pair of ClientConfig.keepalive_s: clients may ping every 30 s.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.max_concurrent_streams", config.connections.streams),
        ("grpc.max_metadata_size", config.connections.header_bytes),
        ("grpc.absolute_max_metadata_size", config.connections.header_bytes),
        (
            "grpc.max_connection_idle_ms",
            round(1e3 * config.connections.idle_connection_s),
        ),
        (
            "grpc.server_handshake_timeout_ms",
            round(1e3 * config.connections.greeting_s),
        ),
        # A call that waits here holds 0.7 MB of headers, if it is meant to.
        ("grpc.server.max_pending_requests", _WAITING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", _WAITING_CALLS),
        ("grpc.http2.max_frame_size", (1 << 24) - 1),
        ("grpc.http2.lookahead_bytes", 16 << 20),
    ]


def interceptors_of(callers: Callers, drops: Drops) -> list[grpc.aio.ServerInterceptor]:
    """Name what every call passes through, whoever carries it.

    Args:
        callers: Those who may call.
        drops: Told of others.

    Returns:
        The interceptors, the outermost first.
    """
    return [TokenInterceptor(callers, drops)] if callers.asks else []


@contextlib.asynccontextmanager
async def _direct(
    config: ServerConfig,
    server: grpc.aio.Server,
    calls: Calls,
    drops: Drops,
    tally: Tally,
) -> AsyncIterator[str]:
    """Listen at the port ourselves, with grpcio behind it on a Unix socket."""
    context = config.tls_context()
    with private_folder(config.data_dir) as folder:
        backend = f"{folder}/grpc"
        _add_port(config, server, f"unix:{backend}")
        front = Front(calls.begin, backend, context, config.connections, drops)
        tally.connections = lambda: front.usage
        async with front.listening(config.listen) as target:
            await server.start()
            try:
                yield target
            finally:
                # Not with all of the grace: whoever watches the health would use it up.
                await asyncio.gather(server.stop(_GOODBYE_S), front.stop(_GOODBYE_S))
                drops.summarise()


@contextlib.asynccontextmanager
async def _grpcio_alone(
    config: ServerConfig,
    server: grpc.aio.Server,
    calls: Calls,
    drops: Drops,
    tally: Tally,
) -> AsyncIterator[str]:
    """Let grpcio have the port; nothing of HTTP/2 is ours then."""
    listen, mask = config.listen, os.umask(0o177)  # a socket is as local as its mode
    try:
        port = _add_port(config, server, listen)
    except RuntimeError as error:
        msg = (
            f"cannot listen on {listen}: the address is taken, or not of this machine "
            f"({error})"
        )
        raise InvalidSpec(msg, listen=listen) from error
    finally:
        os.umask(mask)
    await server.start()
    try:
        yield target_of(listen, port)
    finally:
        await server.stop(_GOODBYE_S)
        cleared(listen)


def _add_port(config: ServerConfig, server: grpc.aio.Server, listen: str) -> int:
    credentials = config.credentials()
    if credentials is None:
        return server.add_insecure_port(listen)
    return server.add_secure_port(listen, credentials)
