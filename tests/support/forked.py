"""Python programs in processes of their own that start at once.

`Forked` runs what ``python -c`` would run, in a fork of a process that has imported what
servers and workers import, which takes one of them three seconds of a core. A test whose
subject is a process as it starts, or what is in its environment, starts one itself.
"""

import multiprocessing
import os
import sys
import tempfile
from multiprocessing import forkserver

_CONTEXT = multiprocessing.get_context("forkserver")
_IMPORTED = (
    "curvd.cli.commands curvd_server.app curvd_server.fleet.worker torch._dynamo"
)
_CONTEXT.set_forkserver_preload(_IMPORTED.split())


def begin():
    """Start the process that programs are forked of, before a test sets its TMPDIR.

    It would lay its sockets and caches there, for all tests that follow.
    """
    forkserver.ensure_running()


class Forked:
    """A program that runs; its methods are those of `subprocess.Popen`.

    Args:
        program: Its source text.
        *words: What it finds in ``sys.argv[1:]``.
        stdin: What it reads; its input ends only with this process, or by `kill`.
        stderr: A file that its errors are appended to.
        environment: What it finds in ``os.environ``; None: the same as this process.
    """

    def __init__(self, program, *words, stdin=b"", stderr=os.devnull, environment=None):
        environment = dict(os.environ if environment is None else environment)
        there, here = _CONTEXT.Pipe(duplex=False)
        reader, writer = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(
            target=_run,
            args=(program, [*map(str, words)], there, writer, str(stderr), environment),
            daemon=True,
        )
        self._process.start()
        there.close()
        writer.close()
        os.write(here.fileno(), stdin)
        self._stdin = here
        self.stdout = os.fdopen(os.dup(reader.fileno()))
        """What it prints, as text."""
        reader.close()
        self.pid = self._process.pid

    def send_signal(self, number):
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self):
        """Say how it ended; None if it runs."""
        return self._process.exitcode

    def wait(self, timeout=300.0):
        """Wait until it has ended, and say how."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"runs after {timeout} s"
        return self._process.exitcode

    def terminate(self):
        """Ask it to end."""
        self._process.terminate()

    def kill(self):
        """End it, if it runs, and whatever connects this process with it."""
        self._process.kill()
        self.wait()
        self._stdin.close()
        self.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.kill()


def _run(program, words, stdin, stdout, stderr, environment):
    """Be the program."""
    with open(stderr, "ab") as errors:
        for number, file in enumerate((stdin, stdout, errors)):
            os.dup2(file.fileno(), number)
    stdin.close()
    stdout.close()
    sys.stdin = open(0)  # multiprocessing has put another one there
    os.environ.clear()
    os.environ.update(environment)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # or `curvd serve` begins anew
    tempfile.tempdir = None  # the environment may name another one
    sys.argv = ["-c", *words]
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
