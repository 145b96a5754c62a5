"""Kind `lowrank`: the rows that decide who fires (gate, or ungated up), approximated at rank r where the layer's inputs
actually lie. No training.

Minimises E||(W - B A)(x - mean x)||^2 over the inputs x of the calibration text. With C their covariance and G = W^T W,
the rows of A are the leading eigenvectors of G C, orthogonal in the metric C: what a singular value decomposition of W
L, with C = L L^T, would give. Scores are estimates of pre-activations.
Sources: whitened ("truncation-aware") SVD as in SVD-LLM (arXiv 2403.12983), for predictors in arXiv 2603.14110. Knows
nothing of thresholds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np

from predictors.calibrate import LayerSamples
from predictors.hot_order import Order
from predictors.matrices import Floats, Tensor, block_size, matrix
from predictors.predictor import FitOptions, Proposal
from runtime.base.phases import phase
from runtime.errors import UserError
from runtime.model_file import tensor_names as names

RIDGE = 1e-2  # added to the covariance, times its mean diagonal: directions that the text hardly shows count a little
_RANKS = (32, 64, 96, 128, 192, 256, 512, 1024)
_MORE = 64  # directions of the subspace beyond those that are wanted
_ITERATIONS = 2
_NOTHING = 1e-6  # an eigenvalue that may be only rounding, relative to the largest


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


def fit(layer: LayerSamples, options: FitOptions) -> Iterator[Proposal]:
    """One candidate for each rank and matrix type."""
    if not ranks(layer.ffn.n_embd, layer.ffn.n_ff, 32):
        return
    with phase("covariance"):
        spread = covariance(layer.fit.x)
    with phase("directions"):
        directions = basis(layer, spread, options.seed)
    for type_name in options.types:
        if layer.ffn.n_embd % block_size(type_name) == 0:
            with phase("candidates"):
                outer = _OuterRows.best(layer, spread, directions, type_name)
            for r in ranks(layer.ffn.n_embd, layer.ffn.n_ff, block_size(type_name)):
                yield Proposal(partial(outer.candidate, r))


def ranks(n_embd: int, n_ff: int, block: int) -> list[int]:
    """Ranks worth trying: multiples of the type's block at which the predictor has fewer than half of the gate's
    elements.
    """
    most = n_embd * n_ff / (2 * (n_embd + n_ff))
    return sorted({-(-r // block) * block for r in _RANKS if -(-r // block) * block <= min(most, n_embd)})


def covariance(x: Floats) -> Floats:
    """Ridge-regularised covariance of inputs [n_tokens, n_embd]."""
    centred = x - x.mean(0)
    c: Floats = centred.T @ centred
    c /= np.float32(len(x))
    c[np.diag_indices_from(c)] += np.float32(RIDGE * np.trace(c, dtype=np.float64) / len(c))
    return c


def basis(layer: LayerSamples, covariance: Floats, seed: int = 0) -> Floats:
    """Rows A [r_max, n_embd], the most important direction first, such that A (x - mean x) are the leading components
    of the pre-activations, each with its own variance.
    """
    gram = np.zeros_like(covariance)
    for chunk in layer.chunks(1):
        rows = layer.gate_rows(*chunk)
        gram += rows.T @ rows
    return leading(gram, covariance, max(ranks(layer.ffn.n_embd, layer.ffn.n_ff, 32)), seed)


def leading(gram: Floats, covariance: Floats, n: int, seed: int = 0) -> Floats:
    """The `n` leading eigenvectors v of gram x covariance, each times the root of its eigenvalue, as rows [n, n_embd];
    they are orthogonal in the metric of the covariance. Directions beyond the matrices' rank are 0.

    By iteration in a subspace that is a little larger: whole decompositions take ten times as long, most of it in one
    thread. What that loses is the last few directions.
    """
    d = len(gram)
    start = np.random.default_rng(seed).standard_normal((d, min(d, n + _MORE)), np.float32)
    found = gram @ start
    for _ in range(_ITERATIONS):
        turned = covariance @ found
        found = gram @ (turned @ _orthogonal(found.T @ turned))
    turned = covariance @ found
    turned = turned @ _orthogonal(found.T @ turned)
    image = gram @ turned  # a step further, and what the eigenvalues of this step follow from
    values, vectors = np.linalg.eigh((turned.T @ image).astype(np.float64))
    values, vectors = values[::-1][:n], vectors[:, ::-1][:, :n]
    scale = np.where(values > _NOTHING * values[0], 1 / np.sqrt(np.maximum(values, 1e-300)), 0)
    rows: Floats = (image @ (vectors * scale).astype(np.float32)).T
    return np.concatenate([rows, np.zeros((n - len(rows), d), np.float32)])


def _orthogonal(products: Floats) -> Floats:
    """What makes m vectors orthogonal, [m, m], from all products of two of them; where they span less, the rest becomes
    small.
    """
    symmetric = (products + products.T).astype(np.float64) / 2
    size = np.sqrt(np.maximum(np.diag(symmetric), 1e-300))
    symmetric /= np.outer(size, size)
    for ridge in (1e-6, 1e-4, 1e-2):  # of rounded products some eigenvalues may be below 0
        with suppress(np.linalg.LinAlgError):
            lower = np.linalg.cholesky(symmetric + ridge * np.eye(len(size)))
            turned: Floats = (np.linalg.inv(lower).T / size[:, None]).astype(np.float32)
            return turned
    raise UserError("the model's inputs on the calibration text are not finite numbers")


@dataclass(frozen=True)
class _OuterRows:
    """For one matrix type, what every rank's outer matrix follows from.

    inner: of the largest rank; those of others are its first rows. mixed: float32 [n_ff, r_max], and turned [r_max,
    r_max], lower triangular: the best outer matrix of rank r is the product of their first r columns. size: float32
    [r_max], mean squares of the components.
    """

    inner: Tensor
    stored: Floats  # the numbers of `inner`
    mixed: Floats
    turned: Floats
    size: Floats

    @classmethod
    def best(cls, layer: LayerSamples, covariance: Floats, basis: Floats, type_name: str) -> _OuterRows:
        """The best outer matrices for the inner one as it is rounded, not for the one that was meant."""
        inner = matrix(names.weight(names.PREDICTOR_IN), type_name, basis, np.diag(covariance))
        stored = inner.floats()
        spread = covariance @ stored.T  # [n_embd, r_max]: of inputs with components
        moments = (stored @ spread).astype(np.float64)
        # Directions beyond the rows' own rank are noise.
        moments[np.diag_indices_from(moments)] += 1e-6 * np.diag(moments).max()
        size = np.sqrt(np.diag(moments))
        # The first r rows and columns of a triangular inverse are the inverse of the first r.
        inverse = np.linalg.inv(np.linalg.cholesky(moments / np.outer(size, size)))
        turned = inverse.T / size[:, None]
        mixed = np.concatenate([layer.gate_rows(*chunk) @ spread for chunk in layer.chunks(1)])
        mixed = mixed @ turned.astype(np.float32)
        return cls(inner, stored, mixed, turned.T.astype(np.float32), np.diag(moments).astype(np.float32))

    def candidate(self, r: int, neurons: Order | None) -> LowRank:
        """The candidate of rank `r`, for some neurons (None: all)."""
        type_name = self.inner.type
        mixed = self.mixed if neurons is None else self.mixed[neurons]
        rows = np.ascontiguousarray(mixed[:, :r]) @ self.turned[:r, :r]
        outer = matrix(names.weight(names.PREDICTOR_OUT), type_name, rows, self.size[:r])
        row = self.inner.nbytes // len(self.stored)
        first = Tensor(self.inner.name, type_name, (self.stored.shape[1], r), self.inner.data[: r * row])
        return LowRank((first, outer), r, type_name, (self.stored[:r], outer.floats()))
