"""The script ``curvd``: an interrupt ends it without a word while it imports.

It is no part of the package, whose import takes most of the time until a command begins.
"""

import signal


def main() -> None:
    """Run the command line."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:  # else whoever started this process ignores interrupts, or handles them
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from curvd.cli import main as command

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command()


if __name__ == "__main__":
    main()
