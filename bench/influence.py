"""Influence of 64 test points on 1,500 digits, and error bars of predictions: how near, how dear.

    python bench/influence.py [--check]

The net is the mlp of solves_nets.py. The exact scores are dense, from torch.func: gradients
of single losses and an inverse of the Gauss-Newton matrix. Each contestant has a process of its
own: `served` is `session.influence`, asked of a server in that process over a socket; `ekfac` is
the same of `session.ekfac(fisher="empirical")`, whose systems are closed forms; `kronfluence`, if
it is installed, makes EKFAC scores of the same Fisher with the same damping. CPU seconds are of
the whole process, server and client, factors included and imports not; memory is the largest
resident set of the process, and what it was before the first score. Bytes are what the client's
connection received. With --check the exit status is 1 if a target is missed:

- each query's Spearman correlation of `served` with the dense answer is at least 0.999;
- scores of `ekfac` are those of kronfluence to 1e-6;
- what is received is at most the answer and 10 kB, of influence and of predictions;
- variances of predictions are those of a dense inverse to 1e-6;
- the products with a sketch, its own counted, are at most those without at the smallest
  damping.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from solves_nets import Trained, mlp
from torch import Tensor, nn
from torch.nn import functional as F

import curvd
from curvd._calls.query import QueryCall
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig

QUERIES = 64
DAMPINGS = (1e-2, 1e-3)
PRIOR = 1.0


class Received:
    """Counts the bytes of answers."""

    def __init__(self) -> None:
        self.nbytes = 0
        feed = QueryCall.feed

        def counted(call: QueryCall[Any], part: Any) -> Any:
            view = isinstance(part, memoryview)
            self.nbytes += part.nbytes if view else part.ByteSize()
            return feed(call, part)

        QueryCall.feed = counted  # type: ignore[method-assign]


def gradients(net: Trained, inputs: Tensor, targets: Tensor) -> Tensor:
    """Differentiate single losses by torch.func: [n, P]."""
    parameters = {n: p.detach() for n, p in net.net.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        z = torch.func.functional_call(net.net, parameters, (x[None],))
        return F.cross_entropy(z, y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    rows = each(parameters, inputs, targets)
    return torch.cat([row.flatten(1) for row in rows.values()], 1)


def rank_correlations(found: Any, exact: Any) -> Any:
    """Correlate ranks, query by query."""
    return np.array([
        spearmanr(a, b).statistic for a, b in zip(found, exact, strict=True)
    ])


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Measure CPU seconds."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def kronfluence_scores(net: Trained, damping: float) -> Any:
    """Compute EKFAC's scores of the empirical Fisher by the peer: [M, N]."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Digits(Task):
        def compute_train_loss(
            self, batch: Any, model: nn.Module, sample: bool = False
        ) -> Tensor:
            z = model(batch[0])
            y = (
                torch.distributions.Categorical(logits=z).sample()
                if sample
                else batch[1]
            )
            return F.cross_entropy(z, y, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    torch.manual_seed(0)
    task, data = Digits(), torch.utils.data.TensorDataset
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            analysis_name="digits",
            model=prepare_model(copy.deepcopy(net.net), task),
            task=task,
            cpu=True,
            disable_tqdm=True,
            output_dir=folder,
        )
        wide = torch.float64
        factors = FactorArguments(
            strategy="ekfac",
            use_empirical_fisher=True,
            activation_covariance_dtype=wide,
            gradient_covariance_dtype=wide,
            per_sample_gradient_dtype=wide,
            lambda_dtype=wide,
        )
        train = data(net.inputs, net.targets)
        analyzer.fit_all_factors("ekfac", train, 500, factor_args=factors)
        analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            query_dataset=data(net.test_inputs[:QUERIES], net.test_targets[:QUERIES]),
            train_dataset=train,
            per_device_query_batch_size=QUERIES,
            per_device_train_batch_size=500,
            score_args=ScoreArguments(
                damping_factor=damping,
                score_dtype=wide,
                per_sample_gradient_dtype=wide,
                precondition_dtype=wide,
            ),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"].numpy()


def report(what: str, figure: str, good: bool) -> bool:
    """Print a line; return whether the target is met."""
    print(f"{what:56} {figure:34} {'ok' if good else 'MISSED'}")
    return good


