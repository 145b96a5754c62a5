"""One fit from end to end: calibrate a model file, order its neurons, choose each layer's predictor.

`fit_model`'s signature is the command line.

Returns what is to be stored; writes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from predictors import calibration_text
from predictors.allocate import LayerOptions, allocate
from predictors.calibrate import LayerSamples, calibrate, default_tokens
from predictors.candidate_store import Shelved, shelve
from predictors.choose_candidate import Cost, Judged, judge, predicted_bytes
from predictors.finalists import finalists
from predictors.hot_order import BlockOrder, Order, as_frequencies, as_it_is, hottest_first, hottest_in_experts
from predictors.kept_layers import KeptLayers
from predictors.margins import EDGES, FEWEST_TOKENS, measure
from predictors.matrices import MATRIX_TYPES, Floats, Tensor, block_size, plain
from predictors.predictor import Candidate, FitOptions, Proposal
from predictors.registry import KINDS, METHODS
from runtime.base.phases import phase
from runtime.base.processors import default_threads
from runtime.base.progress import Progress, silent
from runtime.base.text_file import TextFile
from runtime.bindings.ffn_shape import FfnShape
from runtime.block_runner import BlockRunner
from runtime.compute.traffic import Activity, ffn_bytes
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile
from runtime.model_file.structure import ARCHITECTURE, Structure
from runtime.model_file.tensor_names import PREDICTOR_OUT, bias, of_experts
from runtime.text.tokenizer import Tokenizer

DEFAULT_ENERGY = 0.997  # 0.995 costs the bundled model 0.6 % of perplexity: see docs/predictors.md
TYPES = ("auto", *MATRIX_TYPES)
_BATCH_BYTES = 1 << 27  # of margins that are held at once
_LISTED = 8  # layers in a note


@dataclass(frozen=True)
class Figures:
    """What a layer's predictor achieves on calibration text that neither the fit nor the choice saw.

    Shares are of the neurons that a token may use; bytes per token, of FFN and predictor.
    """

    active_share: float
    predicted_share: float
    recall: float
    precision: float
    energy_kept: float
    bytes_predicted: float
    bytes_exact: float
    bytes_dense: float


@dataclass(frozen=True)
class BlockFit:
    """What a fit adds to one block.

    order: int32 [n_ff], stored position -> position in the file that was read. freq: float32 [n_ff], in the new order.
    rank: 0 for no predictor. tensors: in the new order, those of runtime.model_file.tensor_shapes.neuron_tensors.
    """

    order: Order
    freq: Floats
    rank: int
    type: str
    error: float
    tensors: tuple[Tensor, ...]
    figures: Figures


NO_FFN = BlockFit(
    np.zeros(0, np.int32), np.zeros(0, np.float32), 0, "none", 0.0, (), Figures(0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
)
"""Of a block without an FFN: it has no neurons, and misses none."""


@dataclass(frozen=True)
class ModelFit:
    """What a fit adds to a model, block by block. metadata: every key of predictors, calibration and neuron order.
    notes: what the model's user should know.
    """

    kind: str
    neuron_order: str
    blocks: tuple[BlockFit, ...]
    metadata: dict[str, Any]
    tap: str = "ffn_norm"
    notes: tuple[str, ...] = ()

    def structure_fields(self) -> dict[str, Any]:
        """The fields of runtime.model_file.structure.Structure that it sets."""
        none = self.kind == "none"
        return {
            "neuron_order": self.neuron_order,
            "predictor": self.kind,
            "predictor_tap": self.tap,
            "predictor_rank": () if none else tuple(b.rank for b in self.blocks),
            "predictor_error": () if none else tuple(b.error for b in self.blocks),
        }


@dataclass(frozen=True)
class _Layer:
    """What is remembered of a layer until all are calibrated. expert_frequency: see `LayerSamples`; few: experts that
    too few tokens chose to judge a predictor by.
    """

    i: int
    ffn: FfnShape
    frequency: Floats
    options: LayerOptions
    expert_frequency: Floats | None = None
    few: int = 0


@dataclass(frozen=True)
class Candidates:
    """What was fitted to the layers of a model; what is left is to choose. calibration: the keys `calibration.*`."""

    structure: Structure
    kind: str
    layers: tuple[_Layer, ...]
    calibration: dict[str, Any]

    def at(self, energy: float, reorder: bool = True) -> ModelFit:
        """The predictors that keep a share `energy` of the output energy; reorder: as in `fit_model`."""
        chosen = allocate([layer.options for layer in self.layers], energy)
        order = "hot" if reorder else self.structure.neuron_order
        fits = (_block(layer, choice, reorder) for layer, choice in zip(self.layers, chosen, strict=True))
        fit = ModelFit(self.kind, order, of_blocks(self.structure, fits), {})
        keys = fit_metadata(self.structure, fit, self.calibration)
        if self.kind != "none":
            keys[f"{ARCHITECTURE}.predictor.energy"] = float(energy)
        return replace(fit, metadata=keys, notes=tuple(_expert_notes(self.layers, fit)))


def fit_model(
    path: Path,
    kind: str = "lowrank",
    energy: float = DEFAULT_ENERGY,
    calibration: Path | None = None,
    tokens: int | None = None,
    predictor_type: str = "auto",
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = silent,
    reorder: bool = True,
    counts: Sequence[Floats] | None = None,
    kept: KeptLayers | None = None,
) -> ModelFit:
    """Fit predictors to the converted model `path`.

    energy: share of the FFNs' output energy that the chosen neurons have to carry, 1 for no predictor at all.
    calibration: a UTF-8 text, None for the one in the package; tokens: how many of its tokens (default: 24,576, fewer
    for very wide models).
    predictor_type: ggml type of the matrices, "auto" for the cheaper of q4_0 and q8_0 in each layer.
    reorder: put neurons hottest first; else they stay as they are. counts: of each block's neurons, [n_ff]: what to
    order them by, in place of the text.
    kept: where finished layers wait for the others, and for another run if this one is killed.
    progress: told layers, with the share of the last one that is done.
    Raises UserError for options out of range, and for calibration text that is too short, empty or not UTF-8.
    """
    if not 0 < energy <= 1:
        raise UserError(f"energy {energy}, expected more than 0 and at most 1")
    fitted = fit_candidates(path, kind, calibration, tokens, predictor_type, seed, threads, progress, counts, kept)
    return fitted.at(energy, reorder)


def fit_candidates(
    path: Path,
    kind: str = "lowrank",
    calibration: Path | None = None,
    tokens: int | None = None,
    predictor_type: str = "auto",
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = silent,
    counts: Sequence[Floats] | None = None,
    kept: KeptLayers | None = None,
) -> Candidates:
    """All of `fit_model` but the choice: parameters and errors are the same."""
    if kind not in KINDS:
        raise UserError(f"predictor kind `{kind}`, expected one of {', '.join(KINDS)}")
    if predictor_type not in TYPES:
        raise UserError(f"predictor type `{predictor_type}`, expected one of {', '.join(TYPES)}")
    corpus = calibration_text.read_corpus(calibration)
    with GgufFile(path) as file:
        s = file.structure
        if kind == "mlp" and any(ffn.experts for ffn in s.ffns.values()):
            raise UserError(f"`{path}`: predictor kind `mlp` for a mixture of experts, expected lowrank or signbit")
        windows = calibration_windows(corpus, path, s, tokens, seed)
        cores = threads or default_threads()
        options = FitOptions(_types(predictor_type, s), seed, cores)
        with BlockRunner(file, cores, windows.shape[1]) as runner:
            what = [kind, options.types, seed, cores, corpus.sha256, windows.shape, _digest(counts)]
            layers, first, hidden = kept.load(path, {"fit": what}) if kept else ([], 0, None)
            for layer in calibrate(runner, windows, progress=progress, start=(first, hidden)):
                layers.append(_fit_layer(layer, file, kind, options, counts))
                if kept and layer.output is not None:
                    with phase("keeping"):
                        kept.keep(layer.i, [done.i for done in layers], _in_memory(layers[-1]), layer.output)
    calibrated = {"corpus": corpus.name, "sha256": corpus.sha256, "tokens": int(windows.size), "seed": seed}
    return Candidates(s, kind, tuple(layers), calibrated | {"method": METHODS[kind]})


def _expert_notes(layers: Sequence[_Layer], fit: ModelFit) -> Iterator[str]:
    """Which experts the text says too little of."""
    known = {layer.i: layer.expert_frequency for layer in layers if layer.expert_frequency is not None}
    total = sum(map(len, known.values()))
    unseen = {i: int(np.count_nonzero(chosen == 0)) for i, chosen in known.items()}
    if any(unseen.values()):
        where = _in_layers(unseen, total)
        yield f"{where} were chosen by no token of the calibration text: their neurons stay as they are"
    few = {layer.i: layer.few for layer in layers if fit.blocks[layer.i].rank}
    if any(few.values()):
        yield (
            f"{_in_layers(few, total)} were chosen by fewer than {FEWEST_TOKENS} of the tokens that judge predictors: "
            "they are computed exactly"
        )


def _in_layers(counts: Mapping[int, int], total: int) -> str:
    where = [f"{n} in layer {i}" for i, n in counts.items() if n]
    more = f" and {len(where) - _LISTED} more layers" if len(where) > _LISTED else ""
    return f"{sum(counts.values())} of {total:,} experts ({', '.join(where[:_LISTED])}{more})"


def _digest(counts: Sequence[Floats] | None) -> str:
    digest = hashlib.sha256()
    for each in counts or ():
        digest.update(np.ascontiguousarray(each).tobytes())
    return digest.hexdigest()


def _in_memory(layer: _Layer) -> _Layer:
    """A layer whose candidates' tensors are no longer in a temporary file: what can be kept elsewhere."""
    candidates = [
        replace(judged, candidate=replace(judged.candidate, tensors=tuple(map(_copied, judged.candidate.tensors))))
        for judged in layer.options.candidates
        if isinstance(judged.candidate, Shelved)
    ]
    return replace(layer, options=replace(layer.options, candidates=candidates))


