"""Settings that queries of several families have."""

from __future__ import annotations

from typing import Any

from curvd.contract.settings import setting


def seed_setting(
    help: str = "Of the probes, see `curvd.tensors.random_probes`.",
) -> Any:
    """Declare the seed of what a query draws."""
    return setting(0, help, least=0, most=2**63 - 1)


def steps_setting(default: int, more: str = "") -> Any:
    """Declare how far Lanczos goes."""
    text = f"Lanczos steps per probe, each one product{more}."
    return setting(default, text, least=1, most=1000)
