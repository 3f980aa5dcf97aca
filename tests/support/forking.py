"""Programs that fork while they use a client; each prints what came of it as JSON.

``python -m support.forking SCENARIO TARGET TRANSPORT [CA [NUMBER…]]``, against a server of
`support.fake_service`, or any. The whole storm: ``… storm 127.0.0.1:50551 direct "" 6 10000``.
"""

import asyncio
import contextlib
import ctypes
import functools
import gc
import json
import multiprocessing
import os
import pickle
import select
import sys
import threading

import numpy as np

import curvd
from curvd._calls import curvature_requests

PATIENCE_S = 900
"""Who waits longer is taken for stuck; nobody waits so long otherwise."""


class Child:
    """Runs a function in a forked process; `result` is what it returned or raised."""

    def __init__(self, function, *args, fork=os.fork):
        self._pipe, end = os.pipe()
        self.pid = fork()
        if not self.pid:
            os.close(self._pipe)
            try:
                result = function(*args)
            except BaseException as error:
                result = f"{type(error).__name__}: {error}"
            os.write(end, pickle.dumps(result))
            os._exit(0)
        os.close(end)

    def result(self):
        data = b""
        while select.select([self._pipe], [], [], PATIENCE_S)[0]:
            piece = os.read(self._pipe, 1 << 16)
            if not piece:
                os.close(self._pipe)
                os.waitpid(self.pid, 0)
                return pickle.loads(data) if data else "died"
            data += piece
        return "still waiting"


def products(session, seed, count):
    """Multiply a vector of one's own; count the right products, or say what is wrong."""
    operator = session.hessian()
    v = np.random.default_rng(seed).standard_normal(session.layout.size)
    wanted = v @ rows_of(session)
    for number in range(count):
        if not np.allclose(operator @ v, wanted, rtol=1e-9, atol=1e-9):
            return f"another answer at {number}"
    return count


@functools.cache
def rows_of(session):
    """The whole matrix, asked for before anything forks."""
    return session.hessian() @ np.eye(session.layout.size)


def storm(session, client, children=6, count=300):
    products(session, 0, 3)
    running = [Child(products, session, k, int(count)) for k in range(int(children))]
    return [child.result() for child in running] + [products(session, 7, 3)]


