"""The process that makes native code is limited in what it may take."""

from __future__ import annotations

import subprocess
import sys

from curvd_server.engine.program.native import child


def test_a_child_is_limited_by_what_it_computes_not_by_the_wall():
    """The limit holds for compilers that it starts, too."""
    code = (
        "import subprocess; from curvd_server.engine.program.native import child as c\n"
        "try: c.main('/no/such/program', '', '0')\n"
        "except OSError: pass\n"
        "subprocess.run(['sh', '-c', 'ulimit -t'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(child.CPU_S)]
