"""What a model's neurons do on calibration text, layer by layer: the inputs of each FFN, which neurons fire, and how
much each contributes.

All hidden states are kept between layers, weights and pre-activations only a chunk of neurons at a time: memory does
not grow with the number of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from predictors.routed import Counts, Places, Routed
from runtime.base.phases import phase
from runtime.base.progress import Progress, silent
from runtime.bindings.ffn_shape import FfnShape
from runtime.block_runner import BlockResult, BlockRunner
from runtime.model_file import tensor_names as names
from runtime.model_file.structure import Structure

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Tokens = slice | Places  # some tokens of a part: what picks their rows
Number = TypeVar("Number", np.float32, np.float16)

DEFAULT_TOKENS = 24576
SHARES = (0.78, 0.165, 0.055)  # of the windows: to fit predictors, to choose among them, to say what they achieve
_MOST_BYTES = 1 << 29  # of hidden states and FFN inputs
_MOST_KEPT = 5 << 26  # bytes of what neurons say of the tokens that judge; more is computed again when it is wanted
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
    gate, up: what the rows say of each neuron, biases included, float16 [n_tokens, n_ff]; where there are experts,
    [places of `routed`, expert_length]. None where it was not kept.
    routed: the tokens' experts, where there are any.
    """

    x: Floats
    weight: Floats
    residual: Floats | None = None
    gate: Halves | None = None
    up: Halves | None = None
    routed: Routed | None = None

    @property
    def seen(self) -> Floats:
        """What a predictor sees: the residual stream where it was asked for, else the FFN's own input."""
        return self.x if self.residual is None else self.residual

    def __len__(self) -> int:
        return len(self.x)


