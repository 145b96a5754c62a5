"""Named changes that a checkpoint tensor undergoes on its way into the file.

Each one works on anything that is sliced like an array, so that a large tensor is never read whole. Knows neither files
nor architectures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


class Sliceable(Protocol):
    """An array, or a tensor in a file that reads what is asked of it."""

    def __getitem__(self, key: Any, /) -> Any:
        """The part that a slice, or a tuple of slices, selects."""


@dataclass(frozen=True)
class Rewrite:
    """A named change. source_shape: from the result's. rows: rows [start, stop) of the result, from the source."""

    name: str
    source_shape: Callable[[Shape], Shape]
    rows: Callable[[Sliceable, int, int], Array]


def _skip_rows(count: int) -> Rewrite:
    """Leave out the first `count` rows, e.g. those of a position table that no position uses."""
    return Rewrite(
        f"skip_rows_{count}",
        source_shape=lambda shape: (shape[0] + count, *shape[1:]),
        rows=lambda source, start, stop: np.asarray(source[start + count : stop + count]),
    )


_ALL = (
    Rewrite("identity", lambda shape: shape, lambda source, start, stop: np.asarray(source[start:stop])),
    Rewrite("transpose", lambda shape: shape[::-1], lambda source, start, stop: np.asarray(source[:, start:stop]).T),
    _skip_rows(2),
)
REWRITES = {rewrite.name: rewrite for rewrite in _ALL}


@dataclass(frozen=True)
class Permuted:
    """An array in memory whose rows (axis 0) or columns (axis 1) are taken in another order; slices copy what they select."""

    array: Array
    order: npt.NDArray[np.int32]
    axis: int

    def __getitem__(self, rows: slice) -> Array:
        """The selected rows of the reordered array."""
        return self.array[self.order[rows]] if self.axis == 0 else self.array[rows][:, self.order]
