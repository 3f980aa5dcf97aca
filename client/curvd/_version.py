"""The version that pyproject.toml states, as installed."""

from importlib import metadata

try:
    VERSION = metadata.version("curvd")
except metadata.PackageNotFoundError:  # run from a source tree
    VERSION = "0+source"
