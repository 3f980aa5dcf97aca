"""Influence of 64 test points on 1,500 digits, and error bars of predictions: how near, how dear.

    python bench/influence.py [--check]

The net is the mlp of solves_nets.py. The exact scores are dense, from torch.func: gradients
of single losses and an inverse of the Gauss-Newton matrix. `served` is `session.influence`,
asked of a server in this process over a socket; `kronfluence`, if it is installed, its EKFAC
scores with the same damping. CPU seconds are of the whole process, server and client; bytes
are what the client's connection received. With --check the exit status is 1 if a target is
missed:

- each query's Spearman correlation with the dense answer is at least 0.999;
- what is received is at most the answer and 10 kB, of influence and of predictions;
- variances of predictions are those of a dense inverse to 1e-6;
- the products with a sketch, its own counted, are at most those without at the smallest
  damping.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
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
    """Compute EKFAC's scores by the peer: [M, N]; None if it is not installed."""
    try:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task
    except ImportError:
        return None

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
            model=prepare_model(net.net, task),
            task=task,
            cpu=True,
            disable_tqdm=True,
            output_dir=folder,
        )
        wide = torch.float64
        factors = FactorArguments(
            strategy="ekfac",
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


def influence(session: curvd.Session, net: Trained, received: Received) -> list[bool]:
    """Compare scores with the dense ones, at each damping."""
    x, y = net.test_inputs[:QUERIES], net.test_targets[:QUERIES]
    G, J, Q = net.ggn(), gradients(net, net.inputs, net.targets), gradients(net, x, y)
    passed = []
    session.influence((x, y), damping=1.0)  # builds the operator
    for damping in DAMPINGS:
        damped = G + damping * torch.eye(len(G), dtype=G.dtype)
        exact = (Q @ torch.linalg.solve(damped, J.T)).numpy()
        received.nbytes = 0
        seconds, found = timed(lambda d=damping: session.influence((x, y), damping=d))
        ranks = rank_correlations(found.scores, exact)
        what = f"influence at damping {damping:g}"
        passed.append(
            report(
                f"{what}: smallest Spearman",
                f"{ranks.min():.5f}, {found.products} products",
                bool(ranks.min() >= 0.999),
            )
        )
        over = received.nbytes - found.scores.nbytes
        passed.append(
            report(f"{what}: bytes beside the scores", f"{over}", over <= 10_000)
        )
        print(f"{what}: {seconds:.2f} CPU s")
        theirs, scores = timed(lambda d=damping: kronfluence_scores(net, d))
        if scores is None:
            print("kronfluence is not installed")
            continue
        ranks = rank_correlations(scores, exact)
        print(
            f"kronfluence (EKFAC) at damping {damping:g}: mean Spearman "
            f"{ranks.mean():.3f}, {theirs:.2f} CPU s"
        )
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
    check = parser.parse_args().check
    torch.set_num_threads(1)
    net, received = mlp(), Received()
    with tempfile.TemporaryDirectory() as folder:
        config = ServerConfig(
            listen="127.0.0.1:0", data_dir=Path(folder), drain_s=0.0, threads=1
        )
        with serve_in_thread(config) as target, curvd.connect(target) as client:
            session = client.session_for(
                net.net, "cross_entropy", (net.inputs, net.targets), batch_size=500
            )
            passed = influence(session, net, received)
            passed.append(sketched(session, net))
            passed += predictions(session, net, received)
    return int(check and not all(passed))


if __name__ == "__main__":
    sys.exit(main())
