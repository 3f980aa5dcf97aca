"""What a query answered, and how a result is made of it: fields by their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from numpy.typing import NDArray

from curvd.contract import (
    QueryInfo,
    QueryProgress,
    convert,
    convert_enums,
    query_messages,
)

R = TypeVar("R")
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Answer:
    """Header, summary and tensors of a query."""

    header: Any
    summary: Any
    arrays: Arrays
    history: tuple[QueryProgress, ...] = ()
    """What was known on the way."""

    def result(self, kind: type[R], **own: Any) -> R:
        """Make a result of the tensors and of the summary, by the names of its fields.

        Args:
            kind: The result's dataclass.
            **own: Fields that are neither a tensor nor in the summary.

        Returns:
            The result.

        Raises:
            LookupError: If a field is nowhere.
        """
        values: dict[str, Any] = {"info": self._info(), "history": self.history}
        values |= {**self.arrays, **own}
        for field in _fields(kind):
            if field.name not in values:
                values[field.name] = self._summarised(field.name)
        return kind(**{field.name: values[field.name] for field in _fields(kind)})

    def _summarised(self, name: str) -> Any:
        value, field = query_messages.find(name, self.summary)
        many = hasattr(value, "append")
        if field.enum_type is not None:
            stops = tuple(
                map(convert_enums.stop_from_proto, value if many else [value])
            )
            return stops if many else stops[0]
        if many and field.cpp_type != FieldDescriptor.CPPTYPE_BOOL:
            return np.array(value)
        return tuple(value) if many else value

    def _info(self) -> QueryInfo:
        header, (summary, _) = self.header, query_messages.find("query", self.summary)
        return QueryInfo(
            version=header.version,
            parameters_digest=header.parameters_digest,
            model_id=header.model_id,
            dataset_id=header.dataset_id,
            plan=(
                convert.plan_from_proto(header.plan)
                if header.HasField("plan")
                else None
            ),
            stopped=convert_enums.stop_from_proto(summary.stopped),
            products=summary.products,
            elapsed_s=summary.elapsed_s,
            queue_s=summary.queue_s,
            compute_s=summary.compute_s,
            plans=tuple(map(convert.plan_from_proto, summary.plans)),
        )


def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)
