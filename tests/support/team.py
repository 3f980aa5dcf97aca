"""Four callers who use a server as a team does: what they do, and what is right.

Each has a name, a token and quotas, a session of his own that stays, and sessions that come
and go. All models are linear and all losses squares, so that NumPy knows what is right.
"""

import asyncio
import contextlib
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

import curvd

SHAPES = [(points, inputs) for points in (48, 64, 96) for inputs in (4, 8, 12)]
"""A server remembers plans by structure, so there are only so many."""
WIDE = (2048, 400)
"""Products with this one take long enough to be given up in the middle."""
SESSIONS = 4
"""The quota of each."""
VECTOR_BYTES = 100_000
PATIENT = curvd.RetryConfig(give_up_s=600.0)
"""Other work may have the machine for a minute."""
ABANDONED = "abandoned"
"""Name of sessions that nobody ends but their lease, or the operator."""
QUOTAS = f"""\
[default]
sessions = {SESSIONS}
vector_bytes = {VECTOR_BYTES}
disk_bytes = 1_000_000_000
calls = 32
uploads = 8
"""


class Wrong(Exception):
    """Something is not as it should be."""


def claim(holds, what):
    """Say what is wrong, if something is."""
    if not holds:
        raise Wrong(what)


class LeastSquares:
    """A linear model with a bias under squared error.

    Args:
        rng: Draws the data.
        shape: Data points, inputs.
    """

    def __init__(self, rng, shape):
        self.points, self.inputs = shape
        self.x = rng.standard_normal(shape)
        self.y = rng.standard_normal((self.points, 1))
        self.w = rng.standard_normal(self.inputs + 1)
        self.wide = np.hstack([self.x, np.ones((self.points, 1))])

    def matrix(self):
        """The Hessian [P, P]; it does not depend on the parameters."""
        return 2 * self.wide.T @ self.wide / self.points

    def gradient(self):
        """At the parameters, [P]."""
        return 2 * self.wide.T @ (self.wide @ self.w - self.y[:, 0]) / self.points

    def state(self):
        """The parameters by name."""
        return {"1.weight": self.w[None, :-1], "1.bias": self.w[-1:]}

    def data(self):
        """The data points by name."""
        return {"x": self.x, "y": self.y}

    def registered(self, client):
        """Register both: the model and the dataset."""
        model = client.register_model(
            "mlp", {"activation": "tanh", "widths": [self.inputs, 1]}, self.state()
        )
        data = client.register_dataset(
            self.data(), inputs=["x"], target="y", batch_size=self.points
        )
        return model, data


