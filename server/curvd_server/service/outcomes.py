"""What is said about a result: where it is from, and what it took."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvd.contract import OperatorSpec, convert
from curvd.errors import Internal
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd_server.device import Done
from curvd_server.sessions import Lease

Columns = NDArray[Any]

_QUEUE_S, _COMPUTE_S = attrgetter("queue_s"), attrgetter("compute_s")
_RUN_COLUMNS = attrgetter("run_columns")


def scaled_and_damped(
    rows: Columns, columns: Columns, spec: OperatorSpec, out: Columns | None = None
) -> Columns:
    """Make ``scale * A v + damping * v`` of ``A v``.

    Args:
        rows: ``A v``: [K, P]
        columns: ``v``: [K, P]
        spec: Scale and damping.
        out: Memory for it, perhaps that of `columns`; None: fresh, if it is needed.

    Returns:
        [K, P]; `rows` itself if there is nothing to do.
    """
    if rows.shape != columns.shape or rows.dtype != columns.dtype:
        msg = f"a product {columns.dtype} {columns.shape} became {rows.dtype} {rows.shape}"
        raise Internal(msg)
    if not is_scaled_or_damped(spec):
        return rows
    out = np.multiply(columns, spec.damping, out=out)
    out += rows * spec.scale
    return out


def is_scaled_or_damped(spec: OperatorSpec) -> bool:
    """Tell whether `scaled_and_damped` has something to do."""
    return spec.scale != 1.0 or spec.damping != 0.0


def header_of(
    lease: Lease, *, plan: bool = False, loss: float | None = None
) -> curvature_pb.ResultHeader:
    """Say where a result comes from.

    Args:
        lease: The lease of its session.
        plan: Whether an operator computed it.
        loss: The objective; gradients only.

    Returns:
        The header.
    """
    info = lease.info
    report = lease.operator.report if plan and lease.operator else None
    return curvature_pb.ResultHeader(
        version=info.version,
        parameters_digest=info.parameters_digest,
        model_id=info.model_id,
        dataset_id=info.dataset_id,
        plan=None if report is None else convert.plan_to_proto(report),
        loss=loss,
    )


def summary_of(blocks: list[Done[Any]]) -> curvature_pb.ResultSummary:
    """Say what a result took.

    Args:
        blocks: Its column blocks.

    Returns:
        The summary.
    """
    return curvature_pb.ResultSummary(
        queue_s=sum(map(_QUEUE_S, blocks)),
        compute_s=sum(map(_COMPUTE_S, blocks)),
        runs=len(blocks),
        run_columns=sum(map(_RUN_COLUMNS, blocks)),
    )
