"""DTensors: which box of each this process is to send, and what its ranks tell each other.

Nothing is gathered: a rank sends the memory that it has. Ranks exchange a message of fixed
size, as bytes, before and after the commit; nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from curvd.errors import BY_REASON, CurvdError, InvalidTensors, Unavailable
from curvd.tensors import Box, loaded

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

_MESSAGE_BYTES = 4096
"""What a rank tells the others: a digest, a version, or an error, cut to fit."""


def sharded(values: Mapping[str, Any]) -> dict[str, DTensor]:
    """Pick the DTensors.

    Args:
        values: Anything by name.

    Returns:
        Those that are DTensors, as FSDP2 and tensor parallelism make them.
    """
    module = loaded("torch.distributed.tensor")
    if module is None:
        return {}
    return {n: v for n, v in values.items() if isinstance(v, module.DTensor)}


def own_boxes(
    values: Mapping[str, Any], shards: Mapping[str, DTensor], *, is_first: bool
) -> tuple[dict[str, Any], dict[str, Box]]:
    """Choose what this rank sends: each element is sent by one rank.

    Args:
        values: All values, by name.
        shards: Those of them that are DTensors.
        is_first: Whether this rank sends what all ranks hold whole.

    Returns:
        Local tensors by name, and the places of those that are not whole.

    Raises:
        InvalidTensors: If a tensor is a partial sum.
    """
    local, boxes = {}, {}
    for name, value in values.items():
        if name not in shards:
            if is_first:
                local[name] = value
            continue
        found = _own_box(name, shards[name])
        if found is not None:
            local[name], boxes[name] = found
    return local, {n: b for n, b in boxes.items() if b.shape != tuple(local[n].shape)}


def _own_box(name: str, value: DTensor) -> tuple[Tensor, Box] | None:
    """Find this rank's box; None if it has none, or another rank sends the same."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = value.device_mesh, value.placements
    if any(p.is_partial() for p in placements):
        msg = (
            f"tensor {name!r} is a partial sum on each rank ({list(placements)}), so no "
            "rank has values of it: pass value.redistribute(placements=[Replicate()])"
        )
        raise InvalidTensors(msg, tensor=name)
    coordinate = mesh.get_coordinate()
    if coordinate is None or any(
        place and p.is_replicate()
        for place, p in zip(coordinate, placements, strict=True)
    ):
        return None
    shape, start = compute_local_shape_and_global_offset(value.shape, mesh, placements)
    local: Tensor = value.to_local().detach()
    if tuple(local.shape) != tuple(shape):
        msg = (
            f"tensor {name!r} of shape {list(value.shape)} has {list(local.shape)} on this "
            f"rank, where {list(placements)} says {list(shape)}: pass value.full_tensor()"
        )
        raise InvalidTensors(msg, tensor=name)
    return (local, Box(tuple(value.shape), tuple(start))) if local.numel() else None


class Ranks:
    """The processes that hold the shards of one update, as one of them sees it.

    Args:
        shards: This rank's DTensors.

    Raises:
        InvalidTensors: If they lie on a part of the ranks that has no group.
    """

    def __init__(self, shards: Iterable[DTensor]) -> None:
        meshes = [value.device_mesh for value in shards]
        ranks = {rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}
        self._device = meshes[0].device_type
        self._group = _group_of(meshes, ranks) if len(ranks) > 1 else None

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that commits."""
        import torch.distributed as dist

        return self._group is None or dist.get_rank(self._group) == 0

    def exchange(self, said: Mapping[str, Any], error: Exception | None) -> list[Any]:
        """Tell all ranks something, and hear what they say; all of them have to call.

        Args:
            said: What this rank has to say, as JSON takes it.
            error: Why it has failed instead, if it has.

        Returns:
            What each says, by rank.

        Raises:
            CurvdError: If another rank failed.
            Unavailable: If a rank is gone.
        """
        own: Mapping[str, Any] = said
        if error is not None:
            reason = error.reason if isinstance(error, CurvdError) else ""
            text = f"{type(error).__name__}: {error}"
            own = {"reason": reason, "failed": text[: _MESSAGE_BYTES // 8]}
        everyone = [own] if self._group is None else self._gathered(own)
        if error is not None:
            raise error
        for rank, message in enumerate(everyone):
            if "failed" in message:
                kind = BY_REASON.get(message["reason"], Unavailable)
                msg = (
                    f"rank {rank} failed, so nothing is committed ({message['failed']})"
                )
                raise kind(msg, rank=rank)
        return everyone

    def _gathered(self, own: Mapping[str, Any]) -> list[Any]:
        import torch
        import torch.distributed as dist

        text = bytearray(json.dumps(own).encode().ljust(_MESSAGE_BYTES))
        mine = torch.frombuffer(text, dtype=torch.uint8).to(self._device)
        size = dist.get_world_size(self._group)
        everyone = [torch.empty_like(mine) for _ in range(size)]
        try:
            dist.all_gather(everyone, mine, group=self._group)
        except RuntimeError as error:  # what torch raises when a rank has died
            msg = (
                f"a rank of this update is gone ({str(error).splitlines()[0][:200]}); "
                "without all ranks nothing is committed: the others can try again in a "
                "new process group"
            )
            raise Unavailable(msg) from error
        return [json.loads(bytes(one.cpu().numpy())) for one in everyone]


def _group_of(meshes: list[DeviceMesh], ranks: set[int]) -> ProcessGroup | None:
    import torch.distributed as dist

    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    widest = max(meshes, key=lambda mesh: mesh.size())
    if widest.size() == len(ranks) and widest.ndim == 1:
        return widest.get_group()
    msg = (
        f"the tensors lie on {len(ranks)} of {dist.get_world_size()} ranks, on meshes that "
        "no process group covers: pass value.full_tensor() of each from one rank"
    )
    raise InvalidTensors(msg, ranks=len(ranks))
