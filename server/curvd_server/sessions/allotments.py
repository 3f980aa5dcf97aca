"""What sessions take of a device, at the expense of who made them.

Counted are the tensors of model and dataset as they lie on the disk, and the whole budget for
cached linearisations, so that a session that was opened never fails for it later.
"""

from __future__ import annotations

from dataclasses import dataclass

from curvd.contract import SessionInfo
from curvd_server.storage import BlobStore, Catalogue
from curvd_server.system import Quotas
from curvd_server.system.quotas import DEVICE_BYTES


@dataclass(slots=True)
class Allotment:
    """Memory of a device that one session has."""

    quotas: Quotas
    owner: str
    nbytes: int

    def give(self) -> None:
        """Give it back; a second time does nothing."""
        nbytes, self.nbytes = self.nbytes, 0
        self.quotas.give(DEVICE_BYTES, nbytes, self.owner)


class Allotments:
    """Counts what sessions take. Threads may share it.

    Args:
        catalogue: Knows models and datasets.
        blobs: Know how large they are.
        quotas: What the sessions of one caller may take.
    """

    def __init__(self, catalogue: Catalogue, blobs: BlobStore, quotas: Quotas) -> None:
        self._catalogue, self._blobs, self._quotas = catalogue, blobs, quotas

    def budget_bytes(self, info: SessionInfo, most_bytes: int) -> int:
        """Choose the budget of a session whose maker leaves it open. Blocks.

        Args:
            info: The session.
            most_bytes: What it has where nobody has a quota.

        Returns:
            That, or what its maker's quota leaves beside model and dataset.
        """
        left = self._quotas.left(DEVICE_BYTES)
        if left is None:
            return most_bytes
        return max(0, min(most_bytes, left - self._tensor_bytes(info)))

    def take(self, info: SessionInfo) -> Allotment:
        """Take what a session needs, for the caller. Blocks.

        Args:
            info: The session.

        Raises:
            LimitExceeded: If the caller may not have so much.
        """
        nbytes = self._tensor_bytes(info) + info.budget_bytes
        owner = self._quotas.take(DEVICE_BYTES, nbytes)
        return Allotment(self._quotas, owner, nbytes)

    def restored(self, info: SessionInfo) -> Allotment:
        """Take what a session has that was made by an earlier process. Blocks."""
        nbytes = self._tensor_bytes(info) + info.budget_bytes
        self._quotas.hold(DEVICE_BYTES, nbytes, info.owner)
        return Allotment(self._quotas, info.owner, nbytes)

    def _tensor_bytes(self, info: SessionInfo) -> int:
        """Count model and dataset; a model that another session has is there anyway."""
        digests = [self._catalogue.dataset(info.dataset_id).digest]
        if not info.parameters_of:
            digests.append(self._catalogue.model(info.model_id).digest)
        return sum(map(self._blobs.size, digests))
