"""Asks the composed Prometheus what the composed server did, panel by panel.

`images_observe.py SERVER PROMETHEUS`: does work whose extent is known, so that each panel of
the dashboard has something to show, then puts every question of every panel to Prometheus,
through its HTTP API, and compares what it counted with what was done.
"""

import contextlib
import json
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import psutil

import curvd

ROOT = Path(__file__).parent.parent
BOARD = json.loads((ROOT / "observe/grafana/dashboards/curvd.json").read_text())
PANELS = {
    panel["title"]: [target["expr"] for target in panel["targets"]]
    for panel in BOARD["panels"]
}
PATIENCE_S = 180.0
SCRAPED_S = 5
"""As often as observe/prometheus.yml says."""
VECTORS, COLUMNS, PAUSE_S = 200, 24, 0.1
SHAPE = (64, 12)


class Prometheus:
    """Its HTTP API, at host:port."""

    def __init__(self, place):
        self.url = f"http://{place}/api/v1/"

    def ask(self, what, **arguments):
        """What it answers; an error if the question is not understood."""
        url = f"{self.url}{what}?{urllib.parse.urlencode(arguments)}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            said = json.load(answer)
        assert said["status"] == "success", said
        return said["data"]

    def number(self, question):
        """The sum of the latest values; 0 if there are none."""
        found = self.ask("query", query=question)["result"]
        return sum(float(each["value"][1]) for each in found)

    def over(self, question, begin_s, end_s, step_s=SCRAPED_S):
        """All series of an answer over time: a list of times and values."""
        question = question.replace("$__rate_interval", f"{4 * SCRAPED_S}s")
        found = self.ask(
            "query_range", query=question, start=begin_s, end=end_s, step=step_s
        )
        return [
            [(at, float(value)) for at, value in each["values"]]
            for each in found["result"]
        ]


def wait_until(holds, what):
    """Wait for Prometheus' next look."""
    end_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s:
        with contextlib.suppress(OSError):
            if holds():
                return
        threading.Event().wait(1.0)
    raise AssertionError(f"after {PATIENCE_S:g} s, {what}")


def work(client, target):
    """Do what each panel shows; return how many products, columns and failures."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(SHAPE)
    state = {"1.weight": rng.standard_normal((1, SHAPE[1])), "1.bias": np.zeros(1)}
    model = client.register_model("mlp", {"widths": [SHAPE[1], 1]}, state)
    data = client.register_dataset(
        {"x": x, "y": rng.standard_normal((SHAPE[0], 1))},
        inputs=["x"],
        target="y",
        batch_size=SHAPE[0],
    )
    session = client.create_session(model, data, loss="mse", dtype="F64")
    operator = session.hessian()
    wide = np.hstack([x, np.ones((SHAPE[0], 1))])
    matrix = 2 * wide.T @ wide / SHAPE[0]
    failures = 0
    host, port = target.rsplit(":", 1)
    # Says half of what a client says first, and nothing more.
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"PRI * HTTP/2.0\r\n")
        for number in range(VECTORS):
            v = rng.standard_normal((SHAPE[1] + 1, COLUMNS if number % 10 == 0 else 1))
            assert np.allclose(operator @ v, matrix @ v, atol=1e-9)
            if number % 20 == 0:
                assert operator.eigsh(k=2).converged
                with contextlib.suppress(curvd.SessionNotFound):
                    client.session("00000000000000-00000000")
                    raise AssertionError("there is such a session")
                failures += 1
            threading.Event().wait(PAUSE_S)
        stranger.settimeout(60)
        with contextlib.suppress(ConnectionResetError):  # it is sent away, in the end
            assert stranger.recv(1 << 16) == b""
    matrices = VECTORS // 10
    return VECTORS, VECTORS - matrices + COLUMNS * matrices, failures


def check_counts(prometheus, client, before, done):
    """What the run adds to the counters is what the client did."""
    products, columns, failures = done

    def grown(name, question):
        return round(prometheus.number(question) - before[name])

    # The last scrape has everything.
    wait_until(
        lambda: grown("products", COUNTS["products"]) >= products,
        "Prometheus has not seen all products",
    )
    found = {name: grown(name, question) for name, question in COUNTS.items()}
    assert found["products"] == products, (found, products)
    assert found["columns"] == columns, (found, columns)
    assert found["failures"] == failures, (found, failures)
    status = client.server_info().status
    assert prometheus.number(COUNTS["products"]) == status.products
    assert prometheus.number(COUNTS["query columns"]) == status.query_columns
    assert prometheus.number('curvd_sessions{state="ready"}') == status.ready_sessions
    host_bytes = psutil.virtual_memory().total
    assert prometheus.number("curvd_device_size_bytes") == host_bytes
    print(f"Prometheus counted what the client did: {found}")


COUNTS = {
    "products": "curvd_products_total",
    "columns": "curvd_columns_total",
    "query columns": "curvd_query_columns_total",
    "failures": 'curvd_calls_total{code="NOT_FOUND"}',
}


def check_panels(prometheus, begin_s, end_s, done):
    """Every question of every panel has an answer, and the main ones the right one."""
    answers = {}
    for title, questions in PANELS.items():
        for question in questions:
            series = prometheus.over(question, begin_s, end_s)
            if "curvd_worker_" in question:
                continue  # it is understood; this server computes by itself
            points = [value for each in series for _, value in each]
            assert points, f"{title}: nothing answers {question}"
            finite = [value for value in points if value == value]
            assert finite, f"{title}: no number answers {question}"
            answers[question] = series
            print(
                f"{title}: {question}: {len(series)} series, "
                f"{min(finite):.4g} to {max(finite):.4g}"
            )
    rates = answers["rate(curvd_products_total[$__rate_interval])"]
    area = sum(value * SCRAPED_S for each in rates for _, value in each)
    print(f"the area under the panel of products is {area:.0f}, done were {done[0]}")
    # A rate is extrapolated to the edges of its window.
    assert 0.75 * done[0] < area < 1.25 * done[0]


def check_configuration(prometheus):
    """What runs is what docker-compose.yml says, and it has found the server."""
    flags = prometheus.ask("status/flags")
    assert flags["storage.tsdb.retention.time"] == "15d"
    assert flags["storage.tsdb.path"] == "/prometheus"
    (target,) = prometheus.ask("targets")["activeTargets"]
    assert (target["health"], target["labels"]["job"]) == ("up", "curvd"), target
    version = prometheus.ask("status/buildinfo")["version"]
    print(f"Prometheus {version} scrapes {target['scrapeUrl']}")


def main(target, place):
    prometheus = Prometheus(place)
    wait_until(
        lambda: prometheus.number('up{job="curvd"}') == 1, "the server is not scraped"
    )
    check_configuration(prometheus)
    patient = curvd.ClientConfig(retry=curvd.RetryConfig(give_up_s=PATIENCE_S))
    with curvd.connect(target, config=patient) as client:
        status = client.server_info().status
        wait_until(
            lambda: prometheus.number(COUNTS["products"]) == status.products,
            "Prometheus does not know what was done before",
        )
        before = {name: prometheus.number(asked) for name, asked in COUNTS.items()}
        begin_s = time.time()
        done = work(client, target)
        check_counts(prometheus, client, before, done)
        threading.Event().wait(4 * SCRAPED_S)  # until the last rate is zero again
        check_panels(prometheus, begin_s, time.time(), done)
        for session in client.sessions():
            client.session(session.id).delete()


if __name__ == "__main__":
    main(*sys.argv[1:])
