import gc
import threading

import numpy as np

from curvd.tensors.buffer_pool import Pool

MIB = 1 << 20


def address(buffer):
    return buffer.__array_interface__["data"][0]


def test_memory_comes_back_with_the_last_view_and_is_used_again():
    pool = Pool(8 * MIB)
    buffer = pool.take(4 * MIB)
    where = address(buffer)
    view = buffer.view(np.float32)[10:].reshape(2, -1)
    del buffer
    assert pool.idle_bytes == 0  # the view still needs it
    assert address(pool.take(4 * MIB)) != where
    del view
    gc.collect()
    assert pool.idle_bytes == 8 * MIB
    held = [pool.take(4 * MIB), pool.take(4 * MIB)]
    assert where in map(address, held)
    assert pool.idle_bytes == 0


def test_only_the_same_size_is_used_again_and_the_oldest_makes_room():
    pool = Pool(6 * MIB)
    for size in (2, 3, 4):
        pool.take(size * MIB)
    # 2 + 3 fit; 4 more do not, so the two oldest go.
    assert pool.idle_bytes == 4 * MIB
    assert len(pool.take(2 * MIB)) == 2 * MIB
    assert pool.idle_bytes == 6 * MIB


def test_a_cleared_pool_keeps_nothing():
    pool = Pool(8 * MIB)
    held = pool.take(2 * MIB)
    pool.take(2 * MIB)
    pool.clear()
    del held
    assert pool.idle_bytes == 0
    assert pool.take(2 * MIB).flags.writeable


def test_small_memory_is_none_of_its_business():
    pool = Pool(8 * MIB)
    pool.take(1000)
    assert pool.idle_bytes == 0


def test_threads_never_share_a_buffer():
    pool, wrong = Pool(8 * MIB), []

    def work(mark):
        for _ in range(200):
            buffer = pool.take(MIB)
            buffer[::4096] = mark
            if not (buffer[::4096] == mark).all():
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
