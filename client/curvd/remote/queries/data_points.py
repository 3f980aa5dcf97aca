"""What a session's data points are like, one by one: the queries and their results."""

from __future__ import annotations

from curvd._calls import Queries
from curvd.contract import SessionInfo

__all__ = ["DataPointQueries"]


class DataPointQueries:
    """Queries about data points; a base of `curvd.Session`."""

    _info: SessionInfo

    @property
    def _queries(self) -> Queries:
        return Queries(self._info)
