"""Half an hour of a team on one server, and whether what it holds stays the same.

`make soak`: four callers with tokens and quotas open and close sessions, multiply, ask
queries, update, upload, store and delete, give up products and uploads in the middle, are in
a hurry, go beyond their quotas, and come with wrong credentials (`support/team.py`). All
numbers are compared with NumPy's. Meanwhile it is looked at what the server's process, its
children, its data directory and the clients' process hold. Prints one table; exits with 1 if
a number is wrong, an error is none that a user may see, something is left when all is
deleted, or something grows faster than its limit (`LIMITS`).

Beside floods, and with a server that is killed: `make storm-server`.
"""

import argparse
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from support import team
from support.flatness import Watch, held

import curvd
from curvd.tensors import trim_allocator, tune_allocator
from curvd_server.transport import token_file

NAMES = ("alice", "bob", "carol", "olga")
OPERATOR = "olga"
WARM_S = 300.0
"""Caches fill, libraries are loaded, plans are learned."""
PERIOD_S = 60.0
"""The least of each counts: what malloc keeps goes back once a minute."""
TRIM_S = 30.0
"""How often the clients' process gives back what malloc keeps, as the server does."""
LIMITS = {
    "server, MB": 40.0,
    "its children, MB": 40.0,
    "descriptors": 8.0,
    "threads": 4.0,
    "children": 2.0,
    "data directory, MB": 20.0,
    "clients, MB": 40.0,
}
"""How much each may grow in an hour."""
PATIENCE_S = 90.0
"""Until what was given up is gone when all have left."""
MOST_DESCRIPTORS = 8
"""What may be open when all have left that was not when nobody had come."""
SCRAPE_S = 5.0


@contextlib.contextmanager
def serving(folder, tokens, place):
    """A server in a process of its own: its target, and its process."""
    lines = [
        token_file.line_of(name, token)
        + (" roles=operator" if name == OPERATOR else "")
        + (" expires=2020-01-01T00:00:00Z" if name == "expired" else "")
        for name, token in tokens.items()
    ]
    for name, text in (
        ("tokens", "\n".join(lines) + "\n"),
        ("quotas.toml", team.QUOTAS),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
    code = "from curvd.cli.commands import main; main()"
    command = [sys.executable, "-c", code, "serve", "--listen", "127.0.0.1:0"]
    command += ["--data-dir", folder / "data", "--metrics", place]
    command += ["--tokens", folder / "tokens", "--quotas", folder / "quotas.toml"]
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    try:
        yield process.stdout.readline().decode().split()[-1], process
    finally:
        process.terminate()
        process.wait(90)


def scrape(place):
    """All samples as Prometheus reads them: by name and labels."""
    with urllib.request.urlopen(f"http://{place}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def left_behind(target, token, process, folder, before):
    """What is still held when everybody has left; nothing, if all is well."""
    end_s, found = time.monotonic() + PATIENCE_S, {}
    while time.monotonic() < end_s:
        with curvd.connect(target, token=token) as client:
            status = client.server_info().status
            found = {
                "sessions": len(client.sessions()),
                "calls under way": status.calls_under_way - 1,  # this one
                "requests in the queue": status.queue_requests,
                "columns under way": status.queue_columns,
                "blobs": len(list((folder / "data/blobs").glob("*"))),
            }
        descriptors = held(process.pid, folder / "data")["descriptors"]
        if descriptors > before + MOST_DESCRIPTORS:
            found["descriptors"] = descriptors
        found = {what: count for what, count in found.items() if count}
        if not found:
            return found
        time.sleep(1.0)
    return found


def uncounted(place, people):
    """What the server's metrics have counted less of than was done; nothing, if well."""
    found = scrape(place)
    done = sum((person.done for person in people), Counter())
    counted = {
        "products": found["curvd_products_total",],
        "Unauthenticated: nobody's token": found.get(
            ("curvd_dropped_total", "unauthenticated"), 0.0
        ),
    }
    return {what: n for what, n in counted.items() if n < done[what]}


def scraping(place, until, scraped):
    """Scrape as Prometheus does, until the end; count how that went."""
    while not until():
        try:
            scrape(place)
            scraped["answered"] += 1
        except OSError as error:  # the event loop had no processor for 5 s
            scraped[str(error)] += 1
        time.sleep(SCRAPE_S)


def trimming(until):
    """Give back what malloc keeps, until the end.

    Four callers take turns in the holes of its heap: it grows for half an hour while what is
    in use stays the same. A program of one's own decides about that, as `curvd serve` does.
    """
    while not until():
        trim_allocator()
        time.sleep(TRIM_S)


def free_place():
    """A place that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def done_table(people):
    """Lines of a table: what each has done."""
    whats = sorted(set().union(*(person.done for person in people)))
    names = [person.name for person in people]
    return [
        f"| done | {' | '.join(names)} |",
        "| --- |" + " --- |" * len(names),
        *(
            f"| {what} | {' | '.join(str(person.done[what]) for person in people)} |"
            for what in whats
        ),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--log", help="where the server's log is copied to")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server ends with us
    logging.getLogger("curvd").setLevel(logging.ERROR)  # not each retry
    tune_allocator()
    tokens = {name: token_file.new_token() for name in (*NAMES, "expired")}
    strangers = [tokens["expired"], token_file.new_token()]
    others, scraped, place = {}, Counter(), free_place()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serving(folder, tokens, place) as (target, process):
            until = team.over_at(time.monotonic() + 60 * options.minutes)
            people = [
                team.Person(
                    target, who, tokens[who], strangers, others, until, who == OPERATOR
                )
                for who in NAMES
            ]
            acts = [person.run for person in people]
            acts.append(lambda: scraping(place, until, scraped))
            acts.append(lambda: trimming(until))
            threads = [threading.Thread(target=act, daemon=True) for act in acts]
            before = held(process.pid, folder / "data")["descriptors"]
            with Watch(process.pid, folder / "data") as watch:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            left = left_behind(target, tokens[OPERATOR], process, folder, before)
            less = uncounted(place, people)
        log = (folder / "log").read_text()
        if options.log:
            Path(options.log).write_text(log)
    defects = log.count('"event": "defect"') + log.count("never retrieved")
    wrong = sum((person.wrong for person in people), Counter())
    lines, missed = watch.table(WARM_S, PERIOD_S, LIMITS)
    load = ", ".join(f"{number:.0f}" for number in os.getloadavg())
    print(
        f"{options.minutes:g} minutes, the first {WARM_S:g} s not counted; load {load}"
    )
    print("\n".join([*lines, "", *done_table(people)]))
    print(f"scrapes: {dict(scraped)}")
    print(f"wrong: {dict(wrong)}; defects: {defects}; left: {left}; uncounted: {less}")
    print("grew too fast, or not known:", ", ".join(missed) or "nothing")
    return int(bool(wrong or defects or left or less or missed))


if __name__ == "__main__":
    raise SystemExit(main())
