"""What Prometheus reads is what was done: scraped over its port, read by its own parser."""

import asyncio
import http.client
import re
from pathlib import Path

import numpy as np
import pytest
import raw
from prometheus_client.parser import text_string_to_metric_families
from support.fake_device import FakeDevice, worker
from support.served import Channels, stub

from curvd.contract.rpcs import RPCS
from curvd.errors import InvalidSpec, SessionNotFound, Unauthenticated
from curvd_server.app import running
from curvd_server.config import ServerConfig
from curvd_server.service import metrics

DOCUMENT = Path(__file__).parents[2] / "docs/server.md"
V = raw.file_of({"v": np.ones(5)})


def scraped(place):
    """The samples of a scrape: value by name and labels."""
    connection = http.client.HTTPConnection(place, timeout=300)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        assert answer.status == 200
        text = answer.read().decode()
    finally:
        connection.close()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def observed(tmp_path, **options):
    config = {"listen": "127.0.0.1:0", "drain_s": 0.0, "data_dir": tmp_path}
    return ServerConfig(**config, metrics="127.0.0.1:0", **options)


async def seen_after(tmp_path, use, *, device=None, **options):
    """What a scrape tells after `use` has called a server."""
    device = device or FakeDevice()
    async with running(observed(tmp_path, **options), device=device) as server:

        def work():
            with Channels(server.target) as channel:
                use(channel)
                return scraped(server.metrics)

        return await asyncio.to_thread(work)


async def test_a_scrape_counts_what_was_done(tmp_path):
    def use(channel):
        session = raw.fake_session(channel)
        for columns in (1, 3):
            data = raw.file_of({"v": np.ones((columns, 5))})
            raw.call(channel, "MatMat", raw.product("MatMat", session.id, data))
        raw.call(channel, "MatVec", raw.product("MatVec", session.id, V))
        for _ in range(2):
            with pytest.raises(SessionNotFound):
                raw.call(channel, "MatVec", raw.product("MatVec", "none", V))

    found = await seen_after(tmp_path, use)
    calls = {key[1:]: n for key, n in found.items() if key[0] == "curvd_calls_total"}
    assert calls == {
        (("code", code), ("rpc", rpc)): n
        for rpc, code, n in [
            ("RegisterModel", "OK", 1),
            ("RegisterDataset", "OK", 1),
            ("CreateSession", "OK", 1),
            ("MatMat", "OK", 2),
            ("MatVec", "OK", 1),
            ("MatVec", "NOT_FOUND", 2),
        ]
    }
    assert found[("curvd_products_total",)] == 3
    assert found[("curvd_columns_total",)] == 1 + 3 + 1
    assert found[("curvd_sessions", ("state", "ready"))] == 1
    assert found[("curvd_operators", ("tier", "final"))] == 1
    assert found[("curvd_operators", ("tier", "native"))] == 0
    assert found[("curvd_device_size_bytes", ("device", "fake"))] == 1 << 40
    assert found[("curvd_queue_requests",)] == found[("curvd_calls_under_way",)] == 0
    # The test's own channels are grpcio's, which the port passes on.
    assert found[("curvd_connections", ("carrier", "grpcio"))] >= 1


async def test_workers_are_told_by_rank(tmp_path):
    device = FakeDevice()
    lost = worker(1, ready=False, restarts=3, host="", lost="its connection ended")
    device.known_workers = (worker(0), lost)
    found = await seen_after(tmp_path, lambda channel: None, device=device)
    told = {key: n for key, n in found.items() if key[0].startswith("curvd_worker_")}
    first, second = ("rank", "0"), ("rank", "1")
    assert told == {
        ("curvd_worker_info", ("device", "fake:0"), ("host", "here"), first): 1,
        ("curvd_worker_info", ("device", "fake:1"), ("host", ""), second): 1,
        ("curvd_worker_ready", first): 1,
        ("curvd_worker_ready", second): 0,
        ("curvd_worker_shards", first): 2,
        ("curvd_worker_shards", second): 2,
        ("curvd_worker_restarts_total", first): 0,
        ("curvd_worker_restarts_total", second): 3,
        ("curvd_worker_generation",): 5,
    }


async def test_without_workers_none_is_told(tmp_path):
    found = await seen_after(tmp_path, lambda channel: None)
    told = {key[0] for key in found if key[0].startswith("curvd_worker_")}
    assert told == {"curvd_worker_generation"}


