"""The kinds of predictors by name."""

from __future__ import annotations

from collections.abc import Iterator

from predictors import lowrank, mlp, signbit
from predictors.calibrate import LayerSamples
from predictors.predictor import FitOptions, Kind, Proposal


def _none(layer: LayerSamples, options: FitOptions) -> Iterator[Proposal]:
    return iter(())


KINDS: dict[str, Kind] = {"lowrank": lowrank.fit, "signbit": signbit.fit, "mlp": mlp.fit, "none": _none}
METHODS = {
    "lowrank": "whitened truncated SVD",
    "signbit": "sign bits (SparseInfer)",
    "mlp": "two layers trained by weighted cross-entropy",
    "none": "frequencies only",
}
