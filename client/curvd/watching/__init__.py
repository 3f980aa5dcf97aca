"""Curvature beside a training that does not wait for it.

`watch` follows a module: it copies the parameters on the training thread, between two steps,
and sends, asks and writes on a thread of its own. Imports what any user of a session sees;
torch only where something is copied. The callbacks for trainers of other libraries are modules
of their own, because each needs its library.
"""

from __future__ import annotations

from curvd.watching.reading import Reading
from curvd.watching.watch import Watch, watch

__all__ = ["Reading", "Watch", "watch"]
