"""What must outlive the process: models, datasets, sessions and parameter versions.

One SQLite file. A method returns when its change is on the disk, so what a client was
told is there after a crash. Records are the contract's own messages: a newer curvd
reads what an older one wrote. Methods block; call them off the event loop.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from curvd import convert
from curvd.errors import DatasetNotFound, FailedPrecondition, ModelNotFound
from curvd.reports import DatasetInfo, ModelInfo, SessionInfo
from curvd.types import SerializedGraph
from curvd.v1 import session_service_pb2 as session_pb

SCHEMA_VERSION = 2
_KEPT_VERSIONS = 1000
_SCHEMA = """
CREATE TABLE models (
    id TEXT PRIMARY KEY, digest TEXT NOT NULL, record BLOB NOT NULL,
    ties TEXT NOT NULL, graph BLOB NOT NULL DEFAULT x'') STRICT;
CREATE TABLE datasets (
    id TEXT PRIMARY KEY, digest TEXT NOT NULL, record BLOB NOT NULL) STRICT;
CREATE TABLE sessions (
    ordinal INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    record BLOB NOT NULL, lease_s REAL, request_id TEXT NOT NULL,
    fingerprint TEXT NOT NULL, sources TEXT NOT NULL) STRICT;
CREATE TABLE versions (
    session_id TEXT NOT NULL REFERENCES sessions(id) ON DELETE CASCADE,
    version INTEGER NOT NULL, parameters_digest TEXT NOT NULL,
    request_id TEXT NOT NULL, fingerprint TEXT NOT NULL,
    PRIMARY KEY (session_id, version)) STRICT;
"""
# note: outside the schema, because what it holds may be lost at any time.
_PLANS = """
CREATE TABLE IF NOT EXISTS plans (key TEXT PRIMARY KEY, plan TEXT NOT NULL) STRICT;
"""


_MIGRATIONS = {
    1: "ALTER TABLE models ADD COLUMN graph BLOB NOT NULL DEFAULT x'';",
}
"""From each older schema to the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """A registered model."""

    info: ModelInfo
    digest: str
    """Of the blob with its state."""
    ties: Mapping[str, str]
    """Further name of a tied tensor -> the name that it goes by."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredVersion:
    """One version of a session's parameters."""

    version: int
    parameters_digest: str
    request_id: str
    fingerprint: str
    """Hash of the request that made it."""


