"""Where fitted candidates wait until all layers are known: on disk, so that memory does not grow with the number of
layers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from predictors.choose_candidate import Judged
from predictors.matrices import Floats, Tensor
from runtime.base.workspace import naming


@dataclass(frozen=True)
class Shelved:
    """What is left of a candidate that has been judged: what the file would store.

    See predictors.predictor.Candidate.
    """

    tensors: tuple[Tensor, ...]
    rank: int
    type: str
    unit_slope: bool

    def prepare(self, x: Floats) -> Floats:
        """Refused: its numbers are gone."""
        raise NotImplementedError

    def scores(self, prepared: Floats, first: int, end: int) -> Floats:
        """Refused: its numbers are gone."""
        raise NotImplementedError


def shelve(layer: Sequence[Judged]) -> list[Judged]:
    """The same with tensors in an unnamed temporary file (in $TMPDIR), which goes away with them."""
    if not layer:
        return []
    with naming(Path(tempfile.gettempdir())), tempfile.TemporaryFile() as file:
        for judged in layer:
            for tensor in judged.candidate.tensors:
                file.write(tensor.data.data)
        file.flush()
        stored = np.memmap(file, np.uint8, "r")  # one for all: each holds a file descriptor
    end = 0

    def from_disk(tensor: Tensor) -> Tensor:
        nonlocal end
        end += tensor.nbytes
        return replace(tensor, data=stored[end - tensor.nbytes : end])

    candidates = (judged.candidate for judged in layer)
    shelved = [Shelved(tuple(map(from_disk, c.tensors)), c.rank, c.type, c.unit_slope) for c in candidates]
    return [replace(judged, candidate=candidate) for judged, candidate in zip(layer, shelved, strict=True)]
