"""A server of the whole contract without torch: its Hessian is a matrix that is known."""

import contextlib
import dataclasses
import hashlib
import itertools
import threading
import zlib
from collections import defaultdict
from concurrent import futures

import grpc
import numpy as np

from curvd.contract import (
    DatasetInfo,
    DeviceInfo,
    Limits,
    ModelInfo,
    PlanReport,
    ServerInfo,
    SessionInfo,
    SessionState,
    StageProgress,
    TensorInfo,
    convert,
    convert_activities,
    convert_enums,
    convert_server,
    convert_sessions,
    enums,
    layout,
    specs,
)
from curvd.contract.rpcs import RPCS, Framed
from curvd.contract.statuses import DETAILS_KEY, dump
from curvd.errors import (
    CurvdError,
    ResultNotKept,
    SessionNotFound,
    VectorNotFound,
    VersionMismatch,
)
from curvd.tensors import chunks as wire
from curvd.tensors import safetensors_header
from curvd.tensors.half_precision import NARROW, narrow, widen
from curvd.tensors.random_probes import probes
from curvd.v1 import curvature_service_pb2 as curvature_pb
from curvd.v1 import session_service_pb2 as session_pb

LAYOUT = layout.ParameterLayout.of({"0.weight": (3, 8), "0.bias": (3,)})
P = LAYOUT.size
_HALF = np.random.default_rng(7).standard_normal((P, P))
MATRIX = _HALF + _HALF.T
GRADIENT = np.arange(P, dtype=np.float64)
LOSS = 0.25

PLAN = PlanReport(
    mode="known_matrix",
    columns_at_once=8,
    batches=4,
    kept_batches=4,
    kept_bytes=1024,
    compiled=False,
    symmetry_gap=1e-16,
    difference_gap=1e-9,
    seconds_per_product=1e-6,
    peak_bytes=4096,
)
INFO = ServerInfo(
    version="0.0.0",
    torch_version="none",
    limits=Limits(
        upload_bytes=1 << 30,
        operand_bytes=1 << 30,
        header_bytes=1 << 20,
        columns=1000,
        pending_columns=1000,
        sessions=10,
        default_budget_bytes=1 << 20,
    ),
    devices=(
        DeviceInfo(
            name="cpu", description="a fake", total_bytes=1 << 30, free_bytes=1 << 29
        ),
    ),
    builders=("mlp",),
    capabilities=(),
)


OPENING = (
    StageProgress(stage=enums.Stage.CHECKING, done=2, total=3, elapsed_s=0.5),
    StageProgress(stage=enums.Stage.VERIFYING, detail="known_matrix", done=1, total=7),
)
"""What an opening says of itself."""


@dataclasses.dataclass
class Fault:
    """Raise `error` at once, or instead of the n-th part that comes in or goes out."""

    error: Exception
    after_in: int | None = None
    after_out: int | None = None


class Damage(list):
    """Runs out of damage, but never ends."""

    def pop(self, index=0):
        return super().pop(index) if self else 0


