"""Requests of queries, and how their results are read; see `curvd._calls.query`."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np

from curvd._calls.query import Arrays, QueryCall
from curvd._calls.tensor_stream import OWN_TYPE
from curvd.contract import (
    Estimator,
    OperatorSpec,
    SessionInfo,
    Solver,
    StoredVector,
    Which,
    convert,
    convert_enums,
    enums,
)
from curvd.errors import InvalidSpec, InvalidVector
from curvd.results import (
    Density,
    DiagonalEstimate,
    Eigenpairs,
    Estimate,
    LogDeterminant,
    QueryInfo,
    Solution,
)
from curvd.tensors import Operand, operand, vector_dtype
from curvd.v1 import query_service_pb2 as query_pb


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
        start: StoredVector | str | None,
        store: str | None,
        max_products: int | None,
        time_limit_s: float | None,
    ) -> QueryCall[Eigenpairs]:
        """Ask for extremal eigenpairs."""
        if store == "":
            msg = "stored vectors need a name, at least one character"
            raise InvalidSpec(msg, store=store)
        fetch = vectors and store is None
        request = query_pb.EigshRequest(
            query=self._query(max_products, time_limit_s),
            k=k,
            which=convert_enums.which_to_proto(enums.member(Which, which, "which")),
            tolerance=tolerance,
            basis_size=basis_size,
            seed=seed,
            warm_start=warm_start,
            values_only=not fetch,
            store_as=store,
            start=start.name if isinstance(start, StoredVector) else start,
        )

        def read(header: Any, summary: Any, arrays: Arrays) -> Eigenpairs:
            return Eigenpairs(
                info=_info(header, summary.query),
                values=np.array(summary.values),
                vectors=arrays["vectors"].T if fetch else None,
                stored=None if store is None else self._stored(store, header, summary),
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
        max_products: int | None,
        time_limit_s: float | None,
    ) -> QueryCall[Solution]:
        """Ask for solutions of linear systems."""
        if isinstance(preconditioner, int):
            msg = (
                f"preconditioner must be a diagonal, [P], got {preconditioner}: one that "
                "is estimated from products made CG slower; leave it out"
            )
            raise InvalidSpec(msg, preconditioner=preconditioner)
        request = query_pb.SolveHeader(
            query=self._query(max_products, time_limit_s),
            solver=convert_enums.solver_to_proto(
                enums.member(Solver, solver, "solver")
            ),
            damping=damping,
            tolerance=tolerance,
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
        if preconditioner is not None:
            shapes["preconditioner"] = (self._operand(preconditioner), (size,))

        def read(header: Any, summary: Any, arrays: Arrays) -> Solution:
            return Solution(
                info=_info(header, summary.query),
                x=target.restore(arrays["x"].reshape(target.shape)),
                residuals=np.array(summary.residuals),
                relative_residuals=np.array(summary.relative_residuals),
                curvatures=np.array(summary.curvatures),
                indefinite=tuple(summary.indefinite),
                column_stops=tuple(
                    map(convert_enums.stop_from_proto, summary.column_stops)
                ),
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

    def _stored(self, name: str, header: Any, summary: Any) -> StoredVector:
        return StoredVector(
            name=name,
            shape=(len(summary.values), self._session.layout.size),
            dtype=OWN_TYPE[vector_dtype(self._session.dtype)],
            version=header.version,
        )

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
        stopped=convert_enums.stop_from_proto(summary.stopped),
        products=summary.products,
        elapsed_s=summary.elapsed_s,
        queue_s=summary.queue_s,
        compute_s=summary.compute_s,
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
    return convert_enums.estimator_to_proto(enums.member(Estimator, value, "estimator"))
