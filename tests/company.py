"""Sequences alone and in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from oracle import Logits, random_ids

from runtime.compute.batch import Batch
from runtime.engine import Engine

UNLIKE = [random_ids(n, 4000, seed=n) for n in (1, 3, 17, 24, 2, 5, 9, 30)]


def whole_together(engine: Engine, texts: Sequence[list[int]]) -> Logits:
    """Logits of whole texts in one batch, one text behind the other."""
    batches = [Batch.of(ids, 0, sequence, range(len(ids))) for sequence, ids in enumerate(texts)]
    return engine.compute(Batch.together(batches))


def alone(engine: Engine, texts: Sequence[list[int]]) -> Logits:
    """Logits of each text by itself, token by token: [texts, tokens, n_vocab]. All are equally long."""
    found = []
    for ids in texts:
        engine.cells.clear()
        found.append(np.concatenate([engine.compute(Batch.of([token], k, 0)) for k, token in enumerate(ids)]))
    engine.cells.clear()
    return np.stack(found)


def together(engine: Engine, texts: Sequence[list[int]]) -> Logits:
    """The same with a batch for each position, of all texts' tokens there."""
    steps = [
        engine.compute(Batch.together([Batch.of(ids[k : k + 1], k, s) for s, ids in enumerate(texts)]))
        for k in range(len(texts[0]))
    ]
    return np.stack(steps, 1)