def busy(session, client):
    """Four threads are within calls at every moment."""
    products(session, 0, 1)
    stop, wrong = threading.Event(), []

    def keep_calling(seed):
        while not stop.is_set():
            try:
                found = products(session, seed, 20)
            except curvd.CurvdError as error:
                found = repr(error)
            if found != 20:
                wrong.append(found)

    threads = [threading.Thread(target=keep_calling, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    found = [Child(products, session, k, 10).result() for k in range(12)]
    stop.set()
    for thread in threads:
        thread.join()
    return found + wrong


def within_a_call(session, client):
    """Parent and child both go on with a stream of columns that the parent began."""
    curvature_requests.SMALL_BYTES = -1
    wanted = rows_of(session)
    blocks = session.hessian().iter_matmat(np.eye(session.layout.size), columns=2)
    begun = [next(blocks), next(blocks)]

    def go_on():
        found = np.concatenate([*begun, *blocks], axis=1)
        return bool(np.allclose(found, wanted))

    return [Child(go_on).result(), go_on(), products(session, 0, 3)]


def callback(session, client):
    """An upload's progress forks; the child uses the client before the call goes on."""
    children = []

    def fork(done, total):
        if not children:
            children.append(Child(products, session, 1, 5))

    client.register_model("mlp", {"widths": [8]}, {"w": np.ones(1000)}, progress=fork)
    return [children[0].result(), products(session, 0, 3)]


def leaving(session, client):
    """Children leave by the parent's ``with`` blocks, and collect their garbage."""
    found = []
    with session:
        for _ in range(3):
            child = os.fork()
            if not child:
                with contextlib.suppress(BaseException):
                    session.__exit__(None, None, None)
                    client.__exit__(None, None, None)
                    gc.collect()
                os._exit(3)
            found.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            found.append(products(session, 0, 3))
    return found


def twice(session, client):
    products(session, 0, 3)
    grandchild = lambda: Child(products, session, 2, 5).result()  # noqa: E731
    used = lambda: (products(session, 1, 5), grandchild())  # noqa: E731
    return [Child(grandchild).result(), Child(used).result(), products(session, 0, 3)]


def from_c(session, client):
    """A fork that Python is not told of."""
    products(session, 0, 3)
    fork = ctypes.PyDLL(None).fork
    children = [Child(products, session, k, 20, fork=fork) for k in range(3)]
    return [child.result() for child in children] + [products(session, 0, 3)]


def threads(session, client):
    """Threads of a child find their connection at the same moment."""
    products(session, 0, 3)

    def many():
        found, start = [], threading.Barrier(8)

        def one(seed):
            start.wait()
            found.append(products(session, seed, 10))

        running = [threading.Thread(target=one, args=(k,)) for k in range(8)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        return found

    return Child(many).result()


def asyncio_too(session, client):
    """An asyncio client before and after the fork."""
    wanted = rows_of(session)
    inner = curvd.aio.connect(
        client._connection.target, config=client._connection._config
    )

    async def multiply(count):
        found = await inner.session(session.id)
        rows = [await (found.hessian() @ np.eye(len(wanted))) for _ in range(count)]
        return [bool(np.allclose(row, wanted)) for row in rows]

    loop = asyncio.new_event_loop()
    found = [loop.run_until_complete(multiply(2))]
    anew = [Child(lambda: asyncio.run(multiply(3))) for _ in range(3)]
    found += [child.result() for child in anew]
    found.append(Child(lambda: loop.run_until_complete(multiply(1))).result())
    found.append(loop.run_until_complete(multiply(2)))
    return found


def workers(session, client):
    """Workers of a data loader, which share a persistent client with each other."""
    import torch

    rows = rows_of(session)

    class Products(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return session.hessian() @ np.eye(len(rows))[index]

    loader = torch.utils.data.DataLoader(Products(), batch_size=4, num_workers=3)
    return [bool(np.allclose(np.concatenate(list(loader)), rows)) for _ in range(2)]


def unpickled(session, client, operator, results):
    seen = session.hessian() @ np.ones(session.layout.size)
    same = session._connection is client._connection is operator._connection
    seen_by_operator = operator @ np.ones(session.layout.size)
    results.put([client.healthy(), same, bool(np.allclose(seen, seen_by_operator))])


def spawned(session, client):
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    operator = session.hessian()
    products(session, 0, 3)
    child = context.Process(target=unpickled, args=(session, client, operator, results))
    child.start()
    found = results.get()
    child.join()
    return found


def proxied(session, client):
    """grpcio would go by a proxy; a forked child cannot."""
    products(session, 0, 3)
    os.environ["https_proxy"] = "http://proxy.example:3128"
    behind = Child(products, session, 0, 1).result()
    os.environ["no_proxy"] = "127.0.0.1"
    return [behind, Child(products, session, 0, 1).result()]


def opened(client):
    """A session that has the layout of the fakes, on any server."""
    rng = np.random.default_rng(0)
    state = {"1.weight": rng.normal(size=(3, 8)), "1.bias": np.zeros(3)}
    data = {"x": rng.normal(size=(96, 8)), "y": rng.integers(0, 3, 96)}
    return client.create_session(
        client.register_model("mlp", {"widths": [8, 3]}, state),
        client.register_dataset(data, inputs=["x"], target="y", batch_size=96),
        loss="cross_entropy",
        dtype="F64",
    )


def main(scenario, target, transport, ca="", *numbers):
    config = curvd.ClientConfig(transport=transport)
    with curvd.connect(target, config=config, tls=ca or None) as client:
        session = opened(client)
        rows_of(session)
        found = globals()[scenario](session, client, *numbers)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
