"""Rows that outlive the process and the disk's mistakes.

Two SQLite files hold the same rows. Each row carries a hash of its columns (SQLite has
none of its own), so that a flipped bit is noticed wherever it is, and the other file
has what it destroyed. A file whose structure is damaged is moved aside and made again
from the other. Only what both have lost is lost, and it is named.

A change is made in the first file, then in the second; it counts once it is in the
first. Methods block; call them off the event loop.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from curvd.errors import CurvdError, DataLoss, DiskFull, FailedPrecondition
from curvd_server.storage.partial_upload import fsync_directory
from curvd_server.storage.reserve import Reserve
from curvd_server.system import logger

Row = dict[str, Any]
Statement = tuple[str, tuple[object, ...]]

_DAMAGED = ".damaged"
_FEW = 16
"""Rows that are in memory at once where all are looked through; a graph takes megabytes."""
_NOT_THE_FILE = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
)
"""Errors that say nothing about what is in a file."""


@dataclass(frozen=True, slots=True)
class Table:
    """What is sealed of a table."""

    key: tuple[str, ...]
    columns: tuple[str, ...]
    """The key's and all others but `seal`, and but those that may be lost."""


@dataclass(frozen=True, slots=True)
class Schema:
    """Tables, and how older ones become these."""

    version: int
    create: str
    migrations: Mapping[int, str]
    """From each older version to the next."""
    tables: Mapping[str, Table]


class _State(IntEnum):
    """What a file is still good for, the best last."""

    MISSING = 0
    BROKEN = 1
    NEWER = 2
    HURT = 3
    """Some rows are damaged."""
    SOUND = 4


@dataclass(frozen=True, slots=True)
class _Finding:
    """What was found out about a file."""

    state: _State
    what: str = ""
    """What is wrong with it; a predicate."""


