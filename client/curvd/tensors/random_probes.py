"""Random columns that need not travel, in NumPy (docs/probes.md).

The server makes the same probes from (distribution, seed, index): Rademacher ones to
the bit, normal ones to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvd.contract import Distribution, member

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def probes(
    distribution: Distribution | str,
    seed: int,
    indices: Sequence[int],
    size: int,
    dtype: Any = np.float32,
) -> NDArray[Any]:
    """Make probes.

    Args:
        distribution: The distribution of the elements; independent, mean zero, variance one.
        seed: In [0, 2^63).
        indices: Which probes of the seed's sequence; K of them.
        size: P.
        dtype: Element type.

    Returns:
        [K, P].

    Examples:
        >>> from curvd.tensors.random_probes import probes
        >>> probes("rademacher", seed=0, indices=[0], size=6)
        array([[-1., -1., -1., -1.,  1., -1.]], dtype=float32)
        >>> probes("normal", seed=0, indices=[0, 1], size=43).shape
        (2, 43)
    """
    kind = member(Distribution, distribution, "distribution")
    make = _signs if kind is Distribution.RADEMACHER else _normals
    rows = [make(_key(seed, index), size) for index in indices]
    return np.asarray(rows, dtype=dtype).reshape(len(rows), size)


def _key(seed: int, index: int) -> np.uint64:
    counter = np.asarray([index + 1], np.uint64) * _GAMMA
    return np.uint64(_mix(_mix(np.asarray([seed], np.uint64)) + counter)[0])


def _signs(key: np.uint64, size: int) -> NDArray[np.float64]:
    words = _words(key, -(-size // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:size]
    return np.asarray(1.0 - 2.0 * bits, np.float64)


def _normals(key: np.uint64, size: int) -> NDArray[np.float64]:
    words = _words(key, size + size % 2).reshape(-1, 2)
    uniforms = (words >> np.uint64(11)) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniforms[:, 0] + 2.0**-53))
    angle = 2.0 * np.pi * uniforms[:, 1]
    both = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1)
    return both.reshape(-1)[:size]


def _words(key: np.uint64, count: int) -> NDArray[np.uint64]:
    return _mix(np.arange(1, count + 1, dtype=np.uint64) * _GAMMA + key)


def _mix(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # Arrays, not scalars: NumPy warns when a scalar product wraps around.
    word = (word ^ (word >> np.uint64(30))) * _MIX_1
    word = (word ^ (word >> np.uint64(27))) * _MIX_2
    return word ^ (word >> np.uint64(31))
