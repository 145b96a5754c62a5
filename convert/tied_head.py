"""Whether the output head is the token embeddings: what config.json says, held against what is stored.

As in transformers: a stored head that differs counts, whatever config.json says, and either of the two stands for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from convert.arch import Generated, Source
from convert.checkpoint import FLOATS, Checkpoint
from runtime.model_file.structure import Structure

_EMBEDDINGS, _HEAD = "token_embd.weight", "output.weight"
_PIECE = 1 << 22  # numbers compared at a time
Sources = dict[str, Source | Generated]


def settle_head(
    checkpoint: Checkpoint, structure: Structure, sources: Mapping[str, Source | Generated]
) -> tuple[Structure, Sources, tuple[str, ...]]:
    """The structure and the sources as the stored tensors have them, and what the user should know of it."""
    head, embeddings = sources.get(_HEAD), sources[_EMBEDDINGS]
    if not structure.tied_output or not isinstance(head, Source) or not isinstance(embeddings, Source):
        return structure, dict(sources), ()
    if head.name not in checkpoint.tensors:
        return structure, dict(sources), ()
    if embeddings.name not in checkpoint.tensors:
        return structure, {**sources, _EMBEDDINGS: replace(embeddings, name=head.name)}, ()
    if _same(checkpoint, head.name, embeddings.name):
        return structure, dict(sources), ()
    return (
        replace(structure, tied_output=False),
        dict(sources),
        (f"config.json ties the output head to the embeddings, but another {head.name} is stored, which counts",),
    )


def _same(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two matrices hold the same numbers, in whichever types."""
    stored = [checkpoint.tensors[name] for name in (one, other)]
    shape = stored[0].shape
    if shape != stored[1].shape or len(shape) != 2 or any(tensor.dtype not in FLOATS for tensor in stored):
        return False
    step = max(1, _PIECE // max(shape[1], 1))
    with checkpoint.open(one) as a, checkpoint.open(other) as b:
        pieces = (slice(at, min(at + step, shape[0])) for at in range(0, shape[0], step))
        return all(
            np.array_equal(np.asarray(a[piece], np.float64), np.asarray(b[piece], np.float64)) for piece in pieces
        )
