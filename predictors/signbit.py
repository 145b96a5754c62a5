"""Kind `signbit`: does a gate row agree in sign with its input often enough to fire?

One bit per weight, nothing trained.

The score is minus the number of sign bits in which the packed row and the packed input differ. Source: SparseInfer
(arXiv 2411.12692), which compares the number with one conservativeness factor; here every neuron has its own threshold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from predictors.calibrate import LayerSamples
from predictors.matrices import Bytes, Floats, Tensor, plain
from predictors.predictor import FitOptions, Proposal, some_rows
from runtime.model_file import tensor_names as names


def pack(rows: Floats) -> Bytes:
    """Sign bits of rows [n, n_embd]: uint8 [n, n_embd / 8], bit j of byte b is set where element 8 b + j is below 0."""
    return np.packbits(rows < 0, axis=1, bitorder="little")


def unpack(bits: Bytes) -> Floats:
    """Packed signs as -1 and 1, float32 [n, n_embd]."""
    return 1 - 2 * np.unpackbits(bits, axis=1, bitorder="little").astype(np.float32)


@dataclass(frozen=True)
class SignBit:
    """A candidate; see predictors.predictor.Candidate."""

    tensors: tuple[Tensor]
    rank: int  # n_embd
    type: str = "sign"
    unit_slope: bool = False

    def prepare(self, x: Floats) -> Floats:
        """Signs of the inputs, -1 or 1, float32 [n_tokens, n_embd]."""
        return unpack(pack(x))

    def scores(self, prepared: Floats, first: int, end: int) -> Floats:
        """Minus the number of differing signs: whole numbers, exact in float32."""
        bits = self.tensors[0].data.reshape(-1, self.rank // 8)[first:end]
        scores: Floats = (prepared @ unpack(bits).T - np.float32(self.rank)) / np.float32(2)
        return scores


def fit(layer: LayerSamples, options: FitOptions) -> Iterator[Proposal]:
    """The one candidate there is; none where n_embd is no multiple of 8."""
    d = layer.ffn.n_embd
    if d % 8 == 0:
        bits = np.concatenate([pack(layer.gate_rows(*chunk)) for chunk in layer.chunks(1)])
        rows = plain(names.PREDICTOR_SIGN, "i8", bits.view(np.int8))
        yield Proposal(lambda neurons: SignBit((some_rows(rows, neurons),), d))