def _copied(tensor: Tensor) -> Tensor:
    return replace(tensor, data=np.array(tensor.data))


def calibration_windows(
    corpus: TextFile, path: Path, s: Structure, tokens: int | None, seed: int
) -> calibration_text.Ids:
    """What a model is calibrated on, int32 [n_windows, length]; tokens: None for the usual number."""
    with Tokenizer(path) as tokenizer:
        n = default_tokens(s) if tokens is None else tokens
        return calibration_text.windows(corpus, tokenizer, n, s.context_length, seed)


def _types(predictor_type: str, s: Structure) -> tuple[str, ...]:
    wanted = ("q4_0", "q8_0") if predictor_type == "auto" else (predictor_type,)
    return tuple(t for t in wanted if all(f.n_embd % block_size(t) == 0 for f in s.ffns.values())) or ("f16",)


def _fit_layer(
    layer: LayerSamples, file: GgufFile, kind: str, options: FitOptions, counts: Sequence[Floats] | None
) -> _Layer:
    cost = cost_of(file, layer.ffn, layer.i)
    known = LayerOptions([], cost, layer.active_share)
    for batch in _batches(finalists(layer, list(KINDS[kind](layer, options)), cost), layer.ffn.n_ff):
        with phase("margins"):
            measured = measure(layer, batch)
        with phase("judging"):
            new = [judge(c, m, cost) for c, m in zip(batch, measured, strict=True)]
        known = replace(known, candidates=[*known.candidates, *new]).worth_keeping()
    shelved = replace(known, candidates=shelve(known.candidates))
    routed = layer.validation.routed
    few = int((routed.chosen < FEWEST_TOKENS).sum()) if routed else 0
    return _Layer(layer.i, layer.ffn, frequency(layer, counts), shelved, layer.expert_frequency, few)