class Catalogue:
    """The one SQLite file of a server.

    Args:
        path: Of the file; made if it is not there.

    Raises:
        FailedPrecondition: If a newer curvd wrote it.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        (found,) = self._db.execute("PRAGMA user_version").fetchone()
        if found not in (0, *_MIGRATIONS, SCHEMA_VERSION):
            msg = (
                f"{path} has schema {found}, this curvd reads {SCHEMA_VERSION}: run the "
                "version that wrote it, or use another data directory"
            )
            raise FailedPrecondition(msg, found=found, known=SCHEMA_VERSION)
        if found != SCHEMA_VERSION:
            older = range(found, SCHEMA_VERSION)
            change = "".join(_MIGRATIONS[v] for v in older) if found else _SCHEMA
            self._db.executescript(
                f"BEGIN; {change} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
            )
        self._db.executescript(_PLANS)
        self.plans = Plans(self)
        """How operators were computed, so that they round the same after a restart."""

    def add_model(self, model: StoredModel) -> None:
        """Keep a model; one that is there already stays."""
        self.write(
            "INSERT OR IGNORE INTO models (id, digest, record, ties, graph)"
            " VALUES (?, ?, ?, ?, ?)",
            model.info.id,
            model.digest,
            convert.model_to_proto(model.info).SerializeToString(),
            json.dumps(dict(model.ties)),
            model.info.spec.graph,
        )

    def model(self, model_id: str) -> StoredModel:
        """Find a model.

        Raises:
            ModelNotFound: If it is not registered.
        """
        rows = self.read(
            "SELECT digest, record, ties, graph FROM models WHERE id = ?", model_id
        )
        if not rows:
            msg = f"no model {model_id!r} on this server; register it first"
            raise ModelNotFound(msg, model_id=model_id)
        digest, record, ties, graph = rows[0]
        info = convert.model_from_proto(session_pb.Model.FromString(record))
        info = replace(info, spec=replace(info.spec, graph=SerializedGraph(graph)))
        return StoredModel(info=info, digest=digest, ties=json.loads(ties))

    def add_dataset(self, dataset: StoredDataset) -> None:
        """Keep a dataset; one that is there already stays."""
        self.write(
            "INSERT OR IGNORE INTO datasets VALUES (?, ?, ?)",
            dataset.info.id,
            dataset.digest,
            convert.dataset_to_proto(dataset.info).SerializeToString(),
        )

    def dataset(self, dataset_id: str) -> StoredDataset:
        """Find a dataset.

        Raises:
            DatasetNotFound: If it is not registered.
        """
        rows = self.read("SELECT digest, record FROM datasets WHERE id = ?", dataset_id)
        if not rows:
            msg = f"no dataset {dataset_id!r} on this server; register it first"
            raise DatasetNotFound(msg, dataset_id=dataset_id)
        digest, record = rows[0]
        info = convert.dataset_from_proto(session_pb.Dataset.FromString(record))
        return StoredDataset(info=info, digest=digest)

    def add_session(self, session: StoredSession) -> None:
        """Keep a new session and its first version."""
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(
                "INSERT INTO sessions (id, record, lease_s, request_id, fingerprint,"
                " sources) VALUES (?, ?, ?, ?, ?, ?)",
                (
                    session.info.id,
                    _session_record(session.info),
                    session.lease_s,
                    session.request_id,
                    session.fingerprint,
                    json.dumps(dict(session.sources)),
                ),
            )

    def set_lease(self, session_id: str, lease_s: float | None) -> None:
        """Keep the length of a session's lease."""
        self.write("UPDATE sessions SET lease_s = ? WHERE id = ?", lease_s, session_id)

    def add_version(
        self, info: SessionInfo, version: StoredVersion, sources: Mapping[str, str]
    ) -> None:
        """Move a session to a new version of its parameters.

        Args:
            info: The session at the new version.
            version: The version, and which request made it.
            sources: As in `StoredSession`.
        """
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(
                "UPDATE sessions SET record = ?, sources = ? WHERE id = ?",
                (_session_record(info), json.dumps(dict(sources)), info.id),
            )
            self._db.execute(
                "INSERT INTO versions VALUES (?, ?, ?, ?, ?)",
                (
                    info.id,
                    version.version,
                    version.parameters_digest,
                    version.request_id,
                    version.fingerprint,
                ),
            )
            self._db.execute(
                "DELETE FROM versions WHERE session_id = ? AND version <= ?",
                (info.id, version.version - _KEPT_VERSIONS),
            )

    def version_of(self, session_id: str, request_id: str) -> StoredVersion | None:
        """Find the version that a request made; the last thousand are remembered."""
        rows = self.read(
            "SELECT version, parameters_digest, request_id, fingerprint FROM versions"
            " WHERE session_id = ? AND request_id = ?",
            session_id,
            request_id,
        )
        names = ("version", "parameters_digest", "request_id", "fingerprint")
        return StoredVersion(**dict(zip(names, rows[0], strict=True))) if rows else None

    def sessions(self) -> list[StoredSession]:
        """Read all sessions, oldest first."""
        return [
            StoredSession(
                info=convert.session_from_proto(session_pb.Session.FromString(record)),
                lease_s=lease_s,
                request_id=request_id,
                fingerprint=fingerprint,
                sources=json.loads(sources),
            )
            for record, lease_s, request_id, fingerprint, sources in self.read(
                "SELECT record, lease_s, request_id, fingerprint, sources FROM sessions"
                " ORDER BY ordinal"
            )
        ]

    def delete_session(self, session_id: str) -> None:
        """Forget a session and its versions."""
        self.write("DELETE FROM sessions WHERE id = ?", session_id)

    def referenced(self) -> set[str]:
        """Collect the digests of all blobs that something needs."""
        digests = {
            digest
            for table in ("models", "datasets")
            for (digest,) in self.read(f"SELECT digest FROM {table}")
        }
        for (sources,) in self.read("SELECT sources FROM sessions"):
            digests.update(json.loads(sources).values())
        return digests

    def needed_by(self, digest: str) -> list[str]:
        """Name what a blob is needed by, for whoever has to be told that it is lost."""
        models = [
            i for (i,) in self.read("SELECT id FROM models WHERE digest=?", digest)
        ]
        data = [
            i for (i,) in self.read("SELECT id FROM datasets WHERE digest=?", digest)
        ]
        sessions = [
            s.info.id
            for s in self.sessions()
            if s.info.model_id in models
            or s.info.dataset_id in data
            or digest in s.sources.values()
        ]
        return [
            *(f"model {i}" for i in models),
            *(f"dataset {i}" for i in data),
            *(f"session {i}" for i in sessions),
        ]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def read(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Run a query."""
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def write(self, sql: str, *values: object) -> None:
        """Change something, on the disk when this returns."""
        with self._lock:
            self._db.execute(sql, values)


class Plans:
    """Plans by structure.

    Args:
        catalogue: Where they are kept.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def get(self, key: str, default: str) -> str:
        """Look one up."""
        rows = self._catalogue.read("SELECT plan FROM plans WHERE key = ?", key)
        return str(rows[0][0]) if rows else default

    def __setitem__(self, key: str, plan: str) -> None:
        """Keep one."""
        self._catalogue.write("INSERT OR REPLACE INTO plans VALUES (?, ?)", key, plan)


def _session_record(info: SessionInfo) -> bytes:
    return convert.session_to_proto(info).SerializeToString()
