"""What a file's predictors are worth on a text: layer by layer in numpy, and end to end as the runtime computes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from predictors import calibration_text
from predictors.calibrate import LayerSamples, all_test, calibrate
from predictors.choose_candidate import Cost, predicted_bytes
from predictors.fit import NO_FFN, Figures, cost_of
from predictors.stored_predictor import stored_predictor
from runtime.analysis.likelihood import LARGEST_EXPONENT, divergence, token_losses
from runtime.base.processors import default_threads
from runtime.base.progress import Progress, silent
from runtime.block_runner import BlockRunner
from runtime.compute.traffic import Activity, ffn_bytes
from runtime.errors import UserError
from runtime.model import Model, load
from runtime.model_file.reader import GgufFile
from runtime.options import BATCH
from runtime.text.tokenizer import Tokenizer

DEFAULT_TOKENS = 16384

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class ModeResult:
    """One FFN mode on the text.

    kl: nats per token from the reference mode; bytes: of FFN and predictor per token, relative to dense.
    """

    mode: str
    perplexity: float
    kl: float
    bytes: float


@dataclass(frozen=True)
class Evaluation:
    """layers: one per block; modes: the reference first. tokens: how many were looked at, in windows of `window`."""

    tokens: int
    window: int
    layers: tuple[Figures, ...]
    modes: tuple[ModeResult, ...]

    @property
    def reference(self) -> str:
        """The mode that the others are compared with."""
        return self.modes[0].mode


def evaluate(
    model: Path,
    file: Path,
    tokens: int | None = None,
    threads: int | None = None,
    predictor_bias: float = 0.0,
    progress: Progress = silent,
) -> Evaluation:
    """Judge the predictors of `model` on the UTF-8 text `file`.

    tokens: use only the first so many (16,384, or fewer where the text is shorter). The reference is `dense`, or
    `exact` where the file has no `dense` layout.
    Raises UserError for a text that is empty, too short or not UTF-8.
    """
    cores = threads or default_threads()
    windows = _windows(model, file, tokens)
    layers = tuple(_layers(model, windows, cores, predictor_bias, progress))
    modes = tuple(_modes(model, windows, cores, predictor_bias))
    return Evaluation(int(windows.size), windows.shape[1], layers, modes)


def _windows(model: Path, file: Path, tokens: int | None) -> Ids:
    corpus = calibration_text.read_corpus(file)
    with GgufFile(model) as gguf:
        context = gguf.structure.context_length
    with Tokenizer(model) as tokenizer:
        ids, bos = calibration_text.encode(corpus, tokenizer)
        length = calibration_text.window_length(min(len(ids), tokens or DEFAULT_TOKENS), context)
        n = min(len(ids) // (length - len(bos)), max(1, (tokens or DEFAULT_TOKENS) // length))
        if n == 0 or len(ids) < calibration_text.FEWEST_TOKENS:
            raise UserError(f"`{file}`: {len(ids)} tokens, expected at least {calibration_text.FEWEST_TOKENS}")
        return calibration_text.cut(ids, bos, length)[:n]


def _layers(model: Path, windows: Ids, threads: int, predictor_bias: float, progress: Progress) -> Iterator[Figures]:
    with GgufFile(model) as file:
        s = file.structure
        with BlockRunner(file, threads, windows.shape[1]) as runner:
            layers = calibrate(runner, windows, all_test(windows), s.predictor_tap == "residual", progress)
            figures = {layer.i: layer_figures(file, layer, predictor_bias) for layer in layers}
        yield from (figures.get(i, NO_FFN.figures) for i in range(s.block_count))


def layer_figures(file: GgufFile, layer: LayerSamples, predictor_bias: float = 0.0) -> Figures:
    """Figures of one layer's stored predictor on the test part."""
    cost, found = cost_of(file, layer.ffn, layer.i), stored_predictor(file, layer.i)
    n = cost.n_ff * len(layer.test)
    prepared = found[0].prepare(layer.test.seen) if found else layer.test.x
    fired = predicted = hits = 0
    energy = kept = 0.0
    for first, end in layer.chunks(len(layer.test)):
        responses, tokens = layer.responses(layer.test, first, end), layer.tokens(layer.test, first)
        chosen = np.ones_like(responses.fired)
        if found:
            candidate, bias = found
            shift = bias[first:end] + np.float32(_shift(layer, predictor_bias))
            chosen = candidate.scores(prepared[tokens], first, end) + shift > 0
        fired, predicted = fired + int(responses.fired.sum()), predicted + int(chosen.sum())
        hits += int((responses.fired & chosen).sum())
        energy += float(responses.energy.sum(dtype=np.float64))
        kept += float((responses.energy * chosen).sum(dtype=np.float64))
    shares = (fired / n, predicted / n, hits / n)
    nbytes = predicted_bytes(found[0], cost, *shares[1:]) if found else cost.exact(shares[0])
    return _figures(cost, shares, kept / max(energy, 1e-30), nbytes)


def _shift(layer: LayerSamples, predictor_bias: float) -> float:
    return predictor_bias * layer.structure.predictor_error[layer.i] if predictor_bias else 0.0


def _figures(cost: Cost, shares: tuple[float, float, float], kept: float, nbytes: float) -> Figures:
    fired, predicted, hits = shares
    return Figures(
        active_share=fired,
        predicted_share=predicted,
        recall=hits / fired if fired else 1.0,
        precision=hits / predicted if predicted else 1.0,
        energy_kept=kept,
        bytes_predicted=nbytes,
        bytes_exact=cost.exact(fired),
        bytes_dense=cost.dense,
    )


def _modes(path: Path, windows: Ids, threads: int, predictor_bias: float) -> Iterator[ModeResult]:
    with GgufFile(path) as file:
        s = file.structure
    names = ["dense"] if s.layout == "both" else []
    names += ["exact", "predicted"] if any(s.predictor_rank) else ["exact"]
    n_ctx = windows.shape[1]
    with ExitStack() as stack:
        models = [
            stack.enter_context(load(path, name, threads, n_ctx, n_batch=BATCH, predictor_bias=predictor_bias))
            for name in names
        ]
        losses, kls = [0.0 for _ in names], [0.0 for _ in names]
        for window in windows:
            logits = [model.logits(window.tolist()) for model in models]
            for k, found in enumerate(logits):
                losses[k] += float(token_losses(found[:-1], window[1:].tolist()).sum())
                kls[k] += divergence(logits[0][:-1], found[:-1])
        n = len(windows) * (n_ctx - 1)
        for name, model, loss, kl in zip(names, models, losses, kls, strict=True):
            yield ModeResult(name, math.exp(min(loss / n, LARGEST_EXPONENT)), kl / n, _bytes(model))


def _bytes(model: Model) -> float:
    """FFN and predictor bytes per token relative to dense, by what the model did since it was loaded."""
    s = model.structure
    did = Activity(model.ffn, model.layer_shares(), model.gate_shares())
    everything = Activity("exact", [1.0] * s.block_count, [1.0] * s.block_count)
    read, dense = (
        sum(ffn_bytes(ffn, model.tensors, activity, i) for i, ffn in s.ffns.items()) for activity in (did, everything)
    )
    return read / dense


def total_bytes(layers: Sequence[Figures]) -> dict[str, float]:
    """Bytes of FFN and predictor per token by the per-layer figures, relative to dense."""
    dense = sum(figures.bytes_dense for figures in layers)
    sums: dict[str, Any] = {
        mode: sum(getattr(f, f"bytes_{mode}") for f in layers) / dense for mode in ("exact", "predicted")
    }
    return sums
