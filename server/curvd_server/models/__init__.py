"""What a specification of a model stands for: a builder's module, a library's, or a graph's.

Names come from lists that the server's operator wrote; nothing is unpickled. Imports torch,
graphs and the engine's objective; knows no session.
"""

from __future__ import annotations

from curvd_server.models.builders import BUILDERS
from curvd_server.models.resolve import Models
from curvd_server.models.trial import try_builder, try_graphs

__all__ = [
    "BUILDERS",
    "Models",
    "try_builder",
    "try_graphs",
]