async def test_the_buckets_of_a_method_hold_all_its_calls(tmp_path):
    def use(channel):
        session = raw.fake_session(channel)
        for _ in range(5):
            raw.call(channel, "MatVec", raw.product("MatVec", session.id, V))

    found = await seen_after(tmp_path, use)
    buckets = [
        n
        for key, n in found.items()
        if key[0] == "curvd_call_seconds_bucket" and ("rpc", "MatVec") in key
    ]
    assert buckets == sorted(buckets)
    assert buckets[-1] == found[("curvd_call_seconds_count", ("rpc", "MatVec"))] == 5
    assert found[("curvd_call_seconds_sum", ("rpc", "MatVec"))] > 0


async def test_a_scrape_shows_what_waits_and_waits_for_no_device(tmp_path):
    device = FakeDevice()
    async with running(observed(tmp_path), device=device) as server:

        def work():
            with Channels(server.target) as channel:
                session = raw.fake_session(channel)
                (operator,) = device.operators
                operator.gate.clear()
                answers = stub(channel, "MatVec")(
                    iter(raw.product("MatVec", session.id, V)), timeout=300
                )
                assert operator.started.wait(300)
                during = scraped(server.metrics)
                operator.gate.set()
                list(answers)
                return during

        found = await asyncio.to_thread(work)
    assert found[("curvd_calls_under_way",)] == 1
    assert found[("curvd_queue_columns",)] == 1
    assert found[("curvd_queue_bytes",)] > 0
    held = ("curvd_memory_bytes", ("kind", "calls under way"))
    assert found[held] == found[("curvd_queue_bytes",)]
    assert found[("curvd_session_calls",)] == 1
    assert found[("curvd_products_total",)] == 0


async def test_labels_are_words_of_ours_and_nothing_secret_is_told(tmp_path):
    secret = "s3cr3t"

    def use(channel):
        right = [("authorization", f"Bearer {secret}")]
        info = RPCS["GetServerInfo"].request.message()
        raw.call(channel, "GetServerInfo", info, metadata=right)
        for name in ("intruder", "wrong"):
            with pytest.raises(Unauthenticated):
                raw.call(
                    channel,
                    "GetServerInfo",
                    info,
                    metadata=[("authorization", f"Bearer {name}")],
                )

    found = await seen_after(tmp_path, use, token=secret)
    assert found[("curvd_dropped_total", ("reason", "unauthenticated"))] == 2
    told = " ".join(f"{key}" for key in found)
    assert not any(word in told for word in (secret, "intruder", "wrong", "127.0.0.1"))
    rpcs = {value for key in found for label, value in key[1:] if label == "rpc"}
    assert rpcs <= RPCS.keys()


async def test_without_the_setting_nobody_may_scrape(tmp_path):
    config = ServerConfig(listen="127.0.0.1:0", drain_s=0.0, data_dir=tmp_path)
    async with running(config, device=FakeDevice()) as server:
        assert server.metrics == ""


async def test_an_address_that_is_taken_is_named(tmp_path):
    async with running(observed(tmp_path / "a"), device=FakeDevice()) as server:
        config = ServerConfig(
            listen="127.0.0.1:0", data_dir=tmp_path / "b", metrics=server.metrics
        )
        with pytest.raises(InvalidSpec, match=f"metrics {server.metrics}: Address"):
            async with running(config, device=FakeDevice()):
                pass


def test_metrics_need_an_address_of_tcp():
    with pytest.raises(
        InvalidSpec, match=r"metrics must be host:port or \[ipv6\]:port"
    ):
        ServerConfig(metrics="unix:/run/metrics")


def test_the_documents_list_every_metric():
    """`python -c "from curvd_server.service import metrics; print(metrics.table())"`
    prints the table."""
    shown = re.search(
        r"<!-- metrics -->\n(.*?)\n<!-- end -->", DOCUMENT.read_text(), re.S
    )
    assert shown is not None
    assert shown[1].strip() == metrics.table()


async def test_every_metric_of_the_table_can_be_scraped(tmp_path):
    device = FakeDevice()
    device.known_workers = (worker(0),)
    found = await seen_after(tmp_path, raw.fake_session, device=device)
    names = {key[0] for key in found}
    for metric in metrics.METRICS:
        if metric.name != "curvd_dropped":  # nothing was
            suffix = "_bucket" if metric.kind == "histogram" else ""
            assert f"{metric.exposed}{suffix}" in names
