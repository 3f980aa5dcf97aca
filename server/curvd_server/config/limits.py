"""What the server refuses to exceed, and what of it clients are told."""

from __future__ import annotations

from dataclasses import dataclass

from curvd.contract import Limits, check_settings, setting
from curvd.tensors import MAX_HEADER_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """What the server refuses to exceed."""

    upload_bytes: int = setting(
        64 << 30, "Largest safetensors file of a model, dataset or update.", least=1
    )
    operand_bytes: int = setting(
        64 << 30,
        "Largest operand of one MatMat; it is streamed, never held as a whole.",
        least=1,
    )
    columns: int = setting(1 << 20, "Columns of one MatMat.", least=1)
    pending_columns: int = setting(
        4096,
        "Columns that may wait for a device, those of all callers together, before "
        "callers are turned away.",
        least=1,
    )
    pending_bytes: int = setting(
        8 << 30,
        "Memory of operands and results that are under way; one request always fits.",
        least=1,
    )
    block_bytes: int = setting(
        64 << 20,
        "Memory of one column block of a MatMat, unless one column is larger.",
        least=1,
    )
    idle_bytes: int = setting(
        1 << 30,
        "Memory of operands, and as much of results, that is kept for the next ones "
        "while nobody needs it.",
        least=0,
    )
    kept_bytes: int = setting(
        1 << 30,
        "Memory of results that are kept for callers whose stream broke.",
        least=0,
    )
    kept_s: int = setting(
        60, "Seconds that results are kept for callers whose stream broke.", least=1
    )
    stored_bytes: int = setting(
        4 << 30, "Memory of the vectors that one session stores.", least=0
    )
    memory_bytes: int = setting(
        0,
        "Memory of the host for datasets, stored vectors, kept results and calls "
        "under way together; 0: four fifths of what the machine has or the container "
        "may use.",
        least=0,
        shown="four fifths",
    )
    partial_bytes: int = setting(
        128 << 30, "Disk of all uploads that are not complete.", least=1
    )
    partial_s: int = setting(
        24 * 3600, "Seconds that an upload is kept which nobody goes on with.", least=1
    )
    run_columns: int = setting(
        32, "Columns that are computed together at most.", least=1
    )
    sessions: int = setting(100, "Sessions at once.", least=1)
    lease_s: int = setting(
        7 * 24 * 3600,
        "Seconds that a session lives without a call, unless its maker says otherwise; 0: "
        "for ever.",
        least=0,
    )
    operators: int = setting(
        16,
        "Operators that one session keeps built; the longest unused one makes room.",
        least=1,
    )
    default_budget_bytes: int = setting(
        4 << 30,
        "Memory for the cached linearisations of one session, unless it asks for another.",
        least=0,
    )

    def __post_init__(self) -> None:
        check_settings(self)

    def published(self) -> Limits:
        """Describe the limits to clients.

        Returns:
            Those that a client can run into.
        """
        return Limits(
            upload_bytes=self.upload_bytes,
            operand_bytes=self.operand_bytes,
            header_bytes=MAX_HEADER_BYTES,
            columns=self.columns,
            pending_columns=self.pending_columns,
            sessions=self.sessions,
            default_budget_bytes=self.default_budget_bytes,
        )
