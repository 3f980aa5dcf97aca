"""Memory that was freed goes back to the system."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from curvd.tensors import trim_allocator

BLOCK_BYTES, BLOCKS = 64 << 10, 1024


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_what_was_freed_below_a_block_in_use_is_given_back():
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [libc.malloc(BLOCK_BYTES) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(ctypes.c_void_p(block), 1, BLOCK_BYTES)
    for block in blocks[:-1]:
        libc.free(block)
    before = resident_bytes()
    assert trim_allocator()
    assert before - resident_bytes() > BLOCKS * BLOCK_BYTES // 2
    libc.free(blocks[-1])


LARGE_BLOCKS = """
import ctypes, os
from pathlib import Path
from curvd.tensors import exact_allocator

def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")

libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
size = 24 << 20
with exact_allocator():
    with exact_allocator():
        pass
    blocks = [libc.malloc(size), libc.malloc(size)]
    for block in blocks:
        ctypes.memset(ctypes.c_void_p(block), 1, size)
    before = resident_bytes()
    libc.free(blocks[0])
    print((before - resident_bytes()) / size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_large_blocks_are_given_back_at_once_while_it_is_exact():
    """Also those below a block in use, and until the last of several contexts ends.

    In a process of its own: where much of the heap is free, blocks come from there.
    """
    code = [sys.executable, "-c", LARGE_BLOCKS]
    done = subprocess.run(code, capture_output=True, text=True, check=True, timeout=300)
    assert float(done.stdout) > 0.75
