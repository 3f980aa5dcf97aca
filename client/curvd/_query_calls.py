"""Queries as calls without I/O: requests are made here, and results are read."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from curvd import convert, types, wire
from curvd._calls import Call
from curvd.arrays import Operand, operand, vector_dtype
from curvd.errors import CurvdError, Internal, InvalidVector
from curvd.results import (
    Density,
    DiagonalEstimate,
    Eigenpairs,
    Estimate,
    LogDeterminant,
    QueryInfo,
    QueryProgress,
    Solution,
)
from curvd.rpcs import RPCS, Part
from curvd.types import Estimator, OperatorSpec, SessionInfo, Solver, Which
from curvd.v1 import query_service_pb2 as query_pb

T = TypeVar("T")
Arrays = Mapping[str, NDArray[Any]]
Read = Callable[[Any, Any, Arrays], T]
"""Makes a result from the header, the summary and the tensors."""
Observe = Callable[[QueryProgress], None]


class QueryCall(Call[T]):
    """A stream of progress that ends with a result.

    Args:
        name: Of the method.
        request: The request, or the header of the request's stream.
        read: Makes the result.
        operands: Tensors to send, by name, with their shapes.
        max_bytes: Largest result.
    """

    def __init__(
        self,
        name: str,
        request: Message,
        read: Read[T],
        *,
        operands: Mapping[str, tuple[Operand, tuple[int, ...]]] | None = None,
        max_bytes: int = 0,
    ) -> None:
        super().__init__(RPCS[name])
        self._message, self._read = request, read
        self._operands, self._max_bytes = operands, max_bytes
        self.observe: Observe = lambda progress: None
        """Called with the progress as it arrives."""
        self._latest: QueryProgress | None = None

    def restart(self) -> None:
        """Ask for the whole result again."""
        super().restart()
        self._header: Any = None
        self._summary: Any = None
        self._payload = np.empty(0, np.uint8)
        self._assembler: wire.Assembler | None = None

    def feed(self, part: Part) -> Iterator[Any]:
        """Take one part of the response."""
        if isinstance(part, memoryview):
            self._assembler = self._assembler or wire.Assembler(
                max_bytes=self._max_bytes
            )
            try:
                for piece in self._assembler.feed(part):
                    self._payload = piece
            except CurvdError as error:
                raise self._malformed(error) from error
        else:
            kind = part.WhichOneof("part")
            if kind == "header":
                self._header = getattr(part, kind)
            elif kind == "summary":
                self._summary = getattr(part, kind)
            elif kind == "progress":
                self._latest = _progress(getattr(part, kind))
                self.observe(self._latest)
        yield from ()

    def conclude(self) -> None:
        """Check that nothing is missing.

        Raises:
            Internal: If something is.
        """
        if self._header is None or self._summary is None:
            why = "the header or the summary is missing"
            raise self._malformed(why)
        try:
            tensors = self._assembler.finish() if self._assembler else {}
            arrays = {n: t.view(self._payload) for n, t in tensors.items()}
            self._result = self._read(self._header, self._summary, arrays)
        except (CurvdError, KeyError) as error:
            raise self._malformed(error) from error
        self.done = True

    def result(self) -> T:
        """Hand out the result."""
        return self._result

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Add to whatever ends the query early how far it was: the best so far."""
        try:
            yield
        except BaseException as stopped:
            if self._latest is not None:
                stopped.add_note(
                    f"{self.rpc.name} had {self._latest} when it was stopped"
                )
            raise

    def _request(self) -> Iterator[Part]:
        if self._operands is None:
            yield self._message
            return
        yield self.rpc.request.message(header=self._message)
        header, start = {}, 0
        for name, (value, shape) in self._operands.items():
            dtype = "F64" if value.dtype == np.float64 else "F32"
            header[name] = wire.TensorHeader(dtype, shape, start)
            start = header[name].stop
        yield memoryview(wire.dump_header(header))
        yield from wire.packed(
            wire.bytes_of(piece)
            for value, _ in self._operands.values()
            for piece in value.values()
        )

    def _malformed(self, why: object) -> Internal:
        msg = f"the server's answer to {self.rpc.name} breaks the contract: {why!r}"
        return Internal(msg, rpc=self.rpc.name)


