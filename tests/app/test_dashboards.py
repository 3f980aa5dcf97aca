"""The dashboard asks for metrics that there are, and a Prometheus answers it."""

import contextlib
import copy
import itertools
import json
import re
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
import raw
import yaml
from grafana_foundation_sdk.cog import encoder, plugins
from support.fake_device import FakeDevice, worker
from support.served import Channels

from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig
from curvd_server.service import metrics

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "observe/grafana"
BOARD = json.loads((GRAFANA / "dashboards/curvd.json").read_text())
QUESTIONS = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
LABELS = {
    name: {*metric.labels, "le"}
    for metric in metrics.METRICS
    for name in (metric.exposed, f"{metric.exposed}_bucket")
}


def read(path):
    return yaml.safe_load((ROOT / path).read_text())


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_names_metrics_and_labels_that_there_are(question):
    names = re.findall(r"curvd_\w+", question)
    assert names or "process_" in question
    for name in names:
        assert name in LABELS, name
    grouped = re.findall(r"by \(([^)]*)\)", question)
    for label in {label.strip() for group in grouped for label in group.split(",")}:
        assert all(label in LABELS[name] for name in names), label


def test_every_metric_but_the_build_is_on_the_dashboard():
    asked = " ".join(QUESTIONS)
    shown = {m.name for m in metrics.METRICS if re.search(rf"\b{m.name}", asked)}
    missing = {m.name for m in metrics.METRICS} - shown
    assert missing == {"curvd_build_info", "curvd_worker_info", "curvd_runs",
                       "curvd_requests_given_up", "curvd_queue_bytes"}  # fmt: skip


def unknown(ours, theirs, path=""):
    """What of a value is not, or is otherwise, in the other one: paths."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in ours:
            yield from unknown(ours[key], theirs.get(key), f"{path}/{key}")
    elif isinstance(ours, list) and isinstance(theirs, list):
        for number, (a, b) in enumerate(itertools.zip_longest(ours, theirs)):
            yield from unknown(a, b, f"{path}/{number}")
    elif ours != theirs:
        yield path


def as_grafana_reads(board):
    """Read by Grafana's own models, and written again by them."""
    with warnings.catch_warnings():  # that there is a newer kind of dashboard, too
        warnings.simplefilter("ignore", DeprecationWarning)
        plugins.register_default_plugins()
        from grafana_foundation_sdk.models.dashboard import Dashboard
    return json.loads(encoder.JSONEncoder().encode(Dashboard.from_json(board)))


def test_grafanas_models_know_everything_that_the_dashboard_says():
    assert list(unknown(BOARD, as_grafana_reads(BOARD))) == []


@pytest.mark.parametrize(
    "path",
    [
        ("refreshh",),
        ("panels", 0, "gridPos", "width"),
        ("panels", 1, "fieldConfig", "defaults", "units"),
        ("panels", 2, "fieldConfig", "defaults", "custom", "fill"),
        ("panels", 3, "options", "legend", "display"),
        ("panels", 4, "targets", 0, "query"),
    ],
)
def test_a_word_that_grafana_does_not_know_is_found(path):
    board = copy.deepcopy(BOARD)
    place = board
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = "invented"
    named = "/" + "/".join(map(str, path))
    assert list(unknown(board, as_grafana_reads(board))) == [named]


def test_the_files_of_the_profile_fit_each_other():
    compose = read("docker-compose.yml")
    services = compose["services"]
    (job,) = read("observe/prometheus.yml")["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert set(found["names"]) <= services.keys()
    for name in found["names"]:
        default = re.search(r":-(.*)}", services[name]["environment"]["CURVD_METRICS"])
        assert default[1] == f"0.0.0.0:{found['port']}"
        assert not any(str(found["port"]) in port for port in services[name]["ports"])
    (source,) = read(GRAFANA / "provisioning/datasources/prometheus.yml")["datasources"]
    assert urllib.parse.urlparse(source["url"]).hostname in services
    panels = [p["datasource"] for p in BOARD["panels"]]
    assert {panel["uid"] for panel in panels} == {source["uid"]}
    (provider,) = read(GRAFANA / "provisioning/dashboards/curvd.yml")["providers"]
    mounts = [volume.split(":") for volume in services["grafana"]["volumes"]]
    assert provider["options"]["path"] in [mount[1] for mount in mounts]
    for name in ("prometheus", "grafana"):
        assert services[name]["profiles"] == ["observe"]
        for place, *_ in (volume.split(":") for volume in services[name]["volumes"]):
            assert place in compose["volumes"] or (ROOT / place).exists()


@contextlib.contextmanager
def prometheus(folder, place):
    """A Prometheus that scrapes one place ten times a second; yields how to ask it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own = f"127.0.0.1:{free.getsockname()[1]}"
    config = {
        "global": {"scrape_interval": "100ms", "scrape_timeout": "100ms"},
        "scrape_configs": [
            {"job_name": "curvd", "static_configs": [{"targets": [place]}]}
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address={own}",
        ],
        stderr=subprocess.DEVNULL,
    )

    def ask(question):
        query = urllib.parse.urlencode({"query": question})
        with contextlib.suppress(OSError):
            url = f"http://{own}/api/v1/query?{query}"
            with urllib.request.urlopen(url, timeout=300) as answer:
                return json.load(answer)["data"]["result"]
        assert process.poll() is None, "Prometheus has ended"
        return []

    try:
        yield ask
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="Prometheus is not installed"
)
def test_a_prometheus_answers_every_panel_with_what_was_done(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    config = ServerConfig(
        listen="127.0.0.1:0", data_dir=tmp_path / "data", metrics=place
    )
    done, device = 0, FakeDevice()
    device.known_workers = (worker(0), worker(1, restarts=1))
    with (
        serve_in_thread(config, device=device) as target,
        Channels(target) as channel,
        prometheus(tmp_path, place) as ask,
    ):
        session = raw.fake_session(channel)
        product = raw.product("MatVec", session.id, raw.file_of({"v": np.ones(5)}))
        waiting = {
            question.replace("$__rate_interval", "10s")
            for question in QUESTIONS
            # Nothing fails, and nothing is dropped.
            if "code!=" not in question and "dropped" not in question
        }
        while waiting:  # products go on, so that rates have something to count
            raw.call(channel, "MatVec", product)
            done += 1
            waiting = {question for question in waiting if not ask(question)}
        expected = {
            "curvd_products_total": str(done),
            'curvd_calls_total{rpc="MatVec", code="OK"}': str(done),
            'curvd_sessions{state="ready"}': "1",
        }
        found = {}
        # The next scrape has the last one; after one that failed there is no answer.
        while found != expected:
            found = {
                question: each["value"][1]
                for question in expected
                for each in ask(question)
            }
