"""``python -m curvd.cli``: the command line without its script."""

from curvd.cli import main

main()
