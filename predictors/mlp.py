"""Kind `mlp`: two layers with ReLU between, trained to tell which neurons fire.

Needs torch (`pip install lazyneuron[torch]`).

The shape is PowerInfer's and Deja Vu's predictor; trained by binary cross-entropy, where a neuron that fires counts by
the energy it contributes.
It starts from the low-rank approximation, each direction once with either sign.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from predictors import lowrank
from predictors.calibrate import LayerSamples
from predictors.hot_order import Order
from predictors.matrices import Floats, Tensor, block_size, matrix
from predictors.predictor import FitOptions, Proposal, some_rows
from runtime.errors import UserError
from runtime.model_file import tensor_names as names

EPOCHS = 24
BATCH = 256
RATE = 2e-3
_RANKS = (32, 64, 96, 256, 1024)
_MOST_ENERGY = 8.0  # of a single activation, in units of the layer's mean: one outlier must not outweigh a batch


@dataclass(frozen=True)
class Mlp:
    """A candidate; see predictors.predictor.Candidate. z = relu(in x); score = out z."""

    tensors: tuple[Tensor, ...]
    rank: int
    type: str
    matrices: tuple[Floats, Floats]  # as the stored bytes say
    unit_slope: bool = False

    def prepare(self, x: Floats) -> Floats:
        """z, float32 [n_tokens, rank]."""
        z: Floats = np.maximum(x @ self.matrices[0].T, 0)
        return z

    def scores(self, prepared: Floats, first: int, end: int) -> Floats:
        """Logits but for a constant per neuron."""
        logits: Floats = prepared @ self.matrices[1][first:end].T
        return logits


def fit(layer: LayerSamples, options: FitOptions) -> Iterator[Proposal]:
    """One candidate for each of a few ranks and each matrix type."""
    torch, ffn = _torch(), layer.ffn
    assert not ffn.experts  # see `predictors.fit`
    allowed = lowrank.ranks(ffn.n_embd, ffn.n_ff, 32)
    weights = _weights(layer) if allowed else np.zeros((0, 0), np.float16)
    basis = lowrank.basis(layer, lowrank.covariance(layer.fit.x)) if allowed else np.zeros((0, 0), np.float32)
    for r in (r for r in _RANKS if r in allowed):
        inner, outer = _train(torch, layer.fit.x, weights, basis[: r // 2], options)
        for type_name in options.types:
            if ffn.n_embd % block_size(type_name) == 0 and r % block_size(type_name) == 0:
                yield Proposal(partial(_some, _stored(layer, inner, outer, type_name)))


def _some(whole: Mlp, neurons: Order | None) -> Mlp:
    """The candidate for some of its neurons."""
    if neurons is None:
        return whole
    first, second = whole.tensors
    matrices = (whole.matrices[0], whole.matrices[1][neurons])
    return replace(whole, tensors=(first, some_rows(second, neurons)), matrices=matrices)


def _torch() -> Any:
    try:
        import torch  # noqa: PLC0415 - an extra, and slow to import
    except ImportError:
        raise UserError(
            "predictor kind `mlp` needs torch, which is not installed", "pip install 'lazyneuron[torch]'"
        ) from None
    return torch


def _weights(layer: LayerSamples) -> Any:
    """float16 [n_tokens, n_ff]: 0 where a neuron does not fire, else how much that counts (1 on average over the layer,
    plus 1).
    """
    n_tokens, n_ff = len(layer.fit), layer.ffn.n_ff
    weights = np.zeros((n_tokens, n_ff), np.float16)
    for first, end in layer.chunks(n_tokens):
        responses = layer.responses(layer.fit, first, end)
        mean = max(float(responses.energy[responses.fired].mean()) if responses.fired.any() else 0.0, 1e-30)
        weights[:, first:end] = np.where(responses.fired, 1 + np.minimum(responses.energy / mean, _MOST_ENERGY), 0)
    return weights


def _train(torch: Any, x: Floats, weights: Any, basis: Floats, options: FitOptions) -> tuple[Floats, Floats]:
    """Both matrices, float32 [rank, n_embd] and [n_ff, rank]."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    directions = basis / (x @ basis.T).std(0)[:, None]
    inner = torch.nn.Parameter(torch.from_numpy(np.concatenate([directions, -directions])))
    outer = torch.nn.Parameter(0.1 * torch.randn(weights.shape[1], len(inner)))
    bias = torch.nn.Parameter(torch.full((weights.shape[1],), -2.0))
    steps = max(1, EPOCHS * (len(x) // BATCH))
    optimiser = torch.optim.AdamW([inner, outer, bias], lr=RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE * 2, total_steps=steps, pct_start=0.1)
    for _, rows in zip(range(steps), _batches(len(x), options.seed), strict=False):
        w = torch.from_numpy(weights[rows].astype(np.float32))
        logits = torch.relu(torch.from_numpy(x[rows]) @ inner.T) @ outer.T + bias
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, (w > 0).float(), torch.clamp(w, min=1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return inner.detach().numpy(), outer.detach().numpy()


def _batches(n: int, seed: int) -> Iterator[Any]:
    """Index arrays [BATCH], epoch after epoch in a new order."""
    rng = np.random.default_rng(seed)
    size = min(n, BATCH)
    while True:
        yield from rng.permutation(n)[: n // size * size].reshape(-1, size)


def _stored(layer: LayerSamples, inner: Floats, outer: Floats, type_name: str) -> Mlp:
    x = layer.fit.x
    first = matrix(names.weight(names.PREDICTOR_IN), type_name, inner, (x**2).mean(0))
    z = np.maximum(x @ first.floats().T, 0)
    second = matrix(names.weight(names.PREDICTOR_OUT), type_name, outer, (z**2).mean(0) + np.float32(1e-12))
    return Mlp((first, second), len(inner), type_name, (first.floats(), second.floats()))
