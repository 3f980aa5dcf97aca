"""The tables of the catalogue, and how those of older servers become them."""

from __future__ import annotations

from curvd_server.storage.database import Schema, Table

_CREATE = """
CREATE TABLE models (
    id TEXT PRIMARY KEY, digest TEXT NOT NULL, record BLOB NOT NULL,
    ties TEXT NOT NULL, graph BLOB NOT NULL DEFAULT x'',
    buffers TEXT NOT NULL DEFAULT '[]', seal TEXT NOT NULL DEFAULT '') STRICT;
CREATE TABLE datasets (
    id TEXT PRIMARY KEY, digest TEXT NOT NULL, record BLOB NOT NULL,
    seal TEXT NOT NULL DEFAULT '') STRICT;
CREATE TABLE sessions (
    ordinal INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    record BLOB NOT NULL, lease_s REAL, request_id TEXT NOT NULL,
    fingerprint TEXT NOT NULL, sources TEXT NOT NULL,
    seal TEXT NOT NULL DEFAULT '', remaining_s REAL) STRICT;
CREATE TABLE versions (
    session_id TEXT NOT NULL REFERENCES sessions(id) ON DELETE CASCADE,
    version INTEGER NOT NULL, parameters_digest TEXT NOT NULL,
    request_id TEXT NOT NULL, fingerprint TEXT NOT NULL,
    seal TEXT NOT NULL DEFAULT '', PRIMARY KEY (session_id, version)) STRICT;
CREATE TABLE plans (
    key TEXT PRIMARY KEY, plan TEXT NOT NULL, seal TEXT NOT NULL DEFAULT '') STRICT;
"""
_MIGRATIONS = {
    1: "ALTER TABLE models ADD COLUMN graph BLOB NOT NULL DEFAULT x'';",
    2: """
    CREATE TABLE IF NOT EXISTS plans (key TEXT PRIMARY KEY, plan TEXT NOT NULL) STRICT;
    ALTER TABLE models ADD COLUMN buffers TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE models ADD COLUMN seal TEXT NOT NULL DEFAULT '';
    ALTER TABLE datasets ADD COLUMN seal TEXT NOT NULL DEFAULT '';
    ALTER TABLE sessions ADD COLUMN seal TEXT NOT NULL DEFAULT '';
    ALTER TABLE sessions ADD COLUMN remaining_s REAL;
    ALTER TABLE versions ADD COLUMN seal TEXT NOT NULL DEFAULT '';
    ALTER TABLE plans ADD COLUMN seal TEXT NOT NULL DEFAULT '';
    """,
}
SCHEMA = Schema(
    version=3,
    create=_CREATE,
    migrations=_MIGRATIONS,
    tables={
        "models": Table(
            ("id",), ("id", "digest", "record", "ties", "graph", "buffers")
        ),
        "datasets": Table(("id",), ("id", "digest", "record")),
        "sessions": Table(
            ("id",),
            ("id", "record", "lease_s", "request_id", "fingerprint", "sources"),
        ),
        "versions": Table(
            ("session_id", "version"),
            ("session_id", "version", "parameters_digest", "request_id", "fingerprint"),
        ),
        "plans": Table(("key",), ("key", "plan")),
    },
)