def frequency(layer: LayerSamples, counts: Sequence[Floats] | None) -> Floats:
    """`LayerSamples.frequency`, float32 [n_ff]: as counted on the text, or as counts made elsewhere say, with the
    text's mean.
    """
    if counts is None:
        return layer.frequency
    return as_frequencies(counts[layer.i], float(layer.frequency.mean()))


def cost_of(file: GgufFile, ffn: FfnShape, i: int) -> Cost:
    """Bytes of the neurons of block `i`, whose FFN is `ffn`."""
    nothing, gates, rest = (
        ffn_bytes(ffn, file.tensors, Activity.uniform("exact", i + 1, fired, gate), i)
        for fired, gate in ((0, 0), (0, 1), (1, 0))
    )
    n = ffn.n_reached
    return Cost((gates - nothing) / n, (rest - nothing) / n, n, nothing, n / ffn.n_ff)


def _batches(proposals: Sequence[Proposal], n_ff: int) -> Iterator[list[Candidate]]:
    """Candidates in groups whose margins fit in memory together."""
    size = max(1, _BATCH_BYTES // (6 * 4 * n_ff * len(EDGES)))
    for at in range(0, len(proposals), size):
        with phase("candidates"):
            batch = [proposal.make(None) for proposal in proposals[at : at + size]]
        yield batch


def _block(layer: _Layer, choice: tuple[Judged, int] | None, reorder: bool) -> BlockFit:
    hot = _ordered(layer) if reorder else as_it_is(layer.frequency)
    if choice is None:
        return BlockFit(hot.order, hot.freq, 0, "none", 0.0, hot.tensors, _exact_figures(layer))
    judged, price = choice
    *shared, rows = judged.candidate.tensors
    thresholds = plain(bias(PREDICTOR_OUT), "f32", judged.bias(price)[hot.order])
    return BlockFit(
        order=hot.order,
        freq=hot.freq,
        rank=judged.candidate.rank,
        type=judged.candidate.type,
        error=float(np.median(judged.scale.error[judged.scale.known])),
        tensors=(*hot.tensors, *shared, *(_divided(t, layer.ffn) for t in (rows.reordered(hot.order), thresholds))),
        figures=_figures(layer.options.cost, judged, price),
    )


def _ordered(layer: _Layer) -> BlockOrder:
    if layer.expert_frequency is None:
        return hottest_first(layer.frequency)
    return hottest_in_experts(layer.frequency, layer.expert_frequency)


def _divided(tensor: Tensor, ffn: FfnShape) -> Tensor:
    """A tensor over neurons as the file has it: where there are experts, with one more dimension."""
    if not ffn.experts:
        return tensor
    shape = (*tensor.shape[:-1], ffn.expert_length, ffn.experts.count)
    return replace(tensor, name=of_experts(tensor.name), shape=shape)


def _figures(cost: Cost, judged: Judged, price: int) -> Figures:
    curve = judged.test
    predicted, hits = float(curve.predicted[price]), float(curve.hits[price])
    return Figures(
        active_share=curve.fired,
        predicted_share=predicted,
        recall=hits / max(curve.fired, 1e-12),
        precision=hits / max(predicted, 1e-12),
        energy_kept=float(curve.energy[price]) / max(curve.total, 1e-30),
        bytes_predicted=predicted_bytes(judged.candidate, cost, predicted, hits),
        bytes_exact=cost.exact(curve.fired),
        bytes_dense=cost.dense,
    )


def _exact_figures(layer: _Layer) -> Figures:
    cost, known = layer.options.cost, layer.options.candidates
    fired = known[0].test.fired if known else layer.options.fired
    return Figures(fired, 1.0, 1.0, fired, 1.0, cost.exact(fired), cost.exact(fired), cost.dense)


def of_blocks(s: Structure, fits: Iterable[BlockFit]) -> tuple[BlockFit, ...]:
    """Fits of the blocks that have an FFN, in their order, with `NO_FFN` for the others."""
    found = iter(fits)
    return tuple(next(found) if i in s.ffns else NO_FFN for i in range(s.block_count))


def fit_metadata(s: Structure, fit: ModelFit, calibration: dict[str, Any]) -> dict[str, Any]:
    """The keys of a fit: predictors, what they achieve, the neurons' order, and the keys `calibration.*`."""
    described = replace(s, **fit.structure_fields()).to_metadata()
    kept = ("predictor.", "neuron_order")
    keys = {k: v for k, v in described.items() if k.removeprefix(f"{ARCHITECTURE}.").startswith(kept)}
    keys |= {f"{ARCHITECTURE}.calibration.{name}": value for name, value in calibration.items()}
    if fit.kind == "none":
        return keys
    figures = ("recall", "precision", "predicted_share", "active_share", "energy_kept")
    measured: dict[str, Any] = {name: [float(getattr(b.figures, name)) for b in fit.blocks] for name in figures}
    measured["type"] = [b.type for b in fit.blocks]
    return keys | {f"{ARCHITECTURE}.predictor.{name}": value for name, value in measured.items()}