class Queries:
    """Makes the calls of one operator.

    Args:
        session: The session whose parameters it acts on.
        spec: Which operator.
        expected_version: Refuse to compute at another parameter version.
    """

    def __init__(
        self, session: SessionInfo, spec: OperatorSpec, expected_version: int | None
    ) -> None:
        self._session, self._spec = session, spec
        self._expected_version = expected_version
        self._column_bytes = session.layout.size * vector_dtype(session.dtype).itemsize

    def eigsh(
        self,
        k: int,
        which: Which | str,
        tolerance: float,
        basis_size: int,
        seed: int,
        warm_start: bool,
        vectors: bool,
        max_products: int | None,
        time_limit_s: float | None,
    ) -> QueryCall[Eigenpairs]:
        """Ask for extremal eigenpairs."""
        request = query_pb.EigshRequest(
            query=self._query(max_products, time_limit_s),
            k=k,
            which=convert.which_to_proto(types.member(Which, which, "which")),
            tolerance=tolerance,
            basis_size=basis_size,
            seed=seed,
            warm_start=warm_start,
            values_only=not vectors,
        )

        def read(header: Any, summary: Any, arrays: Arrays) -> Eigenpairs:
            return Eigenpairs(
                info=_info(header, summary.query),
                values=np.array(summary.values),
                vectors=arrays["vectors"].T if vectors else None,
                residuals=np.array(summary.residuals),
                tolerances=np.array(summary.tolerances),
                asymmetry=summary.asymmetry,
                restarts=summary.restarts,
                warm=summary.warm,
            )

        nbytes = k * self._column_bytes
        return QueryCall("Eigsh", request, read, max_bytes=nbytes)

    def trace(
        self,
        estimator: Estimator | str,
        relative_error: float,
        absolute_error: float,
        samples: int,
        seed: int,
        max_products: int | None,
        time_limit_s: float | None,
    ) -> QueryCall[Estimate]:
        """Ask for the trace."""
        request = query_pb.TraceRequest(
            query=self._query(max_products, time_limit_s),
            estimator=_estimator(estimator),
            accuracy=_accuracy(relative_error, absolute_error, samples, seed),
        )
        return QueryCall("Trace", request, _estimate)

    def diagonal(
        self,
        estimator: Estimator | str,
        relative_error: float,
        absolute_error: float,
        samples: int,
        seed: int,
        max_products: int | None,
        time_limit_s: float | None,
    ) -> QueryCall[DiagonalEstimate]:
        """Ask for the diagonal."""
        request = query_pb.DiagonalRequest(
            query=self._query(max_products, time_limit_s),
            estimator=_estimator(estimator),
            accuracy=_accuracy(relative_error, absolute_error, samples, seed),
        )

        def read(header: Any, summary: Any, arrays: Arrays) -> DiagonalEstimate:
            return DiagonalEstimate(
                info=_info(header, summary.query),
                values=arrays["diagonal"],
                standard_errors=arrays["standard_errors"],
                samples=summary.samples,
                quantile=summary.quantile,
            )

        nbytes = 2 * self._column_bytes
        return QueryCall("Diagonal", request, read, max_bytes=nbytes)

    def frobenius_norm(
        self,
        relative_error: float,
        absolute_error: float,
        samples: int,
        seed: int,
        max_products: int | None,
        time_limit_s: float | None,
    ) -> QueryCall[Estimate]:
        """Ask for the Frobenius norm."""
        request = query_pb.FrobeniusNormRequest(
            query=self._query(max_products, time_limit_s),
            accuracy=_accuracy(relative_error, absolute_error, samples, seed),
        )
        return QueryCall("FrobeniusNorm", request, _estimate)

    def spectral_density(
        self,
        probes: int,
        steps: int,
        points: int,
        width: float | None,
        logarithmic: bool,
        floor: float | None,
        seed: int,
        max_products: int | None,
        time_limit_s: float | None,
    ) -> QueryCall[Density]:
        """Ask for the density of eigenvalues."""
        request = query_pb.SpectralDensityRequest(
            query=self._query(max_products, time_limit_s),
            probes=probes,
            steps=steps,
            points=points,
            width=width,
            logarithmic=logarithmic,
            floor=floor,
            seed=seed,
        )

        def read(header: Any, summary: Any, arrays: Arrays) -> Density:
            return Density(
                info=_info(header, summary.query),
                grid=arrays["grid"],
                density=arrays["density"],
                standard_error=arrays["standard_error"],
                half_width=arrays["half_width"],
                nodes=arrays["nodes"],
                weights=arrays["weights"],
                width=summary.width,
                logarithmic=logarithmic,
            )

        nbytes = 8 * (4 * points + 2 * probes * steps)
        return QueryCall("SpectralDensity", request, read, max_bytes=nbytes)

    def solve(
        self,
        b: Any,
        solver: Solver | str,
        damping: float,
        tolerance: float,
        x0: Any,
        preconditioner: Any,
        seed: int,
        max_products: int | None,
        time_limit_s: float | None,
    ) -> QueryCall[Solution]:
        """Ask for solutions of linear systems."""
        samples = preconditioner if isinstance(preconditioner, int) else 0
        request = query_pb.SolveHeader(
            query=self._query(max_products, time_limit_s),
            solver=convert.solver_to_proto(types.member(Solver, solver, "solver")),
            damping=damping,
            tolerance=tolerance,
            diagonal_samples=samples,
            seed=seed,
        )
        given = {"b": self._operand(b)}
        if x0 is not None:
            given["x0"] = self._operand(x0)
            if given["x0"].columns != given["b"].columns:
                msg = (
                    f"x0 has {given['x0'].columns} columns and b has "
                    f"{given['b'].columns}; they must be alike"
                )
                raise InvalidVector(msg, columns=given["x0"].columns)
        size, target = self._session.layout.size, given["b"]
        columns = 1 if target.columns is None else target.columns
        shapes: dict[str, tuple[Operand, tuple[int, ...]]] = {
            name: (value, (columns, size)) for name, value in given.items()
        }
        if preconditioner is not None and not samples:
            shapes["preconditioner"] = (self._operand(preconditioner), (size,))

        def read(header: Any, summary: Any, arrays: Arrays) -> Solution:
            return Solution(
                info=_info(header, summary.query),
                x=target.restore(arrays["x"].reshape(target.shape)),
                residuals=np.array(summary.residuals),
                relative_residuals=np.array(summary.relative_residuals),
                curvatures=np.array(summary.curvatures),
                indefinite=tuple(summary.indefinite),
                column_stops=tuple(map(convert.stop_from_proto, summary.column_stops)),
                iterations=summary.iterations,
            )

        nbytes = columns * self._column_bytes
        return QueryCall("Solve", request, read, operands=shapes, max_bytes=nbytes)

    def logdet(
        self,
        damping: float,
        steps: int,
        relative_error: float,
        absolute_error: float,
        probes: int,
        seed: int,
        max_products: int | None,
        time_limit_s: float | None,
    ) -> QueryCall[LogDeterminant]:
        """Ask for the logarithm of the determinant."""
        request = query_pb.LogDetRequest(
            query=self._query(max_products, time_limit_s),
            damping=damping,
            steps=steps,
            accuracy=_accuracy(relative_error, absolute_error, probes, seed),
        )

        def read(header: Any, summary: Any, arrays: Arrays) -> LogDeterminant:
            found = summary.estimate
            return LogDeterminant(
                info=_info(header, found.query),
                value=found.value,
                standard_error=found.standard_error,
                half_width=found.half_width,
                samples=found.samples,
                smallest=summary.smallest,
            )

        return QueryCall("LogDet", request, read)

    def _operand(self, value: Any) -> Operand:
        return operand(value, self._session.layout, self._session.dtype)

    def _query(
        self, max_products: int | None, time_limit_s: float | None
    ) -> query_pb.Query:
        return query_pb.Query(
            session_id=self._session.id,
            operator=convert.operator_to_proto(self._spec),
            expected_version=self._expected_version,
            request_id=uuid.uuid4().hex,
            max_products=max_products,
            time_limit_s=time_limit_s,
        )