def resident_bytes() -> int:
    """Tell the largest resident set that this process had.

    That of getrusage would be its parent's, if that was larger when it began.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def contestant(name: str, folder: Path) -> None:
    """Make scores at each damping in this process, and write down what they took.

    Args:
        name: Whose.
        folder: Where to.
    """
    net, received = mlp(), Received()
    x, y = net.test_inputs[:QUERIES], net.test_targets[:QUERIES]
    took: dict[str, Any] = {}

    def note(damping: float, work: Callable[[], Any], **more: Any) -> Any:
        before = resident_bytes()
        seconds, found = timed(work)
        after = resident_bytes()
        took[f"{damping:g}"] = more | {"s": seconds, "before": before, "peak": after}
        return found

    if name == "kronfluence":
        import kronfluence  # noqa: F401 - importing is not what is measured

        for damping in DAMPINGS:
            scores = note(damping, lambda d=damping: kronfluence_scores(net, d))
            np.save(folder / f"{name}-{damping:g}.npy", scores)
    else:
        with served(net) as session:
            operator = session.ekfac(fisher="empirical") if name == "ekfac" else session
            if name == "served":
                session.influence((x, y), damping=1.0)  # builds the operator
            for damping in DAMPINGS:
                received.nbytes = 0
                found = note(
                    damping, lambda d=damping: operator.influence((x, y), damping=d)
                )
                over = received.nbytes - found.scores.nbytes
                took[f"{damping:g}"] |= {"over": over, "products": found.products}
                np.save(folder / f"{name}-{damping:g}.npy", found.scores)
    (folder / f"{name}.json").write_text(json.dumps(took))


@contextlib.contextmanager
def served(net: Trained) -> Iterator[curvd.Session]:
    """Serve a session of the net from this process."""
    with tempfile.TemporaryDirectory() as folder:
        config = ServerConfig(
            listen="127.0.0.1:0", data_dir=Path(folder), drain_s=0.0, threads=1
        )
        with serve_in_thread(config) as target, curvd.connect(target) as client:
            yield client.session_for(
                net.net, "cross_entropy", (net.inputs, net.targets), batch_size=500
            )


def contest(folder: Path) -> dict[str, dict[str, Any]]:
    """Have each contestant compute in a process of its own; by name, what it took."""
    found = {}
    for name in ("served", "ekfac", "kronfluence"):
        if name == "kronfluence" and find_spec(name) is None:
            print("kronfluence is not installed")
            continue
        command = [sys.executable, __file__, "--contestant", name, "--folder", folder]
        subprocess.run(list(map(str, command)), check=True)
        found[name] = json.loads((folder / f"{name}.json").read_text())
    return found


def influence(net: Trained, folder: Path) -> list[bool]:
    """Compare scores with the dense ones, at each damping."""
    x, y = net.test_inputs[:QUERIES], net.test_targets[:QUERIES]
    G, J, Q = net.ggn(), gradients(net, net.inputs, net.targets), gradients(net, x, y)
    passed, contestants = [], contest(folder)
    for damping in DAMPINGS:
        damped = G + damping * torch.eye(len(G), dtype=G.dtype)
        exact = (Q @ torch.linalg.solve(damped, J.T)).numpy()
        what, scores = f"influence at damping {damping:g}", {}
        for name, all_took in contestants.items():
            took = all_took[f"{damping:g}"]
            scores[name] = np.load(folder / f"{name}-{damping:g}.npy")
            ranks = rank_correlations(scores[name], exact)
            mib = [took[which] / 2**20 for which in ("peak", "before")]
            print(
                f"{what}: {name:12} Spearman {ranks.mean():.3f} (least {ranks.min():.5f}), "
                f"{took['s']:.2f} CPU s, peak {mib[0]:.0f} MiB ({mib[1]:.0f} before)"
            )
            if name == "served":
                figure = f"{ranks.min():.5f}, {took['products']} products"
                row = f"{what}: smallest Spearman"
                passed.append(report(row, figure, bool(ranks.min() >= 0.999)))
            if "over" in took:
                row, over = f"{what}: {name}, bytes beside the scores", took["over"]
                passed.append(report(row, f"{over}", over <= 10_000))
        if "kronfluence" in scores:
            gap = np.linalg.norm(scores["ekfac"] - scores["kronfluence"])
            gap /= np.linalg.norm(scores["kronfluence"])
            row = f"{what}: ekfac is kronfluence's"
            passed.append(report(row, f"{gap:.1e}", bool(gap <= 1e-6)))
    return passed


def sketched(session: curvd.Session, net: Trained) -> bool:
    """Count the products of few queries with and without a sketch."""
    x, y = net.test_inputs[:4], net.test_targets[:4]
    damping = DAMPINGS[-1]
    plain = session.influence((x, y), damping=damping, tolerance=1e-6)
    sketch = session.sketch("top", damping=damping, columns=4)
    found = session.influence(
        (x, y), damping=damping, tolerance=1e-6, preconditioner="top"
    )
    ours = sketch.products + found.products
    figure = f"{ours} with, {plain.products} without"
    return report("4 queries with a sketch: products", figure, ours <= plain.products)


def predictions(session: curvd.Session, net: Trained, received: Received) -> list[bool]:
    """Compare variances of predictions with those of a dense inverse."""
    x, theta = net.test_inputs[:16], net.theta
    A = len(net.inputs) * net.ggn() + PRIOR * torch.eye(len(theta), dtype=theta.dtype)
    rows = torch.func.vmap(torch.func.jacrev(net._outputs), (None, 0))
    J = rows(theta, x)
    exact = torch.einsum("tcp,tcp->tc", J, torch.linalg.solve(A, J.mT).mT).numpy()
    received.nbytes = 0
    seconds, found = timed(
        lambda: session.predictive(x.numpy(), prior=PRIOR, tolerance=1e-7)
    )
    gap = float(np.max(np.abs(found.variance - exact) / exact))
    over = received.nbytes - found.mean.nbytes - found.variance.nbytes
    print(f"predictions of 16 points: {seconds:.2f} CPU s, {found.products} products")
    return [
        report("variances: largest relative error", f"{gap:.1e}", gap <= 1e-6),
        report("variances: bytes beside them", f"{over}", over <= 10_000),
    ]


def main() -> int:
    """Print all rows; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail below a target")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.contestant:
        contestant(asked.contestant, asked.folder)
        return 0
    net = mlp()
    with tempfile.TemporaryDirectory() as folder:
        passed = influence(net, Path(folder))
    received = Received()
    with served(net) as session:
        passed.append(sketched(session, net))
        passed += predictions(session, net, received)
    return int(asked.check and not all(passed))


if __name__ == "__main__":
    sys.exit(main())
