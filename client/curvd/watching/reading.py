"""What was found at one step of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Reading:
    """Metrics of one snapshot, all at one parameter version.

    Examples:
        >>> found = curvd.Reading(
        ...     step=40, version=3, values={"loss": 0.5, "trace": 7.0}, errors={"trace": 0.1}
        ... )
        >>> found
        <Reading of step 40: loss 0.5, trace 7 ± 0.1; version 3, 0 skipped>
        >>> found["trace"]
        7.0
        >>> found.to_dict()["trace_error"]
        0.1
    """

    step: int
    """How many steps the training had made."""
    version: int
    """Parameter version of the session that the snapshot became."""
    parameters_digest: str = ""
    """SHA-256 over the parameters of this version."""
    values: Mapping[str, float]
    """By the metric's name; those that failed are not there."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Of the values that are estimates: half of an interval of 95 %, or a residual."""
    skipped: int = 0
    """Snapshots since the last reading that were due and found no room or no server."""
    delay_s: float = 0.0
    """From the snapshot until all of it was known."""

    def __getitem__(self, metric: str) -> float:
        return self.values[metric]

    def to_dict(self) -> dict[str, Any]:
        """Lay it out as a row: what a table, a logger or JSON takes.

        Returns:
            Step and version, then each value, beside its error if it has one.
        """
        row: dict[str, Any] = {"step": self.step, "version": self.version}
        for name, value in self.values.items():
            row[name] = value
            if name in self.errors:
                row[f"{name}_error"] = self.errors[name]
        return {**row, "skipped": self.skipped, "delay_s": self.delay_s}

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{name} {value:.6g}"
            + (f" ± {self.errors[name]:.2g}" if name in self.errors else "")
            for name, value in self.values.items()
        )
        return (
            f"<Reading of step {self.step}: {shown}; version {self.version}, "
            f"{self.skipped} skipped>"
        )