def _estimate(header: Any, summary: Any, arrays: Arrays) -> Estimate:
    return Estimate(
        info=_info(header, summary.query),
        value=summary.value,
        standard_error=summary.standard_error,
        half_width=summary.half_width,
        samples=summary.samples,
    )


def _info(header: Any, summary: Any) -> QueryInfo:
    return QueryInfo(
        version=header.version,
        parameters_digest=header.parameters_digest,
        model_id=header.model_id,
        dataset_id=header.dataset_id,
        plan=convert.plan_from_proto(header.plan),
        stopped=convert.stop_from_proto(summary.stopped),
        products=summary.products,
        elapsed_s=summary.elapsed_s,
        queue_s=summary.queue_s,
        compute_s=summary.compute_s,
    )


def _progress(message: Any) -> QueryProgress:
    return QueryProgress(
        iteration=message.iteration,
        products=message.products,
        estimates=tuple(message.estimates),
        residuals=tuple(message.residuals),
        elapsed_s=message.elapsed_s,
    )


def _accuracy(
    relative_error: float, absolute_error: float, samples: int, seed: int
) -> query_pb.Accuracy:
    return query_pb.Accuracy(
        relative_error=relative_error,
        absolute_error=absolute_error,
        samples=samples,
        seed=seed,
    )


def _estimator(value: Estimator | str) -> str:
    return convert.estimator_to_proto(types.member(Estimator, value, "estimator"))
