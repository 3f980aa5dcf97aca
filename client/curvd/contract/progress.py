"""How far something is that takes long: an opening, a query, what goes on at a server."""

from __future__ import annotations

from dataclasses import dataclass

from curvd.contract.enums import Stage, Work


def left_s(done: int, total: int | None, elapsed_s: float) -> float | None:
    """Say how long the rest takes at most, at the pace so far.

    Args:
        done: How much is done.
        total: How much there is at most; None: nobody knows.
        elapsed_s: Seconds that it has taken.

    Returns:
        Seconds; None if nothing tells.
    """
    if not total or not done:
        return None
    return elapsed_s * max(0, total - done) / done


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProgress:
    """How far one stage of an opening is, or of other work that takes long.

    Examples:
        >>> progress = curvd.StageProgress(stage="tuning", done=2, total=8, elapsed_s=3.0)
        >>> print(progress)
        tuning, 2 of 8
        >>> progress.left_s
        9.0
    """

    stage: Stage
    detail: str = ""
    """What it is about right now, for people."""
    done: int = 0
    total: int | None = None
    """How much there is at most; None: nobody knows."""
    elapsed_s: float = 0.0
    """Since this stage, with this detail, began."""

    @property
    def left_s(self) -> float | None:
        """Seconds that remain at most, at the pace so far; None if nothing tells."""
        return left_s(self.done, self.total, self.elapsed_s)

    def __str__(self) -> str:
        what = f"{self.stage} {self.detail}".rstrip()
        if self.total is None:
            return f"{what}, {self.done}" if self.done else what
        unit = " bytes" if self.stage is Stage.REGISTERING else ""
        return f"{what}, {self.done} of {self.total}{unit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryProgress:
    """Where a running query is.

    Examples:
        >>> print(
        ...     curvd.QueryProgress(
        ...         iteration=3, products=4, estimates=(1.4,), residuals=(0.01,), elapsed_s=0.2
        ...     )
        ... )
        4 products, estimates 1.4, errors 1.0e-02
    """

    iteration: int
    products: int
    estimates: tuple[float, ...]
    """What is known of the result: eigenvalues, or the one number asked for."""
    residuals: tuple[float, ...]
    """Residual norms or standard errors that belong to the estimates."""
    elapsed_s: float
    total: int | None = None
    """Products at most; None if the query ends when it is good enough."""
    share: float | None = None
    """Share of the work that is done, as far as residuals tell; None if nothing tells."""

    @property
    def left_s(self) -> float | None:
        """Seconds that remain at most, at the pace so far; None if nothing tells."""
        if self.share is not None:
            return self.elapsed_s * (1 / self.share - 1) if self.share > 0 else None
        return left_s(self.products, self.total, self.elapsed_s)

    def __str__(self) -> str:
        of = "" if self.total is None else f" of {self.total}"
        parts = [f"{self.products}{of} products"]
        if self.share is not None:
            parts.append(f"{self.share:.0%} done")
        if self.estimates:
            parts.append("estimates " + " ".join(f"{x:.6g}" for x in self.estimates))
        if self.residuals:
            parts.append("errors " + " ".join(f"{x:.1e}" for x in self.residuals))
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """Something that goes on right now at a server, and takes long."""

    work: Work
    session_id: str
    """Empty while a session is created."""
    session_name: str
    """The caller's label of the session."""
    subject: str
    """The kind of the operator, or the name of the query; may be empty."""
    progress: StageProgress
    elapsed_s: float
    """Since it began."""
