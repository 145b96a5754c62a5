"""What a model's neurons do on calibration text, layer by layer: the inputs of each FFN, which neurons fire, and how
much each contributes.

All hidden states are kept between layers, weights and pre-activations only a chunk of neurons at a time: memory does
not grow with the number of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from runtime.base.progress import Progress, silent
from runtime.block_runner import BlockRunner
from runtime.model_file import tensor_names as names
from runtime.model_file.structure import Structure

Floats = npt.NDArray[np.float32]

DEFAULT_TOKENS = 24576
SHARES = (0.7, 0.15, 0.15)  # of the windows: to fit predictors, to choose among them, to say what they achieve
_MOST_BYTES = 1 << 29  # of hidden states and FFN inputs
_CACHED = 1024  # tokens whose pre-activations stay in a cache while they are counted
_CHUNK_BYTES = 1 << 26  # of one float32 matrix [tokens, neurons of a chunk]


def default_tokens(s: Structure) -> int:
    """24,576, or what 512 MiB hold of float32 [tokens, n_embd], two matrices."""
    return min(DEFAULT_TOKENS, _MOST_BYTES // (4 * 2 * s.embedding_length))


@dataclass(frozen=True)
class Responses:
    """What the neurons first .. end - 1 do on some tokens; float32 or bool [n_tokens, end - first]."""

    gate: Floats  # pre-activations (ungated: of the up rows), biases included
    fired: npt.NDArray[np.bool_]
    # (activation x norm of the down row)^2, relative to the squared norm of the residual stream after the block; 0
    # where not fired
    energy: Floats


@dataclass(frozen=True)
class TokenSamples:
    """Some tokens of one layer.

    x: inputs of the FFN, float32 [n_tokens, n_embd]; residual: the stream before the FFN's norm, where it was asked
    for.

    weight: float32 [n_tokens], one over the squared norm of the residual stream after the block.
    """

    x: Floats
    weight: Floats
    residual: Floats | None = None

    @property
    def seen(self) -> Floats:
        """What a predictor sees: the residual stream where it was asked for, else the FFN's own input."""
        return self.x if self.residual is None else self.residual

    def __len__(self) -> int:
        return len(self.x)