class FakeService:
    """One handler per RPC: a generator from request parts to response parts."""

    def __init__(self):
        self.calls = []
        """(name, header, metadata) of every call, in order."""
        self.chunk_bytes = defaultdict(int)
        """Chunk bytes received, by RPC."""
        self.sessions, self.models, self.datasets = {}, {}, {}
        self.uploads = {}
        self.by_request = {}
        self.vectors = {}
        """Stored ones, by session and name."""
        self.kept = {}
        self.keeps = True
        """Whether results can be resumed."""
        self.chunk = 100
        """Bytes per message of a result."""
        self.sent_bytes = 0
        """Payload of results."""
        self.damage = Damage()
        """Checksums that are wrong, in order."""
        self.serving = True
        self.page_size = 1000
        self.cancelled = threading.Event()
        self._faults = defaultdict(list)

    def fail(self, name, error, *, times=1, **where):
        self._faults[name] += [Fault(error, **where)] * times

    def names(self):
        return [name for name, _, _ in self.calls]

    def GetServerInfo(self, parts):
        next(parts)
        yield convert_server.server_info_to_proto(INFO)

    def RegisterModel(self, parts):
        header = next(parts).header
        upload = self._receive("RegisterModel", header.state, parts)
        if isinstance(upload, session_pb.UploadNeeded):
            yield session_pb.RegisterModelResponse(upload_needed=upload)
            return
        info = ModelInfo(
            id=hashlib.sha256(header.SerializeToString()).hexdigest()[:8],
            spec=specs.ModelSpec(
                builder=header.builder,
                config=convert_sessions.config_from_json(header.config_json),
            ),
            tensors=_tensors(upload),
            state_bytes=header.state.total_bytes,
        )
        model = self.models[info.id] = convert_sessions.model_to_proto(info)
        yield session_pb.RegisterModelResponse(model=model)

    def RegisterDataset(self, parts):
        header = next(parts).header
        if header.name:
            info = DatasetInfo(
                id="d0",
                spec=convert_sessions.dataset_spec_from_proto(header),
                tensors=(),
                data_points=1,
                total_bytes=1,
                name=header.name,
            )
            dataset = convert_sessions.dataset_to_proto(info)
            yield session_pb.RegisterDatasetResponse(dataset=dataset)
            return
        upload = self._receive("RegisterDataset", header.tensors, parts)
        if isinstance(upload, session_pb.UploadNeeded):
            yield session_pb.RegisterDatasetResponse(upload_needed=upload)
            return
        spec = convert_sessions.dataset_spec_from_proto(header)
        info = DatasetInfo(
            id="d" + header.tensors.digest[:8],
            spec=spec,
            tensors=_tensors(upload),
            data_points=len(upload[spec.target]),
            total_bytes=header.tensors.total_bytes,
        )
        dataset = self.datasets[info.id] = convert_sessions.dataset_to_proto(info)
        yield session_pb.RegisterDatasetResponse(dataset=dataset)

    def CreateSession(self, parts):
        request = next(parts)
        if request.request_id not in self.by_request:
            self.by_request[request.request_id] = self._create(request)
        info = self.by_request[request.request_id]
        yield session_pb.CreateSessionResponse(
            session=convert_sessions.session_to_proto(info)
        )

    def OpenSession(self, parts):
        request = next(parts).session
        for progress in OPENING:
            yield session_pb.OpenSessionResponse(
                progress=convert_activities.progress_to_proto(progress)
            )
        for response in self.CreateSession(iter([request])):
            yield session_pb.OpenSessionResponse(session=response.session)

    def _create(self, request):
        session_id = "" if request.validate_only else f"s{len(self.sessions)}"
        operators = [convert.operator_from_proto(o) for o in request.operators]
        info = SessionInfo(
            id=session_id,
            name=request.name,
            model_id=request.model_id,
            dataset_id=request.dataset_id,
            loss=convert.loss_from_proto(request.loss),
            dtype=convert_enums.dtype_from_proto(request.dtype),
            mode=convert_enums.mode_from_proto(request.mode),
            version=1,
            parameters_digest="1" * 64,
            layout=LAYOUT,
            data_points=100,
            batches=4,
            device="cpu",
            budget_bytes=request.budget_bytes,
            operators=tuple((o, PLAN) for o in operators or [specs.OperatorSpec()]),
            state=SessionState.READY,
            create_time_s=1.0,
            params=tuple(request.params),
            expire_time_s=(
                1.0 + request.lease.ToSeconds() if request.HasField("lease") else None
            ),
        )
        if session_id:
            self.sessions[session_id] = info
        return info

    def GetSession(self, parts):
        info = self._session(next(parts))
        yield session_pb.GetSessionResponse(
            session=convert_sessions.session_to_proto(info)
        )

    def ListSessions(self, parts):
        infos, after = self._page(self.sessions, next(parts).page_token)
        yield session_pb.ListSessionsResponse(
            sessions=map(convert_sessions.session_to_proto, infos),
            next_page_token=after,
        )

    def _page(self, registered, start):
        """Cut a list: what it has from there on, and where the next page begins."""
        stop = int(start or 0) + self.page_size
        after = str(stop) if stop < len(registered) else ""
        return list(registered.values())[int(start or 0) : stop], after

    def ListModels(self, parts):
        page, after = self._page(self.models, next(parts).page_token)
        yield session_pb.ListModelsResponse(models=page, next_page_token=after)

    def ListDatasets(self, parts):
        page, after = self._page(self.datasets, next(parts).page_token)
        yield session_pb.ListDatasetsResponse(datasets=page, next_page_token=after)

    def RenewSession(self, parts):
        request = next(parts)
        info = self._session(request)
        if request.HasField("lease"):
            info = dataclasses.replace(
                info, expire_time_s=1.0 + request.lease.ToSeconds()
            )
            self.sessions[info.id] = info
        yield session_pb.RenewSessionResponse(
            session=convert_sessions.session_to_proto(info)
        )

    def DeleteSession(self, parts):
        del self.sessions[self._session(next(parts)).id]
        yield session_pb.DeleteSessionResponse()

    def UpdateParameters(self, parts):
        header = next(parts).header
        info = self._session(header)
        if header.request_id not in self.by_request:
            self._check_version(header, info)
            upload = self._receive("UpdateParameters", header.values, parts)
            if isinstance(upload, session_pb.UploadNeeded):
                yield session_pb.UpdateParametersResponse(upload_needed=upload)
                return
            self.by_request[header.request_id] = info.version + 1
            self.sessions[info.id] = dataclasses.replace(
                info, version=info.version + 1, parameters_digest="2" * 64
            )
        version = session_pb.ParameterVersion(
            version=self.by_request[header.request_id], parameters_digest="2" * 64
        )
        yield session_pb.UpdateParametersResponse(version=version)

    def MatVec(self, parts):
        yield from self._multiply("MatVec", curvature_pb.MatVecResponse, parts)

    def MatMat(self, parts):
        yield from self._multiply("MatMat", curvature_pb.MatMatResponse, parts)

    def Gradient(self, parts):
        request = next(parts)
        info = self._session(request)
        self._check_version(request, info)
        gradient = GRADIENT.astype(_numpy(info))
        yield from self._result(
            curvature_pb.GradientResponse, info, gradient, request, loss=LOSS
        )

    def Multiply(self, parts):
        request = next(parts)
        header = request.message.header
        chunks = iter([t for t in request.tensors if t.nbytes])
        response, file = curvature_pb.MultiplyResponse(), []
        info, result = self._product("Multiply", header, chunks)
        for part in self._result(curvature_pb.MultiplyResponse, info, result, header):
            if isinstance(part, memoryview):
                file.append(part)
            else:
                response.MergeFrom(part)
        yield Framed(response, tuple(file))

    def PutVector(self, parts):
        header = next(parts).header
        info = self._session(header)
        v = wire.load(self._count("PutVector", parts), max_bytes=1 << 30)["v"]
        self.vectors[header.session_id, header.name] = _widened(v, info)
        yield curvature_pb.PutVectorResponse(vector=self._stored(info, header.name))

    def GetVector(self, parts):
        request = next(parts)
        info = self._session(request)
        result = self._vector(request)
        yield from self._result(curvature_pb.GetVectorResponse, info, result, request)

    def ListVectors(self, parts):
        info = self._session(next(parts))
        names = [name for owner, name in self.vectors if owner == info.id]
        yield curvature_pb.ListVectorsResponse(
            vectors=[self._stored(info, name) for name in names]
        )

    def DeleteVector(self, parts):
        request = next(parts)
        self._vector(request)
        del self.vectors[request.session_id, request.name]
        yield curvature_pb.DeleteVectorResponse()

    def _vector(self, request):
        key = request.session_id, request.name
        if key not in self.vectors:
            msg = f"no vector {request.name!r}"
            raise VectorNotFound(msg, vector=request.name)
        return self.vectors[key]

    def _stored(self, info, name):
        array = self.vectors[info.id, name]
        dtype = "F64" if array.dtype == np.float64 else "F32"
        return curvature_pb.StoredVector(
            name=name, shape=array.shape, dtype=dtype, version=info.version
        )

    def _multiply(self, name, message, parts):
        header = next(parts).header
        info, result = self._product(name, header, parts)
        yield from self._result(message, info, result, header)

    def _product(self, name, header, chunks):
        info = self._session(header)
        self._check_version(header, info)
        first = next(chunks, None)
        source = header.operand.WhichOneof("source")
        if header.HasField("resume") and first is None and source is None:
            if header.request_id not in self.kept:
                msg = "it is gone"
                raise ResultNotKept(msg)
            return info, self.kept[header.request_id]
        if source == "stored":
            v = self.vectors[info.id, header.operand.stored]
        elif source == "probe":
            probe = header.operand.probe
            kind = convert_enums.distribution_from_proto(probe.distribution)
            indices = range(probe.first_index, probe.first_index + (probe.columns or 1))
            v = probes(kind, probe.seed, indices, P, dtype=_numpy(info))
            v = v if probe.columns else v[0]
        else:
            chunks = self._count(name, itertools.chain([first], chunks))
            v = _widened(wire.load(chunks, max_bytes=1 << 30)["v"], info)
        assert v.dtype == _numpy(info)
        matrix = operator_matrix(convert.operator_from_proto(header.operator))
        result = (v @ matrix).astype(v.dtype)
        if self.keeps:
            self.kept[header.request_id] = result
        if header.store_as:
            self.vectors[info.id, header.store_as] = result
            result = None
        return info, result

    def _result(self, message, info, result, request, **extra):
        asked = getattr(request, "result_type", "")
        raw = b""
        if result is not None:
            arrays = {"result": result}
            dtype = asked or safetensors_header.header_of(arrays)["result"].dtype
            shape = {"result": safetensors_header.TensorHeader(dtype, result.shape, 0)}
            raw = bytes(
                wire.bytes_of(narrow(result.reshape(-1), asked) if asked else result)
            )
        offset = request.resume.offset
        if hashlib.sha256(raw[:offset]).digest() != request.resume.sha256:
            offset = 0
        header = curvature_pb.ResultHeader(
            offset=offset,
            version=info.version,
            parameters_digest=info.parameters_digest,
            model_id=info.model_id,
            dataset_id=info.dataset_id,
            plan=None if extra else convert.plan_to_proto(PLAN),
            **extra,
        )
        yield message(header=header)
        if result is not None:
            yield memoryview(safetensors_header.dump_header(shape))
        # Small chunks that respect no boundary: the client must not care.
        for chunk in wire.pieces(memoryview(raw)[offset:], chunk_bytes=self.chunk):
            self.sent_bytes += chunk.nbytes
            yield chunk
        summary = curvature_pb.ResultSummary(compute_s=0.5, runs=1)
        if request.checksum:
            summary.crc32 = zlib.crc32(raw) ^ self.damage.pop(0)
        yield message(summary=summary)

    def _receive(self, name, upload, parts):
        held = self.uploads.setdefault(upload.digest, bytearray())
        chunks = list(self._until_broken(self._count(name, parts)))
        if chunks:
            assert upload.offset <= len(held)
            del held[upload.offset :]
        for chunk in chunks:
            if isinstance(chunk, Exception):
                raise chunk
            held += chunk
        if len(held) < upload.total_bytes:
            return session_pb.UploadNeeded(committed_bytes=len(held))
        assert hashlib.sha256(held).hexdigest() == upload.digest
        return wire.load(iter([memoryview(bytes(held))]), max_bytes=1 << 30)

    def _until_broken(self, parts):
        try:
            yield from parts
        except CurvdError as error:
            yield error

    def _count(self, name, parts):
        for part in parts:
            self.chunk_bytes[name] += part.nbytes
            yield part

    def _session(self, request):
        if request.session_id not in self.sessions:
            msg = f"no session {request.session_id!r}"
            raise SessionNotFound(msg, session_id=request.session_id)
        return self.sessions[request.session_id]

    def _check_version(self, request, info):
        if request.HasField("expected_version"):
            expected = request.expected_version
            if expected != info.version:
                msg = f"expected version {expected}, the session is at {info.version}"
                raise VersionMismatch(msg, expected=expected, current=info.version)

    def handle(self, rpc, request, context):
        """Adapt one call to its generator, with the faults that were ordered."""
        parts = request if rpc.client_streams else iter([request])
        fault = self._faults[rpc.name].pop(0) if self._faults[rpc.name] else None
        try:
            parts = self._noted(rpc, parts, context)
            if fault is not None and fault.after_in is not None:
                parts = _broken(parts, fault.after_in, fault.error)
            elif fault is not None and fault.after_out is None:
                next(parts)
                raise fault.error
            responses = getattr(self, rpc.name)(parts)
            if fault is not None and fault.after_out is not None:
                responses = _broken(responses, fault.after_out, fault.error)
            yield from responses
        except CurvdError as error:
            context.set_trailing_metadata([(DETAILS_KEY, dump(error))])
            context.abort(grpc.StatusCode[error.code], str(error))

    def _noted(self, rpc, parts, context):
        for count, part in enumerate(parts):
            if count == 0:
                header = part.message.header if isinstance(part, Framed) else part
                header = getattr(part, "header", part) if rpc.client_streams else header
                metadata = dict(context.invocation_metadata())
                self.calls.append((rpc.name, header, metadata))
            yield part


