"""How many bytes of weights one token reads, in each FFN mode, as far as a file says which neurons fire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.compute.traffic import Activity, Traffic, bytes_per_token
from runtime.model_file.frequencies import are_stored, fired_share
from runtime.model_file.reader import GgufFile
from runtime.model_file.structure import ARCHITECTURE


@dataclass(frozen=True)
class Sparsity:
    """Shares of the neurons that fired on the calibration text: of each layer (0 without an FFN), and on average of
    those that have one; None where the file does not say.
    """

    calibrated: bool
    layer_shares: list[float] | None
    share: float | None


def sparsity_of(file: GgufFile) -> Sparsity:
    """What an open file says of how many neurons fire."""
    if not are_stored(file):
        return Sparsity(False, None, None)
    fired = {i: fired_share(file, i) for i in file.structure.ffns}
    shares = [fired.get(i, 0.0) for i in range(file.structure.block_count)]
    return Sparsity(True, shares, float(np.mean(list(fired.values()))))


def traffic_by_mode(file: GgufFile, shares: Sequence[float] | None) -> dict[str, Traffic | None]:
    """What a token reads: `dense`; `exact_all`, `exact_none` and `exact_calibrated` when all neurons, none, or the
    usual
    ones fire; `predicted_calibrated` as measured. None where the file does not say.

    shares: of each layer's neurons, those that fired on the calibration text.
    """
    return {
        name: None if activity is None else bytes_per_token(file.structure, file.tensors, activity)
        for name, activity in _activities(file, shares).items()
    }


def _activities(file: GgufFile, shares: Sequence[float] | None) -> dict[str, Activity | None]:
    s, n = file.structure, file.structure.block_count
    predicted, recalls = (_measured(file, name) for name in ("predicted_share", "recall"))
    computed = [share * recall for share, recall in zip(shares or [], recalls, strict=False)]
    known = len(computed) == len(predicted) == n
    return {
        "dense": Activity.uniform("dense", n, 1.0) if s.layout == "both" else None,
        "exact_all": Activity.uniform("exact", n, 1.0),
        "exact_none": Activity.uniform("exact", n, 0.0),
        "exact_calibrated": Activity("exact", shares, [1.0] * n) if shares else None,
        "predicted_calibrated": Activity("predicted", computed, predicted) if known else None,
    }


def _measured(file: GgufFile, name: str) -> list[float]:
    """One share for each layer, from the file's metadata; empty where it has none."""
    return [float(value) for value in file.metadata.get(f"{ARCHITECTURE}.predictor.{name}", ())]
