"""The curvd server: holds sessions and multiplies curvature operators onto vectors."""
