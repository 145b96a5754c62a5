"""Named changes that a checkpoint tensor undergoes on its way into the file.

Each one works on anything that is sliced like an array, so that a large tensor is never read whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.model_file.structure import Attention, Mamba2

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Mixer = Attention | Mamba2


class Sliceable(Protocol):
    """An array, or a tensor in a file that reads what is asked of it."""

    def __getitem__(self, key: Any, /) -> Any:
        """The part that a slice, or a tuple of slices, selects."""


@dataclass(frozen=True)
class Rewrite:
    """A named change. source_shape: from the result's. rows: rows [start, stop) of the result, from the source."""

    name: str
    source_shape: Callable[[Shape], Shape] = field(compare=False)
    rows: Callable[[Sliceable, int, int], Array] = field(compare=False)


def _skip_rows(count: int) -> Rewrite:
    """Leave out the first `count` rows, e.g. those of a position table that no position uses."""
    return Rewrite(
        f"skip_rows_{count}",
        source_shape=lambda shape: (shape[0] + count, *shape[1:]),
        rows=lambda source, start, stop: np.asarray(source[start + count : stop + count]),
    )


def _fused(part: str, attention: Mixer | None) -> Rewrite:
    """The rows of queries, keys or values in a matrix that holds all three: by key-value head, its queries first, then
    its key and its value.
    """
    assert isinstance(attention, Attention), "queries, keys and values are those of a block with attention"
    group = attention.head_count // attention.head_count_kv
    own, before = {"q": (group, 0), "k": (1, group), "v": (1, group + 1)}[part]
    block, stride, offset = (n * attention.head_length for n in (own, group + 2, before))

    def rows(source: Sliceable, start: int, stop: int) -> Array:
        # One slice per key-value head: a tensor in a file cannot be read at scattered rows.
        runs = [
            (max(start, g * block), min(stop, (g + 1) * block), g) for g in range(start // block, -(-stop // block))
        ]
        moved = [(a - g * block + g * stride + offset, b - g * block + g * stride + offset) for a, b, g in runs]
        return np.concatenate([np.asarray(source[a:b]) for a, b in moved])

    total = attention.head_count_kv * stride
    return Rewrite(f"fused_{part}", source_shape=lambda shape: (total, *shape[1:]), rows=rows)


def _groups(mixer: Mixer | None) -> Rewrite:
    """A vector over all heads of a Mamba-2 mixer, with a row for each of its groups."""
    assert isinstance(mixer, Mamba2), "groups are those of a block with Mamba-2"
    length = mixer.inner_length // mixer.group_count
    return Rewrite(
        "groups",
        source_shape=lambda shape: (math.prod(shape),),
        rows=lambda source, start, stop: np.asarray(source[start * length : stop * length]).reshape(-1, length),
    )


_FIXED = (
    Rewrite("identity", lambda shape: shape, lambda source, start, stop: np.asarray(source[start:stop])),
    Rewrite("transpose", lambda shape: shape[::-1], lambda source, start, stop: np.asarray(source[:, start:stop]).T),
    Rewrite("squeeze", lambda shape: (shape[0], 1, *shape[1:]), lambda source, a, b: np.asarray(source[a:b])[:, 0]),
    Rewrite("column", lambda shape: shape[:1], lambda source, start, stop: np.asarray(source[start:stop])[:, None]),
    Rewrite(
        "minus_exp",  # of a vector, as a column
        lambda shape: shape[:1],
        lambda source, start, stop: -np.exp(np.asarray(source[start:stop], np.float32))[:, None],
    ),
    Rewrite("add_one", lambda shape: shape, lambda source, start, stop: np.float32(1) + source[start:stop]),
    _skip_rows(2),
)
IDENTITY = _FIXED[0]
_MADE: dict[str, Callable[[Mixer | None], Rewrite]] = {
    "groups": _groups,
    **{fixed.name: lambda _mixer, fixed=fixed: fixed for fixed in _FIXED},  # type: ignore[misc]
    **{f"fused_{part}": lambda attention, part=part: _fused(part, attention) for part in "qkv"},  # type: ignore[misc]
}
NAMES = frozenset(_MADE)


def named(name: str, mixer: Mixer | None = None) -> Rewrite:
    """The rewrite called `name`, one of NAMES, of a tensor in a block with this mixer."""
    return _MADE[name](mixer)


def ternary(source: Sliceable) -> Array:
    """A whole matrix with every weight rounded to -1, 0 or 1 times the mean of all absolute values (BitNet b1.58,
    arXiv:2402.17764), float32.
    """
    weights = np.asarray(source[:], np.float32)
    scale = np.maximum(np.abs(weights).mean(dtype=np.float32), np.float32(1e-5))
    rounded: Array = np.clip(np.round(weights / scale), -1, 1) * scale
    return rounded


@dataclass(frozen=True)
class ScaledColumns:
    """A matrix whose columns are multiplied with a vector [n_columns], float32; slices read what they select."""

    source: Sliceable
    vector: npt.NDArray[np.float32]

    def __getitem__(self, key: Any) -> Array:
        """The selected rows, or rows and columns."""
        columns = self.vector[key[1]] if isinstance(key, tuple) else self.vector
        return np.asarray(self.source[key], np.float32) * columns


@dataclass(frozen=True)
class Permuted:
    """An array in memory whose rows (axis 0) or columns (axis 1) are taken in another order; slices copy what they
    select.
    """

    array: Array
    order: npt.NDArray[np.int32]
    axis: int

    def __getitem__(self, rows: slice) -> Array:
        """The selected rows of the reordered array."""
        return self.array[self.order[rows]] if self.axis == 0 else self.array[rows][:, self.order]
