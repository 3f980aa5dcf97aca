"""The contract without the client: parts in, parts out, errors as exceptions."""

from __future__ import annotations

import hashlib
import threading

import grpc
import numpy as np

from curvd.contract import convert, enums, specs, statuses
from curvd.contract.rpcs import RPCS
from curvd.tensors import chunks as wire
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd.v1 import session_service_pb2 as session_pb


def call(channel, name, request, *, timeout=300, metadata=()):
    """Make a call; a list stands for a stream, in both directions."""
    rpc = RPCS[name]
    stub = getattr(channel, rpc.shape)(rpc.path, rpc.request.dump, rpc.response.load)
    try:
        sent = iter(request) if rpc.client_streams else request
        response = stub(sent, timeout=timeout, metadata=metadata)
        return list(response) if rpc.server_streams else response
    except grpc.RpcError as error:
        details = dict(error.trailing_metadata() or ()).get(statuses.DETAILS_KEY)
        raise statuses.load(error.code().name, error.details(), details) from error


def file_of(arrays):
    """A safetensors file in one piece."""
    return b"".join(wire.chunks(arrays))


def upload(data, *, digest=None, total_bytes=None, offset=0):
    """What announces a file."""
    return session_pb.Upload(
        digest=hashlib.sha256(data).hexdigest() if digest is None else digest,
        total_bytes=len(data) if total_bytes is None else total_bytes,
        offset=offset,
    )


def register_model(channel, builder, config_json, data, *, announced=None, **fields):
    """Register a model, bytes included."""
    fields = {"builder": builder, "config_json": config_json} | fields
    header = session_pb.RegisterModelHeader(state=announced or upload(data), **fields)
    first = session_pb.RegisterModelRequest(header=header)
    return call(channel, "RegisterModel", [first, *wire.pieces(memoryview(data))])


def register_dataset(channel, data, *, announced=None, **fields):
    """Register a dataset, bytes included."""
    fields = {"inputs": ["x"], "target": "y", "batch_size": 4} | fields
    header = session_pb.RegisterDatasetHeader(
        tensors=announced or upload(data), **fields
    )
    first = session_pb.RegisterDatasetRequest(header=header)
    return call(channel, "RegisterDataset", [first, *wire.pieces(memoryview(data))])


def product(name, session_id, data, **fields):
    """The parts of a product's request."""
    header = curvature_pb.ProductHeader(session_id=session_id, **fields)
    first = RPCS[name].request.message(header=header)
    return [first, *wire.pieces(memoryview(data))]


def joined(parts):
    """Header, tensors and summary of a result."""
    chunks = [p for p in parts if isinstance(p, memoryview)]
    arrays = wire.load(iter(chunks), max_bytes=1 << 30)
    return parts[0].header, arrays["result"], parts[-1].summary


def create(channel, model_id, dataset_id, **fields):
    """Make a session of a mean squared error."""
    loss = convert.loss_to_proto(specs.LossSpec(name=enums.LossName.MSE))
    fields = {"loss": loss, "dtype": "DTYPE_FLOAT64"} | fields
    request = session_pb.CreateSessionRequest(
        model_id=model_id, dataset_id=dataset_id, **fields
    )
    return call(channel, "CreateSession", request).session


def fake_session(channel, **fields):
    """A session on the fake device: P = 5, and the Hessian is 5 times the identity."""
    model = register_model(
        channel, "two", "{}", file_of({"a": np.ones(2), "b": np.ones(3)})
    ).model
    dataset = register_dataset(
        channel, file_of({"x": np.ones((4, 2)), "y": np.ones(4)})
    ).dataset
    return create(channel, model.id, dataset.id, **fields)


class Feed:
    """A request stream that goes on when it is told to."""

    def __init__(self, *parts):
        self._parts, self._more = list(parts), threading.Condition()
        self._ended = False

    def add(self, *parts):
        """Send more."""
        with self._more:
            self._parts.extend(parts)
            self._more.notify()

    def end(self):
        """Send no more."""
        with self._more:
            self._ended = True
            self._more.notify()

    def __iter__(self):
        return self

    def __next__(self):
        with self._more:
            self._more.wait_for(lambda: self._parts or self._ended)
            if not self._parts:
                raise StopIteration
            return self._parts.pop(0)