class Database:
    """Two files with the same rows.

    Args:
        path: The path of the first; the second lies beside it.
        schema: What is in them.
        is_new: Whether they may be missing; they are made then.

    Raises:
        FailedPrecondition: If a newer curvd wrote them, or both are damaged.
        DiskFull: If they do not fit the disk.
    """

    def __init__(self, path: Path, schema: Schema, *, is_new: bool) -> None:
        self._schema, self._path = schema, path
        self._second_path = path.with_suffix(f".mirror{path.suffix}")
        self._lock = threading.Lock()
        self._reserve = Reserve(path.with_name(f"{path.name}.reserve"))
        self._second: sqlite3.Connection | None = None
        with _typed():
            self._first = self._opened(is_new)
        self._copy_to_second()

    def rows(self, table: str, **where: object) -> Iterator[tuple[Row, bool]]:
        """Read rows in the order in which they were made.

        Args:
            table: The table.
            **where: Columns and their values.

        Yields:
            Each row, and whether it is what was written.
        """
        with self._lock, _typed():
            found = self._rows(self._first, table, where)
        yield from found

    def after(self, table: str, ordinal: int) -> Iterator[tuple[int, Row, bool]]:
        """Read rows in the order in which they were made, a few at a time.

        Args:
            table: The table.
            ordinal: Where to go on: after the row of this number; 0: at the first.

        Yields:
            The number of each row, which it keeps, the row, and whether it is what was
            written.
        """
        known = self._schema.tables[table]
        while True:  # ordinals rise: it ends unless rows come faster than they are read
            with self._lock, _typed():
                found = self._first.execute(
                    f"SELECT rowid AS row_number, * FROM {table} WHERE rowid > ?"
                    " ORDER BY rowid LIMIT ?",
                    (ordinal, _FEW),
                )
                names = [column[0] for column in found.description]
                rows = [dict(zip(names, values, strict=True)) for values in found]
            if not rows:
                return
            for row in rows:
                ordinal = row.pop("row_number")
                yield ordinal, row, row["seal"] == _seal(known, row)

    def put(self, table: str, row: Row) -> Statement:
        """Say how a row is written, in place of the one with its key."""
        known = self._schema.tables[table]
        names = (*known.columns, "seal")
        changes = ", ".join(f"{n} = excluded.{n}" for n in names)
        sql = (
            f"INSERT INTO {table} ({', '.join(names)})"
            f" VALUES ({', '.join('?' * len(names))})"
            f" ON CONFLICT ({', '.join(known.key)}) DO UPDATE SET {changes}"
        )
        return sql, (*(row[n] for n in known.columns), _seal(known, row))

    def write(self, *statements: Statement) -> None:
        """Change something, on the disk when this returns.

        Args:
            *statements: All of them happen, or none.

        Raises:
            DiskFull: If the disk takes no more; then nothing has changed.
            FailedPrecondition: If the files cannot be written.
        """
        with self._lock:
            self._write(statements)

    def free(self, *statements: Statement) -> None:
        """Delete something; on a full disk too, in space that is kept for that.

        Args:
            *statements: As for `write`.

        Raises:
            DiskFull: If even that does not do; then nothing has changed.
            FailedPrecondition: If the files cannot be written.
        """
        with self._lock:
            try:
                self._write(statements)
            except DiskFull:
                with self._reserve.opened():
                    self._write(statements)

    def _write(self, statements: Sequence[Statement]) -> None:
        with _typed():
            _transaction(self._first, statements)
        self._copy_to_second(statements)

    def close(self) -> None:
        """Close both files."""
        with self._lock:
            self._first.close()
            self._forget_second()

    def _opened(self, is_new: bool) -> sqlite3.Connection:
        """Open the first file, or make it: from the second, or from nothing."""
        first, second = map(self._examined, (self._path, self._second_path))
        if first.state is _State.MISSING and second.state is _State.MISSING and is_new:
            return self._made()
        # The first one, unless the second is better.
        best = max(first, second, key=lambda finding: finding.state)
        if best.state is _State.NEWER:
            msg = f"{self._path} {best.what}"
            raise FailedPrecondition(msg)
        if best.state < _State.HURT:
            raise self._beyond_repair(first.what, second.what)
        if best is second:
            _move_aside(self._path)
            with contextlib.closing(_connect(self._second_path)) as source:
                _copy(source, self._path)
        if first.state is not _State.SOUND:
            logger().error("damaged", file=str(self._path), what=first.what)
        db = self._migrated(_connect(self._path))
        if first.state is second.state is _State.HURT:
            self._merge(db)
        return db

    def _examined(self, path: Path) -> _Finding:
        """Find out what a file is still good for."""
        if not path.exists():
            return _Finding(_State.MISSING, "is missing")
        if not path.is_file():
            return _Finding(_State.BROKEN, "is no file")
        if not path.stat().st_size:
            return _Finding(_State.BROKEN, "is empty")
        try:
            with contextlib.closing(_connect(path)) as db:
                return self._finding(db)
        except sqlite3.DatabaseError as error:
            if _code(error) in _NOT_THE_FILE:
                raise
            return _Finding(_State.BROKEN, f"is damaged ({error})")

    def _finding(self, db: sqlite3.Connection) -> _Finding:
        schema = self._schema
        (found,) = db.execute("PRAGMA integrity_check(1)").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if found != "ok":
            return _Finding(_State.BROKEN, f"is damaged ({found})")
        if version > schema.version:
            msg = (
                f"has schema {version}, this curvd reads {schema.version}: run the "
                "version that wrote it, or use another data directory"
            )
            return _Finding(_State.NEWER, msg)
        sealed = [
            "seal" in {c[1] for c in db.execute(f"PRAGMA table_info({table})")}
            for table in schema.tables
        ]
        if version in schema.migrations and not any(sealed):
            return _Finding(_State.SOUND)
        if version != schema.version or not all(sealed):
            return _Finding(_State.BROKEN, "is damaged (its tables are not ours)")
        hurt = [
            f"{table} {[row[k] for k in known.key]}"
            for table, known in schema.tables.items()
            for row, sound in self._rows(db, table, {})
            if not sound
        ]
        if hurt:
            return _Finding(_State.HURT, f"has damaged rows: {', '.join(hurt[:20])}")
        return _Finding(_State.SOUND)

    def _beyond_repair(self, first: str, second: str) -> FailedPrecondition:
        msg = (
            f"{self._path} {first} and {self._second_path.name} {second}: the server "
            "does not know any more what its data directory holds. Put either file back "
            "from a backup; or, to begin anew, move both of them away and the folder "
            "blobs beside them, and register models and datasets again"
        )
        return FailedPrecondition(msg, catalogue=self._path)

    def _made(self) -> sqlite3.Connection:
        """Make the first file; it is whole as soon as it is there."""
        new = _unused(self._path)
        with contextlib.closing(_connect(new)) as db:
            db.executescript(
                f"BEGIN; {self._schema.create}"
                f"PRAGMA user_version = {self._schema.version}; COMMIT;"
            )
        _put_in_place(new, self._path)
        return _connect(self._path)

    def _migrated(self, db: sqlite3.Connection) -> sqlite3.Connection:
        """Bring an older file to this schema."""
        schema = self._schema
        (found,) = db.execute("PRAGMA user_version").fetchone()
        if found != schema.version:
            change = "".join(schema.migrations[v] for v in range(found, schema.version))
            db.executescript(f"BEGIN; {change}")
            for table in schema.tables:
                for row, _ in self._rows(db, table, {}):
                    db.execute(*self.put(table, row))
            db.execute(f"PRAGMA user_version = {schema.version}")
            db.execute("COMMIT")
        return db

    def _merge(self, db: sqlite3.Connection) -> None:
        """Take from the second file the rows that only the first has lost."""
        with contextlib.closing(_connect(self._second_path)) as second:
            for table, known in self._schema.tables.items():
                lost = {
                    tuple(row[k] for k in known.key)
                    for row, sound in self._rows(db, table, {})
                    if not sound
                }
                there = [
                    self.put(table, row)
                    for row, sound in self._rows(second, table, {})
                    if sound and tuple(row[k] for k in known.key) in lost
                ]
                _transaction(db, there)

    def _copy_to_second(self, statements: Iterable[Statement] = ()) -> None:
        """Make a change in the second file, too, or make it anew, if that is possible.

        It is in the first file already, and so it counts.
        """
        try:
            if self._second is None:
                self._mirror()
            else:
                _transaction(self._second, statements)
        except (sqlite3.Error, OSError) as error:
            logger().error("no second copy of the catalogue", error=str(error))
            self._forget_second()

    def _mirror(self) -> None:
        """Make the second file like the first, unless it is."""
        finding = self._examined(self._second_path)
        if finding.state is not _State.MISSING and finding.what:
            logger().error("damaged", file=str(self._second_path), what=finding.what)
        if finding.state >= _State.HURT:
            second = self._migrated(_connect(self._second_path))
            if all(
                list(self._rows(second, table, {}))
                == list(self._rows(self._first, table, {}))
                for table in self._schema.tables
            ):
                self._second = second
                return
            second.close()
        _copy(self._first, self._second_path)
        self._second = _connect(self._second_path)

    def _forget_second(self) -> None:
        if self._second is not None:
            self._second.close()
        self._second = None

    def _rows(
        self, db: sqlite3.Connection, table: str, where: Mapping[str, object]
    ) -> list[tuple[Row, bool]]:
        known = self._schema.tables[table]
        condition = " AND ".join(f"{name} = ?" for name in where)
        found = db.execute(
            f"SELECT * FROM {table} {'WHERE' if where else ''} {condition}"
            " ORDER BY rowid",
            tuple(where.values()),
        )
        names = [column[0] for column in found.description]
        rows = [dict(zip(names, values, strict=True)) for values in found]
        return [(row, row["seal"] == _seal(known, row)) for row in rows]