class LayerSamples:
    """One layer on the calibration text, in three parts that share no window.

    Neurons are numbered through all experts. What is asked of some is asked of neurons of one expert, and answered for
    the tokens that chose it: `tokens` says which.
    """

    def __init__(self, runner: BlockRunner, i: int, parts: tuple[TokenSamples, TokenSamples, TokenSamples]) -> None:
        self.structure, self.ffn, self.i, self._runner = runner.structure, runner.structure.ffns[i], i, runner
        self.fit, self.validation, self.test = parts
        self.output: Floats | None = None  # hidden states after the block, of all windows: see `calibrate`
        self.shared_fired: Counts | None = None  # the same of a shared expert's neurons
        self.fired: Counts | None = None  # at how many tokens each neuron fires, [n_ff], where the runner has said so
        self._stems = names.stems(self.ffn)
        self._first = names.row_matrices(self.ffn)[0]
        self._mean_squares: dict[int, Floats] = {}  # by part: see _weight

    def chunks(self, n_tokens: int) -> Iterator[tuple[int, int]]:
        """Ranges of neurons, first and end, small enough for a few matrices [n_tokens, neurons]; each of one expert."""
        step = max(64, _CHUNK_BYTES // (4 * max(n_tokens, self.ffn.n_embd)))
        length = self.ffn.expert_length
        for start in range(0, self.ffn.n_ff, length):
            for first in range(start, start + length, step):
                yield first, min(first + step, start + length)

    def tokens(self, part: TokenSamples, first: int) -> Tokens:
        """The tokens of a part that neuron `first` sees: those that chose its expert, or all."""
        return part.routed.tokens(self._expert(first)) if part.routed else slice(None)

    def _expert(self, neuron: int) -> int:
        return neuron // self.ffn.expert_length

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
        parts = [(self._rows(self._stems.down_t, *c) ** 2).sum(1) for c in self.chunks(1)]
        return np.concatenate(parts)

    def gate(self, part: TokenSamples, first: int, end: int) -> Floats:
        """Pre-activations of the neurons first .. end - 1 at their tokens: float32 [n_tokens, end - first]."""
        known = part.gate if self.ffn.gated else part.up
        if known is not None:
            return self._kept(known, part, first, end).astype(np.float32)
        return part.x[self.tokens(part, first)] @ self.gate_rows(first, end).T + self.gate_bias[first:end]

    def _kept(self, values: Halves, part: TokenSamples, first: int, end: int) -> Halves:
        """The columns of some neurons, at their tokens."""
        if not part.routed:
            return values[:, first:end]
        expert = self._expert(first)
        start = expert * self.ffn.expert_length
        return values[part.routed.places(expert), first - start : end - start]

    def responses(self, part: TokenSamples, first: int, end: int) -> Responses:
        """What the neurons first .. end - 1 do on their tokens of a part."""
        gate = self.gate(part, first, end)
        fired, h = self._strengths(part, gate, first, end)
        energy = h * h * self.down_norm2[first:end] * self._weight(part, first)[:, None]
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
            up = self._up(part, first, end)
            h *= np.maximum(up, 0) if ffn.activation == "drelu" else up
        return fired, h

    def _up(self, part: TokenSamples, first: int, end: int) -> Floats | Halves:
        if part.up is not None:
            return self._kept(part.up, part, first, end)
        rows = self._rows(self._stems.up, first, end)
        return part.x[self.tokens(part, first)] @ rows.T + self._bias(self._stems.up)[first:end]

    def _weight(self, part: TokenSamples, first: int) -> Floats:
        """`weight` of the tokens that neuron `first` sees, with what the router and the block multiply by: float32
        [n_tokens].
        """
        s = self.structure
        scaled = part.weight[self.tokens(part, first)] * np.float32(s.residual_scale**2)
        if part.routed:
            scaled = scaled * part.routed.weights(self._expert(first)) ** 2
        if not self.ffn.sub_norm:
            return scaled
        if id(part) not in self._mean_squares:
            chunks = self.chunks(len(part))
            squares = sum((self._strengths(part, self.gate(part, *c), *c)[1] ** 2).sum(1) for c in chunks)
            self._mean_squares[id(part)] = squares / np.float32(self.ffn.n_ff) + np.float32(s.norm_epsilon)
        return np.asarray(scaled / self._mean_squares[id(part)])

    @cached_property
    def frequency(self) -> Floats:
        """Share of all calibration tokens at which each neuron fires, where there are experts of those that chose its
        expert: float32 [n_ff].
        """
        with phase("frequencies"):
            return self._frequency()

    def _frequency(self) -> Floats:
        counts = self._counted(self._parts) if self.fired is None else self.fired
        seen = self._n_tokens if self.chosen is None else np.repeat(self.chosen, self.ffn.expert_length)
        return (counts / np.maximum(seen, 1)).astype(np.float32)

    @property
    def _parts(self) -> tuple[TokenSamples, TokenSamples, TokenSamples]:
        return self.fit, self.validation, self.test

    @property
    def _n_tokens(self) -> int:
        return sum(len(part) for part in self._parts)

    @cached_property
    def chosen(self) -> Counts | None:
        """How many of all calibration tokens chose each expert, int64 [count]; None without experts."""
        found = [part.routed.chosen for part in self._parts if part.routed]
        return np.sum(found, axis=0) if found else None

    @property
    def expert_frequency(self) -> Floats | None:
        """Share of all calibration tokens that chose each expert, float32 [count]; None without experts."""
        return None if self.chosen is None else (self.chosen / self._n_tokens).astype(np.float32)

    @property
    def active_share(self) -> float:
        """Of the neurons that a token may use, the share that fires, on average."""
        if self.chosen is None:
            return float(self.frequency.mean())
        fired = self.frequency.reshape(len(self.chosen), -1).mean(1, dtype=np.float64)
        return float(fired @ self.chosen) / max(int(self.chosen.sum()), 1)

    def _counted(self, parts: Sequence[TokenSamples]) -> Counts:
        counts = np.zeros(self.ffn.n_ff, np.int64)
        for first, end in self.chunks(1):
            rows, least = self.gate_rows(first, end).T, self.ffn.threshold - self.gate_bias[first:end]
            for seen in (part.x[self.tokens(part, first)] for part in parts):
                for x in (seen[at : at + _CACHED] for at in range(0, len(seen), _CACHED)):
                    counts[first:end] += np.count_nonzero(x @ rows > least, axis=0)
        return counts

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

    parts: which windows fit, validate and test (default: as SHARES says). residual: keep the stream before the FFN's
    norm as well.
    progress: told layers, with the share of the last one that is done.
    """
    n = runner.structure.block_count
    first, known = start
    hidden = np.stack([runner.embed(window) for window in windows]) if known is None else known
    at = parts or split(len(windows))
    seen = _Seen(hidden.shape, residual, judged=None if parts else slice(at[1].start, at[2].stop))
    for i in range(first, n):
        if i not in runner.structure.ffns:
            for k in range(len(windows)):
                hidden[k] = runner.output(i, hidden[k])
            continue
        seen.begin(runner.structure.ffns[i])
        for k in range(len(windows)):
            result = runner.block(i, hidden[k])
            hidden[k] = result.output
            seen.add(k, result)
            progress(f"calibrating layer {i}", i + (k + 1) / len(windows) / 2, n)
        fit, validation, test = map(seen.part, at)
        layer = LayerSamples(runner, i, (fit, validation, test))
        layer.output, layer.fired, layer.shared_fired = hidden, seen.fired, seen.shared_fired
        yield layer
        progress(f"calibrating layer {i}", i + 1, n)


class _Seen:
    """What calibration keeps of one block, in memory that serves the next one too, where that is as wide.

    shape: n_windows, length, n_embd. judged: the windows of which the neurons' pre-activations are kept, None for none.
    """

    def __init__(self, shape: tuple[int, ...], residual: bool, judged: slice | None) -> None:
        self._inputs = np.empty(shape, np.float32)  # latent experts see another width
        self._residuals = np.empty(shape, np.float32) if residual else None
        self._weight = np.empty(shape[:2], np.float32)
        self._judged = judged
        self._neurons: dict[str, Halves] = {}  # by role: gate, up [n_judged, *shape in a BlockResult]
        self._known: set[str] = set()  # the roles that this block has filled
        self._routed: list[Routed] = []  # by window
        self.fired: Counts | None = None
        self.shared_fired: Counts | None = None

    def begin(self, ffn: FfnShape) -> None:
        """Begin with another block."""
        self._ffn, self._routed, self._known = ffn, [], set()
        self.shared_fired = None
        self.fired = np.zeros(ffn.n_ff, np.int64)
        if self._inputs.shape[-1] != ffn.n_embd:
            self._inputs = np.empty((*self._inputs.shape[:2], ffn.n_embd), np.float32)

    def add(self, k: int, result: BlockResult) -> None:
        """Keep window `k`."""
        self._inputs[k] = result.ffn_input
        self._weight[k] = 1 / np.maximum((result.output**2).sum(-1), np.finfo(np.float32).tiny)
        if self._residuals is not None:
            self._residuals[k] = result.residual
        if result.experts is not None and result.expert_weights is not None and self._ffn.experts:
            self._routed.append(Routed(result.experts, result.expert_weights, self._ffn.experts.count))
        if result.shared is not None:
            fired = (result.shared > self._ffn.threshold).sum(0, dtype=np.int64)
            self.shared_fired = fired if self.shared_fired is None else self.shared_fired + fired
        deciding = result.gate if self._ffn.gated else result.up
        if deciding is None:  # a run that computes some neurons only
            self.fired = None
            return
        self._count(deciding > self._ffn.threshold)
        if self._judged and self._judged.start <= k < self._judged.stop:
            kept = {role: values for role, values in (("gate", result.gate), ("up", result.up)) if values is not None}
            n_judged = self._judged.stop - self._judged.start
            if n_judged * sum(2 * values.size for values in kept.values()) <= _MOST_KEPT:
                for role, values in kept.items():
                    self._kept(role, (n_judged, *values.shape))[k - self._judged.start] = _halves(values)

    def _count(self, fired: npt.NDArray[np.bool_]) -> None:
        """Count what fired in the last window."""
        assert self.fired is not None
        if not self._routed:
            self.fired += fired.sum(0, dtype=np.int32)
            return
        by_expert = self.fired.reshape(-1, self._ffn.expert_length)
        for expert in np.flatnonzero(self._routed[-1].chosen).tolist():
            by_expert[expert] += fired[self._routed[-1].places(expert)].sum(0, dtype=np.int32)

    def _kept(self, role: str, shape: tuple[int, ...]) -> Halves:
        if role not in self._neurons or self._neurons[role].shape != shape:
            self._neurons[role] = np.empty(shape, np.float16)
        self._known.add(role)
        return self._neurons[role]

    def part(self, at: slice) -> TokenSamples:
        """The tokens of some windows."""
        residual = None if self._residuals is None else _tokens(self._residuals[at])
        gate, up = (self._of_neurons(role, at) for role in ("gate", "up"))
        return TokenSamples(
            _tokens(self._inputs[at]), self._weight[at].reshape(-1), residual, gate, up, self._choices(at)
        )

    def _choices(self, at: slice) -> Routed | None:
        e = self._ffn.experts
        if not e:
            return None
        ids, shares = np.zeros((0, e.used), np.int32), np.zeros((0, e.used), np.float32)
        some = self._routed[at]
        return Routed(
            np.concatenate([ids, *(each.ids for each in some)]),
            np.concatenate([shares, *(each.shares for each in some)]),
            e.count,
        )

    def _of_neurons(self, role: str, at: slice) -> Halves | None:
        if self.fired is None or role not in self._known or not self._judged or at.start < self._judged.start:
            return None
        return _tokens(self._neurons[role][at.start - self._judged.start : at.stop - self._judged.start])


def _tokens(windows: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """[n_windows, length, n] -> [n_tokens, n]."""
    return windows.reshape(-1, windows.shape[-1])


def _halves(values: Floats) -> Halves:
    """In float16; numbers that it does not have become the largest that it has."""
    largest = np.finfo(np.float16).max
    return np.clip(values, -largest, largest).astype(np.float16)
