"""Running a straight program so that each result leaves as soon as it is there.

A function returns all its results at once, and holds them until then: of a product
that is as much memory as the result. Handed out one by one, they need none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx


def emitted(
    graph: fx.Graph, arguments: Sequence[Any], names: Sequence[int]
) -> Iterator[tuple[int, Tensor | None]]:
    """Run a graph of calls, node by node, as its module's ``forward`` would.

    Args:
        graph: Placeholders, then calls, then a tuple of results; some may be None.
        arguments: One per placeholder.
        names: What to call each result.

    Yields:
        Name and value of each result, as they are computed. Whatever nobody reads any
        more is freed, also what was yielded: do not hold it when the next one is made.
    """
    *nodes, output = graph.nodes
    results: Any = output.args[0]
    values: dict[fx.Node, Any] = {}
    readers = {node: len(node.users) for node in nodes}
    given = iter(arguments)
    places = defaultdict[Any, list[int]](list)
    for place, result in enumerate(results):
        places[result].append(place)
    yield from ((names[place], None) for place in places[None])
    for node in nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
            del args, kwargs
        for place in places[node]:
            yield names[place], values[node]
        for read in node.all_input_nodes:
            readers[read] -= 1
        # Users are counted once each, and the output, if it is one, has its value now.
        readers[node] -= output in node.users
        for done in (node, *node.all_input_nodes):
            if not readers[done]:
                values.pop(done, None)
