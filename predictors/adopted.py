"""Predictors that a model file holds already, made elsewhere: measured on calibration text as fitted ones are, and
their neurons put in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from predictors import calibration_text
from predictors.calibrate import LayerSamples, all_test, calibrate
from predictors.evaluate import layer_figures
from predictors.fit import BlockFit, ModelFit, calibration_windows, fit_metadata, frequency, of_blocks
from predictors.hot_order import as_it_is, hottest_first
from predictors.margins import scale_of
from predictors.matrices import Floats
from predictors.predictor import Candidate
from predictors.stored_predictor import stored_predictor
from runtime.base.processors import default_threads
from runtime.base.progress import Progress, silent
from runtime.block_runner import BlockRunner
from runtime.model_file.reader import GgufFile
from runtime.model_file.structure import Structure

METHOD = "predictors made elsewhere, measured"


def adopt_model(
    path: Path,
    calibration: Path | None = None,
    tokens: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = silent,
    counts: Sequence[Floats] | None = None,
    reorder: bool = True,
) -> ModelFit:
    """Measure the predictors in the model file `path`, and order its neurons hottest first (or leave them as they are).

    The result's blocks hold no predictor tensors: the file's own are to be taken over, with their rows in the new
    order.
    Parameters and errors are those of `predictors.fit.fit_model`.
    """
    corpus = calibration_text.read_corpus(calibration)
    with GgufFile(path) as file:
        s = file.structure
        windows = calibration_windows(corpus, path, s, tokens, seed)
        with BlockRunner(file, threads or default_threads(), windows.shape[1]) as runner:
            layers = calibrate(runner, windows, all_test(windows), s.predictor_tap == "residual", progress)
            blocks = of_blocks(s, (_adopted(file, s, layer, counts, reorder) for layer in layers))
    calibrated = {"corpus": corpus.name, "sha256": corpus.sha256, "tokens": int(windows.size), "seed": seed}
    fit = ModelFit(s.predictor, "hot" if reorder else s.neuron_order, blocks, {}, s.predictor_tap)
    return replace(fit, metadata=fit_metadata(s, fit, calibrated | {"method": METHOD}))


def _adopted(
    file: GgufFile, s: Structure, layer: LayerSamples, counts: Sequence[Floats] | None, reorder: bool
) -> BlockFit:
    share = frequency(layer, counts)
    hot = hottest_first(share) if reorder else as_it_is(share)
    found = stored_predictor(file, layer.i)
    kind, error = (found[0].type, _error(found[0], layer)) if found else ("none", 0.0)
    figures = layer_figures(file, layer)
    return BlockFit(hot.order, hot.freq, s.rank(layer.i), kind, error, hot.tensors, figures)


def _error(candidate: Candidate, layer: LayerSamples) -> float:
    """What the block's scores are typically off by, as for fitted predictors: the median over its neurons."""
    prepared, threshold = candidate.prepare(layer.test.seen), np.float32(layer.ffn.threshold)
    errors = np.empty(layer.ffn.n_ff, np.float32)
    for first, end in layer.chunks(len(layer.test)):
        goal = layer.gate(layer.test, first, end) - threshold
        errors[first:end] = scale_of(goal, candidate.scores(prepared, first, end), candidate.unit_slope).error
    known = errors[np.isfinite(errors)]  # others have scores that say nothing
    return float(np.median(known)) if len(known) else 1.0
