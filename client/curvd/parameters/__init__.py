"""Parameters as training jobs hold them: copied between two steps, under plain names.

May import calls and tensors; knows no connection. torch is imported only where the
caller's values are torch's, so that the base install does without it.
"""

from __future__ import annotations

from curvd.parameters.copies import copied
from curvd.parameters.names import plain_names
from curvd.parameters.shards import Ranks, own_boxes, sharded
from curvd.parameters.steps import between_steps
from curvd.parameters.updates import Values
from curvd.parameters.wrappers import exportable, state_of

__all__ = [
    "Ranks",
    "Values",
    "between_steps",
    "copied",
    "exportable",
    "own_boxes",
    "plain_names",
    "sharded",
    "state_of",
]
