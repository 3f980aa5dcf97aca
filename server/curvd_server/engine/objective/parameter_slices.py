"""Flat vectors as one tensor per parameter, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from curvd.contract import ParameterLayout


def tangents_of(columns: Tensor, layout: ParameterLayout) -> list[Tensor]:
    """View flat vectors as one tensor per parameter.

    Args:
        columns: ``[..., P]``.
        layout: Where each parameter lies.

    Returns:
        Per parameter its shape behind the leading axes.
    """
    lead = columns.shape[:-1]
    return [
        columns[..., p.offset : p.offset + p.size].view((*lead, *p.shape))
        for p in layout.parameters
    ]


def add_rows(
    vectors: Tensor, layout: ParameterLayout, rows: Sequence[Tensor | None]
) -> None:
    """Add per-parameter tensors into flat vectors.

    Args:
        vectors: ``[..., P]``, written to.
        layout: Where each parameter lies.
        rows: One tensor per parameter, with the same leading axes; None adds nothing.
    """
    for place, row in zip(tangents_of(vectors, layout), rows, strict=True):
        if row is not None:
            place.add_(row)
