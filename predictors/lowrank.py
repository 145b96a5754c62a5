"""Kind `lowrank`: the rows that decide who fires (gate, or ungated up), approximated at rank r where the layer's inputs
actually lie. No training.

Minimises E||(W - B A)(x - mean x)||^2 over the inputs x of the calibration text. With C their covariance and G = W^T W,
the rows of A are the leading eigenvectors of G C, orthogonal in the metric C: what a singular value decomposition of W
L, with C = L L^T, would give. Scores are estimates of pre-activations.
Sources: whitened ("truncation-aware") SVD as in SVD-LLM (arXiv 2403.12983), for predictors in arXiv 2603.14110. Knows
nothing of thresholds.

Experts share A, for which the inputs are those of each expert about their own mean. B has rows of each expert, and is
the best for the tokens that chose it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from predictors.calibrate import LayerSamples
from predictors.hot_order import Order
from predictors.matrices import Floats, Tensor, block_size, matrix
from predictors.predictor import FitOptions, Proposal
from predictors.routed import Routed
from runtime.base.phases import phase
from runtime.errors import UserError
from runtime.model_file import tensor_names as names

RIDGE = 1e-2  # added to the covariance, times its mean diagonal: directions that the text hardly shows count a little
_RANKS = (32, 64, 96, 128, 192, 256, 512, 1024)
_MORE = 64  # directions of the subspace beyond those that are wanted
_ITERATIONS = 2
_GATHERED = 4096  # tokens of an expert whose inputs are gathered at a time
_SMALL = 32  # columns that LAPACK computes in one thread
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
    if not ranks(layer.ffn.n_embd, layer.ffn.n_reached, 32):
        return
    with phase("covariance"):
        spread = covariance(layer.fit.x) if layer.fit.routed is None else within_experts(layer.fit.x, layer.fit.routed)
    with phase("directions"):
        directions = basis(layer, spread, options.seed)
    for type_name in options.types:
        if layer.ffn.n_embd % block_size(type_name) == 0:
            with phase("candidates"):
                outer = _OuterRows.best(layer, spread, directions, type_name)
            for r in ranks(layer.ffn.n_embd, layer.ffn.n_reached, block_size(type_name)):
                yield Proposal(partial(outer.candidate, r))


def ranks(n_embd: int, n_ff: int, block: int) -> list[int]:
    """Ranks worth trying: multiples of the type's block at which the predictor has fewer than half of the gate's
    elements. n_ff: neurons that a token may use.
    """
    most = n_embd * n_ff / (2 * (n_embd + n_ff))
    return sorted({-(-r // block) * block for r in _RANKS if -(-r // block) * block <= min(most, n_embd)})


def covariance(x: Floats) -> Floats:
    """Ridge-regularised covariance of inputs [n_tokens, n_embd]."""
    centred = x - x.mean(0)
    c: Floats = centred.T @ centred
    c /= np.float32(len(x))
    return _regularised(c)


def within_experts(x: Floats, routed: Routed) -> Floats:
    """The same of inputs about the mean of those with the same expert, averaged over all choices: a constant per expert
    costs a predictor nothing.
    """
    total = x.mean(0)
    c: Floats = (x - total).T @ (x - total)
    c /= np.float32(len(x))
    for expert, n in enumerate(routed.chosen):
        if n:
            apart = x[routed.tokens(expert)].mean(0) - total
            c -= np.outer(apart, apart * np.float32(n / routed.ids.size))
    return _regularised(c)


def _regularised(c: Floats) -> Floats:
    c[np.diag_indices_from(c)] += np.float32(RIDGE * np.trace(c, dtype=np.float64) / len(c))
    return c


def basis(layer: LayerSamples, covariance: Floats, seed: int = 0) -> Floats:
    """Rows A [r_max, n_embd], the most important direction first, such that A (x - mean x) are the leading components
    of the pre-activations, each with its own variance.
    """
    gram = np.zeros_like(covariance)
    routed = layer.fit.routed
    for chunk in layer.chunks(1):
        rows = layer.gate_rows(*chunk)
        if routed:  # as often as they count
            rows *= np.float32(np.sqrt(routed.chosen[chunk[0] // layer.ffn.expert_length] / len(layer.fit)))
        gram += rows.T @ rows
    return leading(gram, covariance, max(ranks(layer.ffn.n_embd, layer.ffn.n_reached, 32)), seed)


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

    inner: of the largest rank; those of others are its first rows. mixed: float32 [n_ff, r_max], and turned [experts,
    r_max, r_max], lower triangular: an expert's best outer matrix of rank r is the product of their first r columns.
    size: float32 [r_max], mean squares of the components. Without experts all neurons are those of one.
    """

    inner: Tensor
    stored: Floats  # the numbers of `inner`
    mixed: Floats
    turned: Floats
    size: Floats
    length: int  # neurons of an expert

    @classmethod
    def best(cls, layer: LayerSamples, covariance: Floats, basis: Floats, type_name: str) -> _OuterRows:
        """The best outer matrices for the inner one as it is rounded, not for the one that was meant."""
        inner = matrix(names.weight(names.PREDICTOR_IN), type_name, basis, np.diag(covariance))
        stored, length, r = inner.floats(), layer.ffn.expert_length, len(basis)
        everywhere = covariance @ stored.T  # [n_embd, r_max]: of inputs with components
        mixed = np.empty((layer.ffn.n_ff, r), np.float32)
        turned = np.empty((layer.ffn.n_ff // length, r, r), np.float32)
        spread, last = everywhere, -1
        for first, end in layer.chunks(1):
            if (expert := first // length) != last:
                if layer.fit.routed:
                    spread = _of_expert(layer, expert, stored, everywhere)
                turned[expert], last = _turned(stored @ spread), expert
            mixed[first:end] = layer.gate_rows(first, end) @ spread @ turned[expert].T
        return cls(inner, stored, mixed, turned, np.diag(stored @ everywhere).astype(np.float32), length)

    def candidate(self, r: int, neurons: Order | None) -> LowRank:
        """The candidate of rank `r`, for some neurons (None: all)."""
        type_name, chosen = self.inner.type, np.arange(len(self.mixed)) if neurons is None else neurons
        rows = np.empty((len(chosen), r), np.float32)
        bounds = np.searchsorted(chosen, np.arange(len(self.turned) + 1) * self.length)
        for expert, (first, end) in enumerate(pairwise(bounds.tolist())):
            rows[first:end] = self.mixed[chosen[first:end], :r] @ self.turned[expert, :r, :r]
        outer = matrix(names.weight(names.PREDICTOR_OUT), type_name, rows, self.size[:r])
        row = self.inner.nbytes // len(self.stored)
        first_matrix = Tensor(self.inner.name, type_name, (self.stored.shape[1], r), self.inner.data[: r * row])
        return LowRank((first_matrix, outer), r, type_name, (self.stored[:r], outer.floats()))


def _turned(products: Floats) -> Floats:
    """Of the components' mean products [r, r] the lower triangular T with T^t T as their inverse, and so for the first
    rows and columns of both.
    """
    moments = products.astype(np.float64)
    # Directions beyond the rows' own rank are noise.
    moments[np.diag_indices_from(moments)] += 1e-6 * np.diag(moments).max()
    size = np.sqrt(np.diag(moments))
    # The first r rows and columns of a triangular inverse are the inverse of the first r.
    turned: Floats = (_inverse_root(moments / np.outer(size, size)) / size).astype(np.float32)
    return turned


def _inverse_root(m: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The inverse of the Cholesky factor of m, by halves: LAPACK's threads wait for each other at every few columns,
    which takes a hundred times as long where other processes have the cores.
    """
    n = len(m)
    if n <= _SMALL:
        return np.asarray(np.linalg.inv(np.linalg.cholesky(m)))
    h = n // 2
    first = _inverse_root(m[:h, :h])
    mixed = m[h:, :h] @ first.T
    second = _inverse_root(m[h:, h:] - mixed @ mixed.T)
    found = np.zeros_like(m)
    found[:h, :h], found[h:, h:], found[h:, :h] = first, second, -second @ (mixed @ first)
    return found


def _of_expert(layer: LayerSamples, expert: int, stored: Floats, everywhere: Floats) -> Floats:
    """What `everywhere` [n_embd, r] is for the tokens of one expert, and a little what it is for all: these count as
    many tokens as an input has elements, for of fewer no covariance has an inverse.
    """
    routed, x = layer.fit.routed, layer.fit.x
    assert routed
    tokens, d = routed.tokens(expert), x.shape[1]
    if not len(tokens):
        return everywhere
    mean = x[tokens].mean(0)
    own = np.zeros_like(everywhere)
    for at in range(0, len(tokens), _GATHERED):
        centred = x[tokens[at : at + _GATHERED]] - mean
        own += centred.T @ (centred @ stored.T)
    own += np.float32(d) * everywhere
    own /= np.float32(len(tokens) + d)
    return own
