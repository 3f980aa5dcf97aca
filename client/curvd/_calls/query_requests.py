"""Queries of an operator or a session as calls, made of their options."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from numpy.typing import NDArray

from curvd._calls.query import QueryCall, Read
from curvd._calls.query_answer import Answer
from curvd._calls.tensor_stream import OWN_TYPE
from curvd.contract import (
    OperatorSpec,
    ParameterLayout,
    Probe,
    QueryOptions,
    SessionInfo,
    StoredVector,
    convert,
    most_products,
    query_messages,
)
from curvd.errors import InvalidVector
from curvd.tensors import Operand, operand, vector_dtype
from curvd.v1 import query_service_pb2 as query_pb

T = TypeVar("T")


class Queries:
    """Makes the calls of one operator, or of a session.

    Args:
        session: The session whose parameters it acts on.
        spec: The operator; None: queries are about the session's data points.
        expected_version: Refuse to compute at another parameter version.
    """

    def __init__(
        self,
        session: SessionInfo,
        spec: OperatorSpec | None = None,
        expected_version: int | None = None,
    ) -> None:
        self.session, self._spec = session, spec
        self._expected_version = expected_version

    @property
    def column_bytes(self) -> int:
        """Memory of one vector of the operator."""
        itemsize: int = vector_dtype(self.session.dtype).itemsize
        return self.session.layout.size * itemsize

    def without_scale(self, values: Iterable[float]) -> tuple[float, ...]:
        """Take the operator's scale and damping off eigenvalues, as the server does."""
        assert self._spec is not None
        scale, damping = self._spec.scale, self._spec.damping
        return tuple((value - damping) / scale for value in values if scale)

    def operand(self, value: Any, layout: ParameterLayout | None = None) -> Operand:
        """Check an operand against the operator's layout, or another, and type."""
        if isinstance(value, Probe):
            msg = (
                "a Probe is an operand of products alone: pass its values, from "
                "curvd.tensors.probes, or store a product, H.multiply(probe, store='b')"
            )
            raise InvalidVector(msg)
        return operand(value, layout or self.session.layout, self.session.dtype)

    def stored(self, name: str, shape: tuple[int, ...], answer: Answer) -> StoredVector:
        """Describe what an answer says to be stored.

        Args:
            name: Its name.
            shape: [P] or [K, P].
            answer: The answer.

        Returns:
            What stands for it.
        """
        return StoredVector(
            name=name,
            shape=shape,
            dtype=OWN_TYPE[vector_dtype(self.session.dtype)],
            version=answer.header.version,
        )

    def call(
        self,
        rpc: str,
        options: QueryOptions,
        read: Read[T],
        *,
        operands: Mapping[str, tuple[Operand, tuple[int, ...]]] | None = None,
        arrays: Mapping[str, NDArray[Any]] | None = None,
        max_bytes: int = 0,
        **fields: Any,
    ) -> QueryCall[T]:
        """Make the call of a query.

        Args:
            rpc: The name of its method.
            options: What to ask for.
            read: Makes the result.
            operands: Tensors to send, by name, with their shapes.
            arrays: Tensors to send, by name, of any type, in place of operands.
            max_bytes: Largest result.
            **fields: What the request says beside the options.

        Returns:
            The call.
        """
        spec = self._spec
        query = query_pb.Query(
            session_id=self.session.id,
            operator=None if spec is None else convert.operator_to_proto(spec),
            expected_version=self._expected_version,
            request_id=uuid.uuid4().hex,
        )
        request = query_messages.request_type(rpc)(query=query, **fields)
        query_messages.write(options, request)
        return QueryCall(
            rpc,
            request,
            read,
            operands=operands,
            arrays=arrays,
            max_bytes=max_bytes,
            total=most_products(rpc, options, self.session.data_points),
        )
