"""Kind `lowrank`: the rows that decide who fires (gate, or ungated up), approximated at rank r where the layer's inputs
actually lie. No training.

Minimises E||(W - B A)(x - mean x)||^2 over the inputs x of the calibration text: with C their covariance and C = L L^T,
a truncated singular value decomposition of W L, taken from the eigenvectors of the small matrix (W L)^T (W L). Scores
are estimates of pre-activations.
Sources: whitened ("truncation-aware") SVD as in SVD-LLM (arXiv 2403.12983), for predictors in arXiv 2603.14110. Knows
nothing of thresholds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from predictors.calibrate import LayerSamples
from predictors.matrices import Floats, Tensor, block_size, matrix
from predictors.predictor import FitOptions
from runtime.base.phases import phase
from runtime.model_file import tensor_names as names

RIDGE = 1e-2  # added to the covariance, times its mean diagonal: directions that the text hardly shows count a little
_RANKS = (32, 64, 96, 128, 192, 256, 512, 1024)

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LowRank:
    """A candidate; see predictors.predictor.Candidate. z = in x; score = out z."""

    tensors: tuple[Tensor, ...]
    rank: int
    type: str
    matrices: tuple[Floats, Floats]  # as the stored bytes say
    unit_slope: bool = True

    def prepare(self, x: Floats) -> Floats:
        """z, float32 [n_tokens, rank]."""
        z: Floats = x @ self.matrices[0].T
        return z

    def scores(self, prepared: Floats, first: int, end: int) -> Floats:
        """Estimated pre-activations but for a constant per neuron."""
        scores: Floats = prepared @ self.matrices[1][first:end].T
        return scores


def fit(layer: LayerSamples, options: FitOptions) -> Iterator[LowRank]:
    """One candidate for each rank and matrix type."""
    if not ranks(layer.ffn.n_embd, layer.ffn.n_ff, 32):
        return
    with phase("covariance"):
        spread = covariance(layer.fit.x)
    with phase("directions"):
        directions = basis(layer, spread)
    for type_name in options.types:
        yield from _candidates(layer, spread, directions, type_name)


def ranks(n_embd: int, n_ff: int, block: int) -> list[int]:
    """Ranks worth trying: multiples of the type's block at which the predictor has fewer than half of the gate's
    elements.
    """
    most = n_embd * n_ff / (2 * (n_embd + n_ff))
    return sorted({-(-r // block) * block for r in _RANKS if -(-r // block) * block <= min(most, n_embd)})


def covariance(x: Floats) -> Matrix:
    """Ridge-regularised covariance of inputs [n_tokens, n_embd]."""
    centred = x - x.mean(0)
    c: Matrix = (centred.T @ centred).astype(np.float64) / len(x)
    c[np.diag_indices_from(c)] += RIDGE * np.trace(c) / len(c)
    return c


def basis(layer: LayerSamples, covariance: Matrix) -> Floats:
    """Rows A [r_max, n_embd], the most important direction first, such that A (x - mean x) are the leading components
    of the pre-activations, each with its own variance.
    """
    gram = np.zeros_like(covariance, np.float32)
    for chunk in layer.chunks(1):
        rows = layer.gate_rows(*chunk)
        gram += rows.T @ rows
    lower = np.linalg.cholesky(covariance)
    values, vectors = np.linalg.eigh(lower.astype(np.float32).T @ gram @ lower.astype(np.float32))
    n = max(ranks(layer.ffn.n_embd, layer.ffn.n_ff, 32))
    leading, scale = vectors[:, ::-1][:, :n], np.sqrt(np.maximum(values[::-1][:n], 0))
    rows = np.linalg.solve(lower.T, leading.astype(np.float64)).T * scale[:, None]
    scaled: Floats = rows.astype(np.float32)
    return scaled


def _candidates(layer: LayerSamples, covariance: Matrix, basis: Floats, type_name: str) -> Iterator[LowRank]:
    n_embd, n_ff = layer.ffn.n_embd, layer.ffn.n_ff
    if n_embd % block_size(type_name):
        return
    inner = matrix(names.weight(names.PREDICTOR_IN), type_name, basis, np.diag(covariance).astype(np.float32))
    stored = inner.floats()
    spread = covariance.astype(np.float32) @ stored.T  # [n_embd, r_max]: of inputs with components
    moments = (stored @ spread).astype(np.float64)
    moments[np.diag_indices_from(moments)] += (
        1e-6 * np.diag(moments).max()
    )  # directions beyond the rows' own rank are noise
    mixed = np.concatenate([layer.gate_rows(*chunk) @ spread for chunk in layer.chunks(1)])  # [n_ff, r_max]
    row = inner.nbytes // len(basis)
    for r in ranks(n_embd, n_ff, block_size(type_name)):
        # The best outer matrix for the inner one as it was rounded, not for the one that was meant.
        outer_rows = np.linalg.solve(moments[:r, :r], mixed[:, :r].T.astype(np.float64)).T.astype(np.float32)
        outer = matrix(
            names.weight(names.PREDICTOR_OUT), type_name, outer_rows, np.diag(moments)[:r].astype(np.float32)
        )
        first = Tensor(inner.name, type_name, (n_embd, r), inner.data[: r * row])
        yield LowRank((first, outer), r, type_name, (stored[:r], outer.floats()))