def _broken(parts, limit, error):
    for count, part in enumerate(parts):
        if count == limit:
            raise error
        yield part
    raise error


def operator_matrix(spec):
    """What the fake multiplies by: [P, P]."""
    matrix = MATRIX
    if spec.block_sizes is not None:
        matrix, first = np.zeros_like(MATRIX), 0
        for size in spec.block_sizes:
            own = LAYOUT.parameters[first : first + size]
            rows = slice(own[0].offset, own[-1].offset + own[-1].size)
            matrix[rows, rows] = MATRIX[rows, rows]
            first += size
    return spec.scale * matrix + spec.damping * np.eye(P)


def _tensors(arrays):
    return tuple(
        TensorInfo(name, t.dtype, t.shape)
        for name, t in safetensors_header.header_of(arrays).items()
    )


def _widened(v, info):
    """Operands of uint16 bits are BF16, of float16 are F16."""
    if v.dtype not in (np.uint16, np.float16):
        return v
    out = np.empty(v.shape, _numpy(info))
    kind = NARROW[v.dtype == np.float16]
    widen(v.reshape(-1).view(np.uint8), kind, out.reshape(-1))
    return out


def _numpy(info):
    return np.float64 if info.dtype is enums.Dtype.FLOAT64 else np.float32


@contextlib.contextmanager
def serving(service, *, credentials=None, address="127.0.0.1:0"):
    """Serve a fake; yields its target."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    for rpc in RPCS.values():
        server.add_generic_rpc_handlers((_handlers(service, rpc),))
    server.add_generic_rpc_handlers((_health(service),))
    if credentials is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, credentials)
    server.start()
    try:
        yield address if address.startswith("unix:") else f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def _handlers(service, rpc):
    def behaviour(request, context):
        responses = service.handle(rpc, request, context)
        return responses if rpc.server_streams else next(responses)

    method = getattr(grpc, f"{rpc.shape}_rpc_method_handler")(
        behaviour, rpc.request.load, rpc.response.dump
    )
    return grpc.method_handlers_generic_handler(rpc.service, {rpc.name: method})


def _health(service):
    method = grpc.unary_unary_rpc_method_handler(
        lambda request, context: b"\x08\x01" if service.serving else b"\x08\x02"
    )
    return grpc.method_handlers_generic_handler(
        "grpc.health.v1.Health", {"Check": method}
    )
