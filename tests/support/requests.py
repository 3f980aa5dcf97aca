"""A right request of each RPC, for tests that change something about them."""

import copy

import numpy as np
import raw

from curvd.contract.rpcs import RPCS, Framed
from curvd.v1 import query_service_pb2 as query_pb
from curvd.v1 import session_service_pb2 as session_pb
from curvd_server.app import serve_in_thread
from curvd_server.config import ServerConfig

RNG = np.random.default_rng(0)
STATE = raw.file_of({"1.weight": RNG.normal(size=(2, 3)), "1.bias": np.zeros(2)})
POINTS = raw.file_of({"x": RNG.normal(size=(6, 3)), "y": RNG.normal(size=(6, 2))})
SIZE = 8
V = raw.file_of({"v": np.ones(SIZE)})
UPDATE = raw.file_of({"1.bias": np.zeros(2)})
CONFIG = '{"widths": [3, 2]}'


class Requests:
    """Makes and sends requests that are right.

    Args:
        channel: To a real server.
        session_id: Of a session of the one model and the one dataset; None: a new one.
    """

    def __init__(self, channel, session_id=None):
        self.channel = channel
        self.model = raw.register_model(channel, "mlp", CONFIG, STATE).model.id
        self.dataset = raw.register_dataset(channel, POINTS).dataset.id
        self.session = session_id or self.create()

    def as_seen_by(self, channel, **changes):
        """The same requests from somebody else, or about something else."""
        other = copy.copy(self)
        other.__dict__.update(changes, channel=channel)
        return other

    def create(self):
        """Make a session; return its id."""
        return raw.create(self.channel, self.model, self.dataset).id

    def right(self, name):
        """A right request of an RPC: the message, and the bytes that follow."""
        message = RPCS[name].request.message()
        fill = getattr(self, f"_{name}", self._named)
        return message, fill(message) or ()

    def _named(self, message):
        message.session_id = self.session

    def _RegisterModel(self, message):
        message.header.builder, message.header.config_json = "mlp", CONFIG
        message.header.state.CopyFrom(raw.upload(STATE))
        return (memoryview(STATE),)

    def _RegisterDataset(self, message):
        fields = {"inputs": ["x"], "target": "y", "batch_size": 6}
        header = session_pb.RegisterDatasetHeader(tensors=raw.upload(POINTS), **fields)
        message.header.CopyFrom(header)
        return (memoryview(POINTS),)

    def _CreateSession(self, message):
        message.model_id, message.dataset_id = self.model, self.dataset
        message.loss.name, message.loss.reduction = "LOSS_NAME_MSE", "REDUCTION_MEAN"
        message.dtype = "DTYPE_FLOAT64"

    def _OpenSession(self, message):
        self._CreateSession(message.session)

    def _ListSessions(self, message):
        message.page_size = 10

    _ListModels = _ListDatasets = _ListSessions

    def _GetServerInfo(self, message):
        pass

    def _RenewSession(self, message):
        self._named(message)
        message.lease.seconds = 1000

    def _UpdateParameters(self, message):
        message.header.session_id = self.session
        message.header.values.CopyFrom(raw.upload(UPDATE))
        return (memoryview(UPDATE),)

    def _DeleteSession(self, message):
        message.session_id = "0000-1"

    def _DeleteModel(self, message):
        message.model_id = "0" * 64

    def _DeleteDataset(self, message):
        message.dataset_id = "0" * 64

    def _DeleteVector(self, message):
        self._named(message)
        message.name = "nothing"

    def _GetVector(self, message):
        self._named(message)
        message.name = "nothing"

    def _PutVector(self, message):
        message.header.session_id, message.header.name = self.session, "v"
        return (memoryview(V),)

    def _CombineVectors(self, message):
        self._named(message)
        message.terms.add(name="nothing", coefficient=1.0)
        message.store_as = "sum"

    def _InnerProducts(self, message):
        self._named(message)
        message.left.append("nothing")

    def _OrthonormaliseVectors(self, message):
        self._named(message)
        message.names.append("nothing")
        message.store_as = "basis"

    def _product(self, message):
        message.header.session_id = self.session
        return (memoryview(V),)

    _MatVec = _MatMat = _Multiply = _product

    def _query(self, message):
        message.query.session_id, message.query.max_products = self.session, 40

    _Trace = _Diagonal = _FrobeniusNorm = _GradientNorms = _query
    _GradientGram = _GradientSquares = _query

    def _SpectralDensity(self, message):
        self._query(message)
        message.probes, message.steps, message.points = 2, 4, 10

    def _Sketch(self, message):
        self._query(message)
        message.rank = 4

    def _Eigsh(self, message):
        self._query(message)
        message.k = 2

    def _LogDet(self, message):
        self._query(message)
        message.damping = 1.0

    def _JacobianProduct(self, message):
        self._query(message.header)
        return (memoryview(V),)

    def _Influence(self, message):
        self._query(message.header)
        message.header.query.operator.kind = "OPERATOR_KIND_GGN"
        message.header.all_rows = True
        return ()

    def _Predictive(self, message):
        self._query(message.header)
        message.header.query.operator.kind = "OPERATOR_KIND_GGN"
        return (memoryview(raw.file_of({"0": np.ones((1, 3))})),)

    def _PosteriorSamples(self, message):
        self._query(message)
        message.query.operator.kind = "OPERATOR_KIND_GGN"

    def _MarginalLikelihood(self, message):
        self._query(message)
        message.query.operator.kind = "OPERATOR_KIND_GGN"

    def _Solve(self, message):
        header = query_pb.SolveHeader(damping=1.0)
        self._query(header)
        message.header.CopyFrom(header)
        return (memoryview(raw.file_of({"b": np.ones(SIZE)})),)

    def send(self, name, message, chunks, *, patience_s=300):
        """Send a request as its RPC wants it."""
        rpc = RPCS[name]
        request = message
        if rpc.request.framed:
            request = Framed(message, chunks)
        elif rpc.client_streams:
            request = [message, *chunks]
        return raw.call(self.channel, name, request, timeout=patience_s)

    def product(self):
        """Multiply a vector of ones."""
        request = raw.product("MatVec", self.session, V)
        return raw.joined(raw.call(self.channel, "MatVec", request))[1]


def serving(folder):
    """A real server that compiles nothing."""
    config = ServerConfig(
        listen="127.0.0.1:0", data_dir=folder, drain_s=0.0, compile_after_s=0
    )
    return serve_in_thread(config)
