"""``curvd eigs``, ``trace``, ``norm``, ``logdet``, ``density``: queries by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from curvd.cli.options import connection_options
from curvd.config import ClientConfig
from curvd.contract import Estimator, OperatorKind, OperatorSpec, Which
from curvd.remote import RemoteOperator, connect
from curvd.results import Density, Eigenpairs, Estimate

F = TypeVar("F", bound=Callable[..., Any])
ReadConfig = Callable[..., ClientConfig]


def add_to(group: click.Group, read_config: ReadConfig) -> None:
    """Add the commands to a group.

    Args:
        group: The command line.
        read_config: Makes a configuration of the connection's options.
    """

    @group.command()
    @_query_options
    @click.option("-k", type=int, default=10, show_default=True, help="How many.")
    @_choice("--which", Which, "Which end of the spectrum.")
    @click.option("--tolerance", type=float, default=1e-6, show_default=True)
    def eigs(
        picture: Path | None, k: int, which: str, tolerance: float, **options: Any
    ) -> None:
        """Compute extremal eigenvalues of a session's operator."""
        with _operator(read_config, **options) as operator:
            found = operator.eigsh(
                k, which=which, tolerance=tolerance, vectors=False, progress=True
            )
        for value, residual in zip(found.values, found.residuals, strict=True):
            click.echo(f"{value: .9e}   residual {residual:.1e}")
        _finish(found, picture)

    @group.command()
    @_query_options
    @_choice("--estimator", Estimator, "The method.", Estimator.EXCHANGEABLE)
    @click.option("--relative-error", type=float, default=0.01, show_default=True)
    @click.option("--samples", type=int, default=300, help="Products at most.")
    def trace(picture: Path | None, **options: Any) -> None:
        """Estimate the trace of a session's operator."""
        names = ("estimator", "relative_error", "samples")
        settings = {name: options.pop(name) for name in names}
        with _operator(read_config, **options) as operator:
            found = operator.trace(progress=True, **settings)
        _tell(found, picture)

    @group.command()
    @_query_options
    @click.option("--relative-error", type=float, default=0.01, show_default=True)
    @click.option("--samples", type=int, default=300, help="Products at most.")
    def norm(picture: Path | None, **options: Any) -> None:
        """Estimate the Frobenius norm of a session's operator."""
        settings = {name: options.pop(name) for name in ("relative_error", "samples")}
        with _operator(read_config, **options) as operator:
            found = operator.frobenius_norm(progress=True, **settings)
        _tell(found, picture)

    @group.command()
    @_query_options
    @click.option("--relative-error", type=float, default=0.01, show_default=True)
    @click.option("--probes", type=int, default=30, show_default=True, help="At most.")
    @click.option("--steps", type=int, default=32, show_default=True)
    def logdet(picture: Path | None, **options: Any) -> None:
        """Estimate the log-determinant of a session's operator, with its --damping."""
        names = ("relative_error", "probes", "steps")
        settings = {name: options.pop(name) for name in names}
        with _operator(read_config, **options) as operator:
            found = operator.logdet(progress=True, **settings)
        if math.isnan(found.value):
            click.echo(f"not positive definite: a Ritz value is {found.smallest:.6e}")
        _tell(found, picture)

    @group.command()
    @_query_options
    @click.option("--probes", type=int, default=8, show_default=True)
    @click.option("--steps", type=int, default=64, show_default=True)
    @click.option("--log", "logarithmic", is_flag=True, help="Logarithmic axis.")
    def density(picture: Path | None, **options: Any) -> None:
        """Estimate the spectral density of a session's operator."""
        names = ("probes", "steps", "logarithmic")
        settings = {name: options.pop(name) for name in names}
        with _operator(read_config, **options) as operator:
            found = operator.spectral_density(progress=True, **settings)
        click.echo(
            f"Ritz values from {found.nodes.min():.6e} to {found.nodes.max():.6e}"
        )
        _finish(found, picture)


def _query_options(command: F) -> F:
    for decorate in (
        click.option(
            "--plot",
            "picture",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Draw the result into this file.",
        ),
        click.option(
            "--damping", type=float, default=0.0, help="Added to the diagonal."
        ),
        _choice("--operator", OperatorKind, "Which operator."),
        connection_options,
        click.argument("session"),
    ):
        command = decorate(command)
    return command


def _choice(
    name: str, kind: Any, help_text: str, default: Any = None
) -> Callable[[F], F]:
    values = [member.value for member in kind]
    return click.option(
        name,
        type=click.Choice(values),
        default=(default or next(iter(kind))).value,
        show_default=True,
        help=help_text,
    )


@contextlib.contextmanager
def _operator(
    read_config: ReadConfig,
    *,
    session: str,
    target: str,
    operator: str,
    damping: float,
    **connection: Any,
) -> Iterator[RemoteOperator]:
    # A query takes as long as it takes; Ctrl-C stops it on the server, too.
    config = dataclasses.replace(read_config(**connection), deadline_s=None)
    spec = OperatorSpec(kind=OperatorKind(operator), damping=damping)
    try:
        with connect(target, config=config) as client:
            yield client.session(session).operator(spec)
    except KeyboardInterrupt as stopped:
        for note in getattr(stopped, "__notes__", ()):
            click.echo(note, err=True)
        raise


def _tell(found: Estimate, picture: Path | None) -> None:
    low, high = found.interval
    click.echo(f"{found.value:.6e}   95 % interval [{low:.6e}, {high:.6e}]")
    _finish(found, picture)


def _finish(found: Eigenpairs | Estimate | Density, picture: Path | None) -> None:
    click.echo(
        f"{found.info.stopped}: {found.products} products in "
        f"{found.info.elapsed_s:.2f} s at version {found.version}"
    )
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        axes = found.plot()
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.savefig(picture, dpi=150)
        click.echo(f"picture: {picture}")
