"""Records of the catalogue: what they hold, and how they are read from rows and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from google.protobuf.message import DecodeError

from curvd.contract import (
    DatasetInfo,
    ModelInfo,
    SerializedGraph,
    SessionInfo,
    convert_sessions,
)
from curvd.errors import CurvdError
from curvd.v1 import session_service_pb2 as session_pb
from curvd_server.storage.database import Row
from curvd_server.storage.ranges import LONGEST_LEASE_S

UNREADABLE = (DecodeError, CurvdError, ValueError, TypeError, KeyError, OverflowError)
"""What reading a record raises that holds no sense."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """A registered model."""

    info: ModelInfo
    digest: str
    """Of the blob with its state."""
    ties: Mapping[str, str]
    """Further name of a tied tensor -> the name that it goes by."""
    buffers: frozenset[str] = frozenset()
    """Tensors that are no parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDataset:
    """A registered dataset."""

    info: DatasetInfo
    digest: str
    """Of the blob with its tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSession:
    """A session as it comes back after a restart."""

    info: SessionInfo
    lease_s: float | None
    request_id: str
    fingerprint: str
    """Hash of the request that made it."""
    sources: Mapping[str, str]
    """Tensor name -> digest of the blob with its current values; the rest are the
    model's."""
    remaining_s: float | None = None
    """Of the lease, as far as that was written down; None: all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredVersion:
    """One version of a session's parameters."""

    version: int
    parameters_digest: str
    request_id: str
    fingerprint: str
    """Hash of the request that made it."""


def owner_of(table: str, row: Row) -> tuple[str, tuple[str, ...]]:
    """Read whose a row's thing is, and whom it is shared with; damaged: nobody's."""
    kinds: Mapping[
        str, type[session_pb.Model | session_pb.Dataset | session_pb.Session]
    ]
    kinds = {
        "models": session_pb.Model,
        "datasets": session_pb.Dataset,
        "sessions": session_pb.Session,
    }
    try:
        record = kinds[table].FromString(row["record"])
    except UNREADABLE:
        return "", ()
    return record.owner, tuple(record.shared_with)


def model_row(model: StoredModel) -> dict[str, object]:
    """Write a model."""
    return {
        "id": model.info.id,
        "digest": model.digest,
        "record": convert_sessions.model_to_proto(model.info).SerializeToString(),
        "ties": json.dumps(dict(model.ties)),
        "graph": bytes(model.info.spec.graph),
        "buffers": json.dumps(sorted(model.buffers)),
    }


def model_of(row: Row) -> StoredModel:
    """Read a model; any of `UNREADABLE` if the row holds none."""
    info = convert_sessions.model_from_proto(session_pb.Model.FromString(row["record"]))
    spec = replace(info.spec, graph=SerializedGraph(row["graph"]))
    return StoredModel(
        info=replace(info, spec=spec),
        digest=row["digest"],
        ties=json.loads(row["ties"]),
        buffers=frozenset(json.loads(row["buffers"])),
    )


def dataset_row(dataset: StoredDataset) -> dict[str, object]:
    """Write a dataset."""
    record = convert_sessions.dataset_to_proto(dataset.info).SerializeToString()
    return {"id": dataset.info.id, "digest": dataset.digest, "record": record}


def dataset_of(row: Row) -> StoredDataset:
    """Read a dataset; any of `UNREADABLE` if the row holds none."""
    record = session_pb.Dataset.FromString(row["record"])
    info = convert_sessions.dataset_from_proto(record)
    return StoredDataset(info=info, digest=row["digest"])


def record_of(info: SessionInfo) -> bytes:
    """Write what is known of a session."""
    return convert_sessions.session_to_proto(info).SerializeToString()


def session_row(session: StoredSession) -> dict[str, object]:
    """Write a session."""
    return {
        "id": session.info.id,
        "record": record_of(session.info),
        "lease_s": session.lease_s,
        "request_id": session.request_id,
        "fingerprint": session.fingerprint,
        "sources": json.dumps(dict(session.sources)),
    }


def session_of(row: Row) -> StoredSession:
    """Read a session; any of `UNREADABLE` if the row holds none."""
    record = session_pb.Session.FromString(row["record"])
    info = convert_sessions.session_from_proto(record)
    record_of(info)  # what cannot be told again would fail whoever lists the sessions
    lease_s = row["lease_s"]
    return StoredSession(
        info=info,
        # Older servers took any length.
        lease_s=None if lease_s is None else min(lease_s, LONGEST_LEASE_S),
        request_id=row["request_id"],
        fingerprint=row["fingerprint"],
        sources=json.loads(row["sources"]),
        remaining_s=row["remaining_s"],
    )
