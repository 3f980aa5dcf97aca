"""Random columns that need not travel: the same bits everywhere (docs/probes.md).

A probe is a function of (distribution, seed, index). Its random words come from
SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) used as a counter-based generator, in
integer arithmetic modulo 2^64, which every device does alike;
`curvd.tensors.random_probes` computes the same words with NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from curvd.contract import Distribution

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_CHUNK_WORDS = 1 << 16  # 4 Mi signs at a time: the 64-bit intermediate stays at 32 MiB
_NORMALS = 2 * _CHUNK_WORDS
"""Normals that are made at a time."""


def probes(
    distribution: Distribution,
    seed: int,
    indices: Sequence[int],
    size: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    part: range | None = None,
) -> Tensor:
    """Make probes.

    Args:
        distribution: The distribution of the elements; independent, mean zero, variance one.
        seed: In [0, 2^63).
        indices: Which probes of the seed's sequence; K of them.
        size: P.
        dtype: Element type.
        device: Where to make them.
        part: Which of their elements; None: all.

    Returns:
        [K, P], or [K, len(part)] with the same bits.
    """
    is_signs = distribution is Distribution.RADEMACHER
    make, step = (_signs, 64 * _CHUNK_WORDS) if is_signs else (_normals, _NORMALS)
    own = range(size) if part is None else part
    result = torch.empty(len(indices), len(own), dtype=dtype, device=device)
    for row, index in zip(result, indices, strict=True):
        for start in range(own.start - own.start % step, own.stop, step):
            first, last = max(start, own.start), min(start + step, own.stop)
            # Signs begin with a word. Normals are made in the chunks of whole probes: at
            # their ends a device may round differently.
            begin = first - first % 64 if is_signs else start
            end = last if is_signs else min(start + step, size)
            made = make(key(seed, index), begin, end - begin, row.device)
            row[first - own.start : last - own.start].copy_(
                made[first - begin : last - begin]
            )
    return result


def key(seed: int, index: int) -> int:
    """Derive the key of one probe.

    Args:
        seed: In [0, 2^63).
        index: In [0, 2^63).

    Returns:
        64 bits.
    """
    return _mix_int((_mix_int(seed) + (index + 1) * _GAMMA) & _MASK)


def _signs(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Make +1 (bit 0) and -1 (bit 1), 64 to a word, lowest bit first: [count]."""
    words = _words(key, start // 64, -(-count // 64), device)
    bits = (words[:, None] >> torch.arange(64, device=device)) & 1
    return (1 - 2 * bits).view(-1)[:count]


def _normals(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Make normals by Box & Muller (1958), two of two words: [count]."""
    words = _words(key, start, 2 * -(-count // 2), device).view(-1, 2)
    uniforms = _shift(words, 11).double() * 2.0**-53
    radius = torch.sqrt(-2.0 * torch.log(uniforms[:, 0] + 2.0**-53))
    angle = 2.0 * math.pi * uniforms[:, 1]
    both = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), 1)
    return both.view(-1)[:count]


def _words(key: int, first: int, count: int, device: torch.device) -> Tensor:
    """Compute words ``first .. first + count`` of a key's stream: [count], int64."""
    counter = torch.arange(first + 1, first + count + 1, device=device)
    state = counter * _signed(_GAMMA) + _signed(key)
    state = (state ^ _shift(state, 30)) * _signed(_MIX_1)
    state = (state ^ _shift(state, 27)) * _signed(_MIX_2)
    return state ^ _shift(state, 31)


def _shift(words: Tensor, by: int) -> Tensor:
    # torch shifts signed integers arithmetically; the mask makes the shift logical.
    return (words >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _mix_int(word: int) -> int:
    word = ((word ^ word >> 30) * _MIX_1) & _MASK
    word = ((word ^ word >> 27) * _MIX_2) & _MASK
    return word ^ word >> 31
