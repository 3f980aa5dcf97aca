"""What takes long, and how far it is <-> messages; see `curvd.contract.convert`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from curvd.contract import convert_enums
from curvd.contract.progress import Activity, StageProgress
from curvd.errors import InvalidSpec
from curvd.v1 import session_service_pb2 as session_pb


def activity_to_proto(activity: Activity) -> session_pb.Activity:
    """Convert something that goes on."""
    return session_pb.Activity(
        work=convert_enums.work_to_proto(activity.work),
        session_id=activity.session_id,
        session_name=activity.session_name,
        subject=activity.subject,
        progress=progress_to_proto(activity.progress),
        elapsed_s=activity.elapsed_s,
    )


def activities_from_proto(
    messages: Iterable[session_pb.Activity],
) -> tuple[Activity, ...]:
    """Convert what goes on; what a newer server has new words for is left out."""
    found = []
    for message in messages:
        with contextlib.suppress(InvalidSpec):
            found.append(_activity_from_proto(message))
    return tuple(found)


def _activity_from_proto(message: session_pb.Activity) -> Activity:
    return Activity(
        work=convert_enums.work_from_proto(message.work),
        session_id=message.session_id,
        session_name=message.session_name,
        subject=message.subject,
        progress=progress_from_proto(message.progress),
        elapsed_s=message.elapsed_s,
    )


def progress_to_proto(progress: StageProgress) -> session_pb.StageProgress:
    """Convert how far a stage is."""
    return session_pb.StageProgress(
        stage=convert_enums.stage_to_proto(progress.stage),
        detail=progress.detail,
        done=progress.done,
        total=progress.total or 0,
        elapsed_s=progress.elapsed_s,
    )


def progress_from_proto(message: session_pb.StageProgress) -> StageProgress:
    """Convert how far a stage is."""
    return StageProgress(
        stage=convert_enums.stage_from_proto(message.stage),
        detail=message.detail,
        done=message.done,
        total=message.total or None,
        elapsed_s=message.elapsed_s,
    )
