"""What must outlive the process: models, datasets, sessions and parameter versions.

A method returns when its change is on the disk, so what a client was told is there
after a crash. Records are the contract's own messages: a newer curvd reads what an
older one wrote. A record that cannot be read is left alone and named; the others are
there. Methods block; call them off the event loop.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from curvd.contract import DatasetInfo, ModelInfo, SessionInfo
from curvd.errors import CurvdError, DataLoss, DatasetNotFound, ModelNotFound
from curvd_server.storage.database import Database, Row, Statement
from curvd_server.storage.records import (
    UNREADABLE,
    StoredDataset,
    StoredModel,
    StoredSession,
    StoredVersion,
    dataset_of,
    dataset_row,
    model_of,
    model_row,
    owner_of,
    record_of,
    session_of,
    session_row,
)
from curvd_server.storage.schema import SCHEMA
from curvd_server.system import calling, logger

T = TypeVar("T")
S = TypeVar("S", StoredModel, StoredDataset)

_KEPT_VERSIONS = 1000


class Catalogue:
    """The records of one data directory.

    Args:
        path: The path of their file; made if the data directory has no blobs either.

    Raises:
        FailedPrecondition: If a newer curvd wrote it, or it is damaged beyond repair.
    """

    def __init__(self, path: Path) -> None:
        blobs = path.parent / "blobs"
        is_new = not blobs.exists() or not any(blobs.iterdir())
        self._db = Database(path, SCHEMA, is_new=is_new)
        self._changing = threading.Lock()
        self.plans = Plans(self._db)
        """How operators were computed, so that they round the same after a restart."""

    def add_model(self, model: StoredModel) -> None:
        """Keep a model."""
        self._db.write(self._db.put("models", model_row(model)))

    def model(self, model_id: str) -> StoredModel:
        """Find a model.

        Raises:
            ModelNotFound: If it is not registered.
            DataLoss: If its record was damaged.
        """
        for row, sound in self._db.rows("models", id=model_id):
            return self._read("model", model_id, row, sound, model_of)
        raise _no_model(model_id)

    def visible_model(self, model_id: str) -> StoredModel:
        """Find a model that the caller may know of; to others it does not exist.

        Raises:
            ModelNotFound: If there is none.
            DataLoss: If its record was damaged.
        """
        model = self.model(model_id)
        if not calling().sees(model.info.owner, model.info.shared_with):
            raise _no_model(model_id)
        return model

    def usable_model(self, model_id: str) -> StoredModel:
        """Find a model that the caller may use; to others it does not exist.

        Raises:
            ModelNotFound: If there is none.
            DataLoss: If its record was damaged.
        """
        model = self.model(model_id)
        if not calling().uses(model.info.owner, model.info.shared_with):
            raise _no_model(model_id)
        return model

    def add_dataset(self, dataset: StoredDataset) -> None:
        """Keep a dataset."""
        self._db.write(self._db.put("datasets", dataset_row(dataset)))

    def dataset(self, dataset_id: str) -> StoredDataset:
        """Find a dataset.

        Raises:
            DatasetNotFound: If it is not registered.
            DataLoss: If its record was damaged.
        """
        for row, sound in self._db.rows("datasets", id=dataset_id):
            return self._read("dataset", dataset_id, row, sound, dataset_of)
        raise _no_dataset(dataset_id)

    def visible_dataset(self, dataset_id: str) -> StoredDataset:
        """Find a dataset that the caller may know of; to others it does not exist.

        Raises:
            DatasetNotFound: If there is none.
            DataLoss: If its record was damaged.
        """
        dataset = self.dataset(dataset_id)
        if not calling().sees(dataset.info.owner, dataset.info.shared_with):
            raise _no_dataset(dataset_id)
        return dataset

    def usable_dataset(self, dataset_id: str) -> StoredDataset:
        """Find a dataset that the caller may use; to others it does not exist.

        Raises:
            DatasetNotFound: If there is none.
            DataLoss: If its record was damaged.
        """
        dataset = self.dataset(dataset_id)
        if not calling().uses(dataset.info.owner, dataset.info.shared_with):
            raise _no_dataset(dataset_id)
        return dataset

    def visible_models(self, after: int = 0) -> Iterator[tuple[int, ModelInfo]]:
        """Find the models that the caller may know of, oldest first.

        Args:
            after: Number of the last one that is known already; 0: none is.

        Yields:
            Number and model. One that cannot be read is left out.
        """
        for ordinal, model in self._visible("models", after, model_of):
            yield ordinal, model.info

    def visible_datasets(self, after: int = 0) -> Iterator[tuple[int, DatasetInfo]]:
        """Find the datasets that the caller may know of; as `visible_models`.

        Args:
            after: Number of the last one that is known already; 0: none is.

        Yields:
            Number and dataset.
        """
        for ordinal, dataset in self._visible("datasets", after, dataset_of):
            yield ordinal, dataset.info

    def _visible(
        self, table: str, after: int, read: Callable[[Row], S]
    ) -> Iterator[tuple[int, S]]:
        for ordinal, row, sound in self._db.after(table, after):
            if sound and calling().sees(*owner_of(table, row)):
                try:
                    found = read(row)
                except UNREADABLE:  # a newer curvd wrote it, perhaps
                    continue
                yield ordinal, found

    def add_session(self, session: StoredSession) -> None:
        """Keep a new session and its first version."""
        self._db.write(self._db.put("sessions", session_row(session)))

    def set_lease(self, session_id: str, lease_s: float | None) -> None:
        """Keep a new length of a session's lease, and all of it as what remains."""
        with self._changing:
            changed = self._changed(session_id, lease_s=lease_s)
            self._db.write(*changed, _remaining(session_id, None))

    def set_remaining(self, remaining_s: Mapping[str, float | None]) -> None:
        """Keep what remains of leases.

        Args:
            remaining_s: Session id -> seconds; None: all of it.
        """
        if remaining_s:
            self._db.write(*(_remaining(*item) for item in remaining_s.items()))

    def add_version(
        self,
        infos: Sequence[SessionInfo],
        version: StoredVersion,
        sources: Mapping[str, str],
    ) -> None:
        """Move the sessions that share parameters to a new version of them, or none.

        Args:
            infos: The sessions at the new version.
            version: The version, and which request made it.
            sources: As in `StoredSession`.
        """
        with self._changing:
            self._db.write(
                *(s for i in infos for s in self._moved(i, version, sources))
            )

    def _moved(
        self, info: SessionInfo, version: StoredVersion, sources: Mapping[str, str]
    ) -> list[Statement]:
        row = {
            "session_id": info.id,
            "version": version.version,
            "parameters_digest": version.parameters_digest,
            "request_id": version.request_id,
            "fingerprint": version.fingerprint,
        }
        changed = self._changed(
            info.id, record=record_of(info), sources=json.dumps(dict(sources))
        )
        kept = (
            "DELETE FROM versions WHERE session_id = ? AND version <= ?",
            (info.id, version.version - _KEPT_VERSIONS),
        )
        return [*changed, self._db.put("versions", row), kept]

    def version_of(self, session_id: str, request_id: str) -> StoredVersion | None:
        """Find the version that a request made; the last thousand are remembered."""
        found = self._db.rows("versions", session_id=session_id, request_id=request_id)
        names = ("version", "parameters_digest", "request_id", "fingerprint")
        for row, sound in found:
            if sound:
                return StoredVersion(**{name: row[name] for name in names})
        return None

    def sessions(self) -> tuple[list[StoredSession], dict[str, DataLoss]]:
        """Read all sessions, oldest first.

        Returns:
            Those that can be read; and for the others, by id, why not.
        """
        stored, lost = [], {}
        for row, sound in self._db.rows("sessions"):
            try:
                session = self._read("session", str(row["id"]), row, sound, session_of)
            except DataLoss as error:
                lost[str(row["id"])] = error
            else:
                stored.append(session)
        return stored, lost

    def delete_session(self, session_id: str) -> None:
        """Forget a session and its versions."""
        self._db.free(("DELETE FROM sessions WHERE id = ?", (session_id,)))

    def delete(self, table: str, name: str) -> None:
        """Forget a model or a dataset.

        Args:
            table: ``models`` or ``datasets``.
            name: Its id.
        """
        assert table in ("models", "datasets")
        self._db.free((f"DELETE FROM {table} WHERE id = ?", (name,)))

    def referrers(self, digest: str | None = None) -> dict[str, set[str]]:
        """Tell who owns what refers to blobs.

        Args:
            digest: Only of this blob; None: of all.

        Returns:
            Digest -> names of owners; empty: who has none, or whose record was damaged.
        """
        found: dict[str, set[str]] = {}
        only = {} if digest is None else {"digest": digest}
        for table in ("models", "datasets"):
            for row, _ in self._db.rows(table, **only):
                found.setdefault(str(row["digest"]), set()).add(owner_of(table, row)[0])
        for row, _ in self._db.rows("sessions"):
            # As text: what cannot be read may need them, too.
            sources = set(re.findall(r"[0-9a-f]{64}", row["sources"]))
            for one in sources if digest is None else sources & {digest}:
                found.setdefault(one, set()).add(owner_of("sessions", row)[0])
        return found

    def needed_by(self, digest: str) -> list[str]:
        """Name what a blob is needed by, for whoever has to be told that it is lost.

        What the caller cannot see is not named.
        """
        found = {
            table: dict(self._with_blob(table, digest))
            for table in ("models", "datasets")
        }
        sessions = [
            s.info
            for s in self.sessions()[0]
            if s.info.model_id in found["models"]
            or s.info.dataset_id in found["datasets"]
            or digest in s.sources.values()
        ]
        caller = calling()
        holdings = [
            *(("model", i, *found["models"][i]) for i in sorted(found["models"])),
            *(("dataset", i, *found["datasets"][i]) for i in sorted(found["datasets"])),
            *(("session", s.id, s.owner, s.shared_with) for s in sessions),
        ]
        return [
            f"{kind} {name}"
            for kind, name, owner, shared_with in holdings
            if not caller.name or caller.sees(owner, shared_with)
        ]

    def _with_blob(
        self, table: str, digest: str
    ) -> Iterator[tuple[str, tuple[str, tuple[str, ...]]]]:
        for row, _ in self._db.rows(table, digest=digest):
            yield str(row["id"]), owner_of(table, row)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _changed(self, session_id: str, **columns: object) -> list[Statement]:
        """Change some columns of a session, unless it is gone."""
        found = self._db.rows("sessions", id=session_id)
        return [self._db.put("sessions", {**row, **columns}) for row, _ in found]

    def _read(
        self, kind: str, name: str, row: Row, sound: bool, read: Callable[[Row], T]
    ) -> T:
        """Read a record, or say that it is lost and what to do."""
        why = "its record was damaged on the disk"
        if sound:
            try:
                return read(row)
            except UNREADABLE as error:
                why = f"its record cannot be read: {type(error).__name__}: {error}"
        remedy = (
            "delete the session and create it again"
            if kind == "session"
            else "register the same content again"
        )
        logger().error("unreadable", kind=kind, id=name, why=why)
        msg = f"the server has lost {kind} {name!r} ({why}); {remedy}"
        raise DataLoss(msg, kind=kind, id=name)


class Plans:
    """Plans by structure. They save time, and whatever happens to them, nothing else.

    Args:
        database: Where they are kept.
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    def get(self, key: str, default: str) -> str:
        """Look one up."""
        for row, sound in self._db.rows("plans", key=key):
            if sound:
                return str(row["plan"])
        return default

    def __setitem__(self, key: str, plan: str) -> None:
        """Keep one, if that is possible."""
        try:
            self._db.write(self._db.put("plans", {"key": key, "plan": plan}))
        except CurvdError as error:
            logger().warning("plan not kept", error=str(error))


def _remaining(session_id: str, remaining_s: float | None) -> Statement:
    sql = "UPDATE sessions SET remaining_s = ? WHERE id = ?"
    return sql, (remaining_s, session_id)


def _no_model(model_id: str) -> ModelNotFound:
    msg = f"no model {model_id[:80]!r} on this server; register it first"
    return ModelNotFound(msg, model_id=model_id[:80])


def _no_dataset(dataset_id: str) -> DatasetNotFound:
    msg = f"no dataset {dataset_id[:80]!r} on this server; register it first"
    return DatasetNotFound(msg, dataset_id=dataset_id[:80])
