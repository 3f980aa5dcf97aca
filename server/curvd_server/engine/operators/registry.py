"""Every operator by its kind: the file beside this one that has the kind's name.

Those with Kronecker factors are linearised nowhere; they are `engine.kronecker`'s.
"""

from __future__ import annotations

import importlib

from curvd.contract import OperatorKind
from curvd_server.engine.operators.protocol import Definition

_DEFINITIONS: dict[OperatorKind, Definition] = {
    kind: importlib.import_module(f"{__package__}.{kind}").DEFINITION
    for kind in OperatorKind
    if not kind.is_factored
}
LINEARISED = tuple(_DEFINITIONS)
"""The kinds that have a linearisation at a mini-batch."""


def definition(kind: OperatorKind) -> Definition:
    """Find what an operator says about itself.

    Args:
        kind: Which operator.

    Returns:
        Its definition.
    """
    return _DEFINITIONS[kind]
