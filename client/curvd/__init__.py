"""curvd: remote curvature queries on neural networks."""
