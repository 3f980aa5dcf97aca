"""Models and datasets are deleted when no session needs them, and only then.

A session that is being made refers to its model and dataset before the catalogue knows it.
So both what is wanted and what is going are noted on the event loop, where nothing comes
between a question and its note.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from curvd.contract import DatasetInfo, ModelInfo, SessionInfo
from curvd.errors import DatasetNotFound, ModelNotFound, PermissionDenied, StillInUse
from curvd_server.storage import BlobStore, Catalogue, StoredDataset, StoredModel
from curvd_server.system import calling

I = TypeVar("I", ModelInfo, DatasetInfo)  # noqa: E741

_NAMED = 8
"""Sessions that are named to whoever deletes what they need."""


class Deletions:
    """Deletes models and datasets of one server.

    Args:
        catalogue: Where they are kept.
        blobs: Where their tensors are.
        sessions: Describes all sessions there are.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        blobs: BlobStore,
        sessions: Callable[[], Iterable[SessionInfo]],
    ) -> None:
        self._catalogue, self._blobs, self._sessions = catalogue, blobs, sessions
        self._wanted: Counter[str] = Counter()
        self._going: set[str] = set()

    @contextlib.contextmanager
    def wanted(self, model_id: str, dataset_id: str) -> Iterator[None]:
        """Keep a model and a dataset while a session of them is made.

        Args:
            model_id: The model, which need not exist.
            dataset_id: The dataset, likewise.

        Yields:
            Nothing.

        Raises:
            ModelNotFound: If the model is being deleted.
            DatasetNotFound: If the dataset is.
        """
        if model_id in self._going:
            msg = f"model {model_id!r} is being deleted"
            raise ModelNotFound(msg, model_id=model_id)
        if dataset_id in self._going:
            msg = f"dataset {dataset_id!r} is being deleted"
            raise DatasetNotFound(msg, dataset_id=dataset_id)
        self._wanted.update((model_id, dataset_id))
        try:
            yield
        finally:
            self._wanted.subtract((model_id, dataset_id))
            self._wanted = +self._wanted

    def users(self) -> Callable[[I], I]:
        """Look which sessions need which models and datasets; on the event loop.

        Returns:
            Adds to what is known of a model or dataset those that need it, as far as the
            caller may know of them; on any thread.
        """
        needed: dict[str, list[SessionInfo]] = {}
        for session in sorted(self._sessions(), key=lambda session: session.id):
            for name in (session.model_id, session.dataset_id):
                needed.setdefault(name, []).append(session)

        def described(info: I) -> I:
            users = needed.get(info.id, [])
            seen = tuple(s.id for s in users if _is_seen(s))
            others = len(users) - len(seen) if _may_delete(info.owner) else 0
            return replace(info, session_ids=seen, other_sessions=others)

        return described

    async def model(self, model_id: str) -> None:
        """Delete a model, and its tensors if nothing else needs them.

        Args:
            model_id: The id of the model.

        Raises:
            ModelNotFound: If there is none.
            PermissionDenied: If it is only shared with the caller.
            StillInUse: If a session needs it.
        """
        found = await asyncio.to_thread(self._catalogue.visible_model, model_id)
        await self._delete("model", model_id, found)

    async def dataset(self, dataset_id: str) -> None:
        """Delete a dataset, and its tensors if nothing else needs them.

        Args:
            dataset_id: The id of the dataset.

        Raises:
            DatasetNotFound: If there is none.
            PermissionDenied: If it is only shared with the caller.
            StillInUse: If a session needs it.
        """
        found = await asyncio.to_thread(self._catalogue.visible_dataset, dataset_id)
        await self._delete("dataset", dataset_id, found)

    async def _delete(
        self, kind: str, name: str, found: StoredModel | StoredDataset
    ) -> None:
        owner = found.info.owner
        if not _may_delete(owner):
            msg = f"{kind} {name} belongs to {owner!r}: its end is up to its owner"
            raise PermissionDenied(msg, owner=owner)
        self._check_unused(kind, name)
        self._going.add(name)
        try:
            await asyncio.to_thread(self._blobs.mark_leaving, found.digest, owner)
            await asyncio.to_thread(self._catalogue.delete, f"{kind}s", name)
        finally:
            self._going.discard(name)
        await asyncio.to_thread(self._blobs.release, found.digest, owner)

    def _check_unused(self, kind: str, name: str) -> None:
        users = [s for s in self._sessions() if name in (s.model_id, s.dataset_id)]
        if not users and not self._wanted[name]:
            return
        seen = [s.id for s in users if _is_seen(s)][:_NAMED]
        others = len(users) - len(seen) + self._wanted[name]
        who = [f"session {session_id}" for session_id in seen]
        who += [f"{others} more"] if others else []
        msg = f"{', '.join(who)} still needs {kind} {name}: delete the sessions first"
        raise StillInUse(msg, kind=kind, id=name, sessions=len(users))


def _may_delete(owner: str) -> bool:
    """Tell whether the end of what somebody owns is up to the caller."""
    return calling().is_operator or calling().owns(owner)


def _is_seen(session: SessionInfo) -> bool:
    return calling().sees(session.owner, session.shared_with)
