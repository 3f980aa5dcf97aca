"""What outlives the process: blobs, models, datasets, sessions and versions in a folder.

Nothing that is acknowledged is lost, and nothing that rotted is believed. Knows neither torch
nor grpc, and no session that is open.
"""

from __future__ import annotations

from curvd_server.storage.assembly import Piece, assembled, pieces_of
from curvd_server.storage.blob_store import BlobStore
from curvd_server.storage.blobs import Blob, check_digest
from curvd_server.storage.catalogue import Catalogue
from curvd_server.storage.checkpoints import Checkpoints, chosen
from curvd_server.storage.data_directory import owned, private_folder, torchs_folder
from curvd_server.storage.finite_values import check_representable
from curvd_server.storage.mounts import Mounts
from curvd_server.storage.records import (
    StoredDataset,
    StoredModel,
    StoredSession,
    StoredVersion,
)
from curvd_server.storage.registry import (
    Architecture,
    Registry,
    check_state,
    model_spec,
)
from curvd_server.storage.snapshots import Region, Snapshot, mapped, region_of

__all__ = [
    "Architecture",
    "Blob",
    "BlobStore",
    "Catalogue",
    "Checkpoints",
    "Mounts",
    "Piece",
    "Region",
    "Registry",
    "Snapshot",
    "StoredDataset",
    "StoredModel",
    "StoredSession",
    "StoredVersion",
    "assembled",
    "check_digest",
    "check_representable",
    "check_state",
    "chosen",
    "mapped",
    "model_spec",
    "owned",
    "pieces_of",
    "private_folder",
    "region_of",
    "torchs_folder",
]