class LayerSamples:
    """One layer on the calibration text, in three parts that share no window."""

    def __init__(self, runner: BlockRunner, i: int, parts: tuple[TokenSamples, TokenSamples, TokenSamples]) -> None:
        self.structure, self.ffn, self.i, self._runner = runner.structure, runner.structure.ffns[i], i, runner
        self.fit, self.validation, self.test = parts
        self.output: Floats | None = None  # hidden states after the block, of all windows: see `calibrate`
        self._first = names.row_matrices(self.ffn)[0]
        self._mean_squares: dict[int, Floats] = {}  # by part: see _weight

    def chunks(self, n_tokens: int) -> Iterator[tuple[int, int]]:
        """Ranges of neurons, first and end, small enough for a few matrices [n_tokens, neurons]."""
        step = max(64, _CHUNK_BYTES // (4 * max(n_tokens, self.ffn.n_embd)))
        for first in range(0, self.ffn.n_ff, step):
            yield first, min(first + step, self.ffn.n_ff)

    def gate_rows(self, first: int, end: int) -> Floats:
        """Rows whose product with the FFN's input decides who fires: float32 [end - first, n_embd]."""
        return self._rows(self._first, first, end)

    @cached_property
    def gate_bias(self) -> Floats:
        """float32 [n_ff], zeros where the FFN has none."""
        return self._bias(self._first)

    @cached_property
    def down_norm2(self) -> Floats:
        """Squared norms of the down rows, float32 [n_ff]."""
        parts = [(self._rows(names.FFN_DOWN_T, *c) ** 2).sum(1) for c in self.chunks(1)]
        return np.concatenate(parts)

    def gate(self, part: TokenSamples, first: int, end: int) -> Floats:
        """Pre-activations of the neurons first .. end - 1: float32 [len(part), end - first]."""
        return part.x @ self.gate_rows(first, end).T + self.gate_bias[first:end]

    def responses(self, part: TokenSamples, first: int, end: int) -> Responses:
        """What the neurons first .. end - 1 do on the tokens of a part."""
        gate = self.gate(part, first, end)
        fired, h = self._strengths(part, gate, first, end)
        energy = h * h * self.down_norm2[first:end] * self._weight(part)[:, None]
        return Responses(gate, fired, energy)

    def _strengths(
        self, part: TokenSamples, gate: Floats, first: int, end: int
    ) -> tuple[npt.NDArray[np.bool_], Floats]:
        """Which of the neurons first ..

        end - 1 fire, and what each is multiplied with its down row by: [n_tokens, end - first] both.
        """
        ffn = self.ffn
        fired = gate > ffn.threshold
        h = np.where(fired, gate**2 if ffn.activation == "relu2" else gate, np.float32(0))
        if ffn.gated:
            up = part.x @ self._rows(names.FFN_UP, first, end).T + self._bias(names.FFN_UP)[first:end]
            h *= np.maximum(up, 0) if ffn.activation == "drelu" else up
        return fired, h

    def _weight(self, part: TokenSamples) -> Floats:
        """A part's `weight`, with what the block itself multiplies the FFN's product by: float32 [n_tokens]."""
        s = self.structure
        scaled = part.weight * np.float32(s.residual_scale**2)
        if not self.ffn.sub_norm:
            return scaled
        if id(part) not in self._mean_squares:
            chunks = self.chunks(len(part))
            squares = sum((self._strengths(part, self.gate(part, *c), *c)[1] ** 2).sum(1) for c in chunks)
            self._mean_squares[id(part)] = squares / np.float32(self.ffn.n_ff) + np.float32(s.norm_epsilon)
        return np.asarray(scaled / self._mean_squares[id(part)])

    @cached_property
    def frequency(self) -> Floats:
        """Share of all calibration tokens at which each neuron fires, float32 [n_ff]."""
        counts = np.zeros(self.ffn.n_ff, np.int64)
        parts = (self.fit, self.validation, self.test)
        for first, end in self.chunks(1):
            rows, least = self.gate_rows(first, end).T, self.ffn.threshold - self.gate_bias[first:end]
            for x in (part.x[at : at + _CACHED] for part in parts for at in range(0, len(part), _CACHED)):
                counts[first:end] += np.count_nonzero(x @ rows > least, axis=0)
        return (counts / sum(len(p) for p in parts)).astype(np.float32)

    def _rows(self, stem: str, first: int, end: int) -> Floats:
        return self._runner.rows(names.weight_of(self.i, stem), first, end)

    def _bias(self, stem: str) -> Floats:
        bias = self._runner.vector(names.bias_of(self.i, stem))
        return np.zeros(self.ffn.n_ff, np.float32) if bias is None else bias


def split(n_windows: int) -> tuple[slice, slice, slice]:
    """Which windows belong to the fit, validation and test parts; at least one each, where there are three."""
    judged = [max(1, round(share * n_windows)) for share in SHARES[1:]]
    at = n_windows - sum(judged)
    return slice(0, at), slice(at, at + judged[0]), slice(at + judged[0], n_windows)


def all_test(windows: npt.NDArray[np.int32]) -> tuple[slice, slice, slice]:
    """Parts for predictors that are there already: every window tests them."""
    return slice(0, 0), slice(0, 0), slice(0, len(windows))


def calibrate(
    runner: BlockRunner,
    windows: npt.NDArray[np.int32],
    parts: tuple[slice, slice, slice] | None = None,
    residual: bool = False,
    progress: Progress = silent,
    start: tuple[int, Floats | None] = (0, None),
) -> Iterator[LayerSamples]:
    """Run windows [n_windows, length] through the model and yield its layers in turn, those that have an FFN; each is
    valid until the next.

    start: the block to begin with, and an earlier run's `output` of the one before it, which is overwritten.

    parts: which windows fit, validate and test (default: 70, 15 and 15 %). residual: keep the stream before the FFN's
    norm as well.
    progress: told layers, with the share of the last one that is done.
    """
    n = runner.structure.block_count
    first, known = start
    hidden = np.stack([runner.embed(window) for window in windows]) if known is None else known
    inputs = np.empty_like(hidden)
    residuals = np.empty_like(hidden) if residual else None
    weight = np.empty(windows.shape, np.float32)
    for i in range(first, n):
        if i not in runner.structure.ffns:
            for k in range(len(windows)):
                hidden[k] = runner.output(i, hidden[k])
            continue
        for k in range(len(windows)):
            result = runner.block(i, hidden[k])
            hidden[k], inputs[k] = result.output, result.ffn_input
            weight[k] = 1 / np.maximum((result.output**2).sum(-1), np.finfo(np.float32).tiny)
            if residuals is not None:
                residuals[k] = result.residual
            progress(f"calibrating layer {i}", i + (k + 1) / len(windows) / 2, n)
        fit, validation, test = (_part(inputs, weight, residuals, at) for at in parts or split(len(windows)))
        layer = LayerSamples(runner, i, (fit, validation, test))
        layer.output = hidden
        yield layer
        progress(f"calibrating layer {i}", i + 1, n)


def _part(x: Floats, weight: Floats, residual: Floats | None, at: slice) -> TokenSamples:
    d = x.shape[-1]
    return TokenSamples(
        x[at].reshape(-1, d), weight[at].reshape(-1), None if residual is None else residual[at].reshape(-1, d)
    )