@dataclass
class Person:
    """One caller.

    Args:
        target: The server.
        name: What the server calls him.
        token: His.
        strangers: Tokens that are nobody's, or were.
        others: Sessions of others, by their names.
    """

    target: str
    name: str
    token: str
    strangers: list
    others: dict
    until: object
    operator: bool = False
    done: Counter = field(default_factory=Counter)
    wrong: Counter = field(default_factory=Counter)
    left: list = field(default_factory=list)
    """Models and datasets of sessions that he has abandoned."""

    def run(self):
        """Come and go until the end; then leave nothing behind."""
        self.rng = np.random.default_rng(sum(self.name.encode()))
        visits = 0
        while not self.until():
            transport = ("direct", "grpcio")[visits % 2]
            config = curvd.ClientConfig(
                token=self.token, transport=transport, retry=PATIENT
            )
            self._protected(self.visit, config)
            visits += 1
        config = curvd.ClientConfig(token=self.token, retry=PATIENT)
        with curvd.connect(self.target, config=config) as client:
            self.client = client
            for session in client.sessions():
                if session.owner in ("", self.name):
                    client.session(session.id).delete()
            self._protected(self.tidy)

    def _protected(self, act, *args):
        try:
            act(*args)
        except Exception as error:
            self.wrong[f"{act.__name__}: {type(error).__name__}: {error!s:.300}"] += 1

    def visit(self, config):
        """One connection: a session that stays, and some steps."""
        steps = [
            *[self.multiply] * 6, self.ask, self.ask, self.update, self.update,
            self.store, self.come_and_go, self.come_and_go, self.exported,
            self.give_up, self.give_up, self.give_up_upload, self.hurry,
            self.too_many, self.trespass, self.abandon, self.tidy,
        ]  # fmt: skip
        if self.operator:
            steps += [self.end_abandoned] * 4
        with curvd.connect(self.target, config=config) as client:
            self.client, self.config = client, config
            problem = LeastSquares(self.rng, SHAPES[self.rng.integers(len(SHAPES))])
            model, data = problem.registered(client)
            with client.create_session(
                model, data, loss="mse", dtype="F64", name=self.name
            ) as session:
                self.session, self.problem, self.version = session, problem, 1
                self.others[self.name] = session.id
                for _ in range(40):
                    if self.until():
                        break
                    step = steps[self.rng.integers(len(steps))]
                    self._protected(step)
                    self.done[step.__name__] += 1
            client.delete_model(model)
            client.delete_dataset(data)

    def columns(self, most=40):
        """An operand [P, K]."""
        shape = (self.problem.inputs + 1, int(self.rng.integers(1, most)))
        return self.rng.standard_normal(shape)

    def multiply(self):
        """Some products."""
        operator, matrix = self.session.hessian(), self.problem.matrix()
        for _ in range(int(self.rng.integers(1, 20))):
            v = self.columns()
            claim(np.allclose(operator @ v, matrix @ v, atol=1e-8), "a product")
            self.done["products"] += 1

    def ask(self):
        """Queries: eigenvalues, a system."""
        matrix = self.problem.matrix()
        found = self.session.hessian().eigsh(k=2)
        want = np.linalg.eigvalsh(matrix)[::-1][:2]
        claim(np.allclose(found.values, want, atol=1e-5), "eigenvalues")
        b = self.columns(3)
        solution = self.session.ggn().solve(b, damping=0.5, tolerance=1e-9)
        want = np.linalg.solve(matrix + 0.5 * np.eye(len(matrix)), b)
        claim(np.allclose(solution.x, want, atol=1e-5), "a solution")

    def update(self):
        """New parameters, whose gradient NumPy knows."""
        self.problem.w = self.rng.standard_normal(self.problem.inputs + 1)
        found = self.session.update_parameters(self.problem.state())
        claim(found == self.version + 1, f"version {found} after {self.version}")
        self.version = found
        gradient = self.session.gradient()[1]
        claim(np.allclose(gradient, self.problem.gradient(), atol=1e-8), "a gradient")

    def store(self):
        """A vector that the session keeps, and one too large for the quota."""
        v = self.columns()
        stored = self.session.put("v", v)
        product = self.session.hessian().multiply(stored, store="Hv")
        got = self.session.get(product)
        claim(np.allclose(got, self.problem.matrix() @ v, atol=1e-8), "a stored one")
        large = np.zeros((self.problem.inputs + 1, VECTOR_BYTES // 8))
        with refused(curvd.LimitExceeded, "vector_bytes"):
            self.session.put("large", large)
        for vector in (stored, product):
            self.session.discard(vector)

    @contextlib.contextmanager
    def passing(self, **options):
        """A session with data of its own, and all of it deleted at the end."""
        problem = LeastSquares(self.rng, SHAPES[self.rng.integers(len(SHAPES))])
        model, data = problem.registered(self.client)
        try:
            session = self.client.create_session(
                model, data, loss="mse", dtype="F64", **options
            )
            try:
                yield session, problem
            finally:
                with contextlib.suppress(curvd.SessionNotFound):
                    session.delete()
        finally:
            self.client.delete_model(model)
            self.client.delete_dataset(data)

    def come_and_go(self):
        """A session that ends while somebody multiplies."""
        with self.passing() as (session, problem):
            v = self.rng.standard_normal((problem.inputs + 1, 3))
            operator = session.hessian()
            claim(np.allclose(operator @ v, problem.matrix() @ v), "a product")
            ends = threading.Thread(target=self._protected, args=(session.delete,))
            ends.start()
            try:
                for _ in range(50):
                    operator @ v
            except (curvd.SessionNotFound, curvd.Cancelled) as error:
                self.done[f"{type(error).__name__}: it was ended"] += 1
            ends.join()
            with refused(curvd.SessionNotFound, session.id):
                operator @ v

    def exported(self):
        """A module of the caller's own, which the server tries in a child."""
        import torch

        problem = LeastSquares(self.rng, SHAPES[self.rng.integers(len(SHAPES))])
        module = torch.nn.Linear(problem.inputs, 1).double()
        x, y = (torch.from_numpy(a) for a in problem.data().values())
        with self.client.session_for(
            module, torch.nn.MSELoss(), (x, y), batch_size=problem.points
        ) as session:
            model, data = session.info.model_id, session.info.dataset_id
            v = self.rng.standard_normal((problem.inputs + 1, 3))
            got = session.ggn() @ v
            claim(np.allclose(got, problem.matrix() @ v), "a product of a module")
        self.client.delete_model(model)
        self.client.delete_dataset(data)

    def give_up(self):
        """Cancel long products in the middle; the next one is right."""
        problem = LeastSquares(self.rng, WIDE)
        model, data = problem.registered(self.client)
        v = self.rng.standard_normal((problem.inputs + 1, problem.inputs))

        async def give_up():
            async with curvd.aio.connect(self.target, config=self.config) as client:
                session = await client.create_session(
                    model, data, loss="mse", dtype="F64"
                )
                async with session:
                    operator = session.hessian()
                    await (operator @ v[:, 0])
                    for _ in range(4):
                        product = asyncio.ensure_future(operator @ v)
                        await asyncio.sleep(self.rng.uniform(0, 0.3))
                        if product.cancel():
                            self.done["products given up"] += 1
                        with contextlib.suppress(asyncio.CancelledError):
                            await product
                    return await (operator @ v[:, :2])

        got = asyncio.run(give_up())
        want = problem.matrix() @ v[:, :2]
        claim(np.allclose(got, want, atol=1e-7), "the product after those given up")
        self.client.delete_model(model)
        self.client.delete_dataset(data)

    def give_up_upload(self):
        """Cancel an upload in the middle, and go on with it."""
        points = {
            "x": self.rng.standard_normal((4000, 400)),
            "y": np.zeros((4000, 1)),
        }
        said = {"inputs": ["x"], "target": "y", "batch_size": 64}

        async def give_up():
            async with curvd.aio.connect(self.target, config=self.config) as client:
                upload = asyncio.ensure_future(client.register_dataset(points, **said))
                await asyncio.sleep(self.rng.uniform(0, 0.05))
                self.done["uploads given up"] += upload.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await upload

        asyncio.run(give_up())
        data = self.client.register_dataset(points, **said)
        self.client.delete_dataset(data)

    def hurry(self):
        """Products with hardly any time."""
        session_id, matrix = self.session.id, self.problem.matrix()
        v = self.columns(500)
        for seconds in (0.001, 0.01, 0.1):
            with curvd.connect(
                self.target, config=self.config, deadline_s=seconds
            ) as client:
                try:
                    operator = client.session(session_id).hessian()
                    claim(np.allclose(operator @ v, matrix @ v), "a hurried product")
                except curvd.DeadlineExceeded:
                    self.done["DeadlineExceeded: in a hurry"] += 1

    def too_many(self):
        """As many sessions as the quota has, and one more."""
        problem = LeastSquares(self.rng, SHAPES[0])
        model, data = problem.registered(self.client)
        opened = []
        try:
            for _ in range(SESSIONS):  # beside the one that stays
                opened.append(
                    self.client.create_session(model, data, loss="mse", dtype="F64")
                )
            claim(False, "one session too many")
        except curvd.LimitExceeded as error:
            claim(f"{SESSIONS} sessions" in str(error), str(error))
            self.done["LimitExceeded: sessions"] += 1
        for session in opened:
            session.delete()
        self.client.delete_model(model)
        self.client.delete_dataset(data)

    def trespass(self):
        """With tokens that are nobody's, and at what is another's."""
        for token in self.strangers:
            with (
                curvd.connect(self.target, config=self.config, token=token) as client,
                refused(curvd.Unauthenticated, ""),
            ):
                client.sessions()
            self.done["Unauthenticated: nobody's token"] += 1
        for name, session_id in list(self.others.items()):
            if name != self.name and not self.operator:
                with refused(curvd.SessionNotFound, ""):
                    self.client.session(session_id)
                self.done["SessionNotFound: another's"] += 1

    def abandon(self):
        """A session that nobody ends but its lease, or the operator."""
        if len(self.left) >= 4 or self.operator:
            return
        problem = LeastSquares(self.rng, SHAPES[1])
        model, data = problem.registered(self.client)
        self.client.create_session(
            model, data, loss="mse", dtype="F64", name=ABANDONED, lease_s=20.0
        )
        self.left += [("delete_model", model), ("delete_dataset", data)]

    def tidy(self):
        """Delete what abandoned sessions were made of, once they have ended."""
        for each in list(self.left):
            delete, what = each
            try:
                getattr(self.client, delete)(what)
                self.left.remove(each)
            except curvd.StillInUse:
                self.done["StillInUse: abandoned"] += 1

    def end_abandoned(self):
        """The operator sees everybody's sessions, and ends some."""
        for session in self.client.sessions():
            if session.name == ABANDONED:
                with contextlib.suppress(curvd.SessionNotFound):
                    self.client.session(session.id).delete()
                    self.done["ended for others"] += 1


@contextlib.contextmanager
def refused(kind, said):
    """What is inside has to fail so."""
    try:
        yield
    except kind as error:
        claim(said in str(error), f"{kind.__name__} without {said!r}: {error}")
        return
    raise Wrong(f"no {kind.__name__}")


def over_at(end_s):
    """Tells whether the end has come, by `time.monotonic`."""
    return lambda: time.monotonic() >= end_s
