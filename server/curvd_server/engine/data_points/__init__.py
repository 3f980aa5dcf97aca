"""Queries about data points, a file each: derivatives of single losses, and what is made of them.

Imports the objective and the shape of queries; knows no operator and no network.
"""

from __future__ import annotations

from curvd_server.engine.data_points.points import Points

__all__ = ["Points"]