def _connect(path: Path) -> sqlite3.Connection:
    journal = _journal(path)
    if journal.exists() and not journal.is_file():  # SQLite would wait for a pipe
        journal.replace(journal.with_name(journal.name + _DAMAGED))
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    # What rotted is looked at, too; its seal will not fit.
    db.text_factory = lambda data: data.decode(errors="surrogateescape")
    try:
        # No log of its own: SQLite passes over a damaged tail of one without a word.
        db.execute("PRAGMA journal_mode = TRUNCATE")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error:
        db.close()
        raise
    return db


def _seal(table: Table, row: Row) -> str:
    content = repr([row.get(name) for name in table.columns])
    return hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()


def _transaction(db: sqlite3.Connection, statements: Iterable[Statement]) -> None:
    with db:
        db.execute("BEGIN IMMEDIATE")
        for sql, values in statements:
            db.execute(sql, values)


def _copy(source: sqlite3.Connection, path: Path) -> None:
    """Copy a database into a file that is whole as soon as it is there."""
    new = _unused(path)
    target = sqlite3.connect(new)
    try:
        source.backup(target)
    finally:
        target.close()
    _put_in_place(new, path)


def _unused(path: Path) -> Path:
    """Find a place beside a file where nothing is."""
    new = path.with_suffix(".new")
    for file in (new, _journal(new)):
        file.unlink(missing_ok=True)
    return new


def _put_in_place(new: Path, path: Path) -> None:
    """Give a file that is whole its name."""
    _journal(new).unlink(missing_ok=True)
    new.rename(path)
    fsync_directory(path.parent)


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}-journal")


def _move_aside(path: Path) -> None:
    """Keep a damaged file for whoever wants to look at it."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        file = path.with_name(path.name + suffix)
        if file.exists():
            file.replace(path.with_name(path.name + suffix + _DAMAGED))


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


@contextlib.contextmanager
def _typed() -> Iterator[None]:
    """Say what SQLite says in our words."""
    try:
        yield
    except sqlite3.Error as error:
        raise _explained(error) from error


def _explained(error: sqlite3.Error) -> CurvdError:
    if _code(error) == sqlite3.SQLITE_FULL:
        msg = (
            "the disk of the server's data directory is full, and nothing was changed: "
            "have its operator free some space, then try again"
        )
        return DiskFull(msg)
    if _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        msg = (
            f"the server's catalogue was damaged while it ran ({error}): have its "
            "operator restart it, which heals the file from its copy"
        )
        return DataLoss(msg)
    msg = f"the server cannot read or write its catalogue: {error}"
    return FailedPrecondition(msg)
