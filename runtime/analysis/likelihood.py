"""How likely a model finds the tokens of a text: from its logits, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_ROWS = 64  # float64 copies of the logits are made for this many positions at a time
LARGEST_EXPONENT = 700  # e to this is still a float

Logits = npt.NDArray[np.float32]  # [n, n_vocab]


def token_losses(logits: Logits, ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """Negative log-likelihood of each of `ids` [n] under its row of `logits`, in nats."""
    losses = np.empty(len(ids))
    for start in range(0, len(ids), _ROWS):
        part = slice(start, start + _ROWS)
        rows = _log_softmax(logits[part])
        losses[part] = -rows[np.arange(len(rows)), np.asarray(ids[part])]
    return losses


def divergence(reference: Logits, found: Logits) -> float:
    """Sum over positions of KL(reference || found), in nats."""
    total = 0.0
    for start in range(0, len(reference), _ROWS):
        p, q = (_log_softmax(x[start : start + _ROWS]) for x in (reference, found))
        total += float((np.exp(p) * (p - q)).sum())
    return total


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    normalised: npt.NDArray[np.float64] = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return normalised
