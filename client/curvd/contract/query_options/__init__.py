"""Options of queries: a frozen dataclass for each, which says all that is known of them.

A field is a `setting` with its default, its bounds and its help. Made of that are the keyword
arguments of both clients' methods and their documentation (`curvd.remote.queries`), the
request (`curvd.contract.query_messages`), the flags of the command line
(`curvd.cli.query_commands`), what the server refuses (`curvd_server.storage.ranges`) and fills
in, and the table of docs/client.md. A field of a message has the name of the option, unless
`wire` says another; it lies in the request or in one of its parts (`Query`, `Accuracy`).

A file for each family, with its table `QUERIES`: `operators`, `laplace`, `data_points`.
"""

from __future__ import annotations

from collections.abc import Mapping

from curvd.contract.query_options import data_points, laplace, operators
from curvd.contract.query_spec import QueryOptions, QuerySpec

__all__ = ["QUERIES", "data_points", "laplace", "most_products", "operators"]

QUERIES: Mapping[str, QuerySpec] = {
    **operators.QUERIES,
    **laplace.QUERIES,
    **data_points.QUERIES,
}
"""By the name of the RPC."""


def most_products(rpc: str, options: QueryOptions, data_points: int) -> int | None:
    """Tell how many products a query makes at most, if its options say so.

    Args:
        rpc: The name of its method.
        options: What is asked for.
        data_points: N; queries about data points count these.

    Returns:
        The number; None if it ends when it is good enough.
    """
    known = [options.max_products]
    if QUERIES[rpc].of_session:
        known.append(data_points)
    else:
        known += [getattr(options, name, None) for name in ("samples", "rank")]
        probes, steps = getattr(options, "probes", 0), getattr(options, "steps", 0)
        if probes and steps:
            known.append(probes * steps)
    return min((n for n in known if n is not None), default=None)
