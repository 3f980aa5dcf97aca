"""Checkpoints that lie under one folder of the server: safetensors, or of torch's own.

Read without torch, and without unpickling anything: `pickled` takes the opcodes of a pickle
for what they say about numbers and texts, and calls nothing. A client names a checkpoint; a
name leads nowhere but below the folder, links included.
"""

from __future__ import annotations

from curvd_server.storage.checkpoints.folder import Checkpoints
from curvd_server.storage.checkpoints.naming import chosen

__all__ = ["Checkpoints", "chosen"]
