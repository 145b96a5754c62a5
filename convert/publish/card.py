"""The model card of a converted file, with its figures and its plot: what it shows is collected and measured here.

The text is `convert.publish.card_text`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from convert.publish.card_text import PLOT, CardFacts, FileEntry, TextPerplexity, write_card
from runtime.analysis.drawing import draw_curves, drawn, new_figure
from runtime.analysis.firing import Frequencies, layer_firing, predictor_figures, read_frequencies
from runtime.analysis.perplexity import measure_perplexity
from runtime.base.atomic import check_target, folder_made, replacing
from runtime.base.text_file import read_text
from runtime.hub.download import sha256_of
from runtime.model import load
from runtime.model_file.reader import GgufFile

CARD = "README.md"


@dataclass(frozen=True)
class CardOptions:
    """What may be asked of a card.

    perplexity: a UTF-8 text to measure it on, or its first `perplexity_tokens`; plot: whether to draw.
    """

    perplexity: Path | None = None
    perplexity_tokens: int | None = None
    threads: int | None = None
    plot: bool = True


@dataclass(frozen=True)
class Findings:
    """What a card shows of a model, besides what its keys say.

    plot: a PNG, None where there is nothing to draw or none was wanted.
    """

    frequencies: Sequence[Frequencies]
    perplexity: TextPerplexity | None
    plot: bytes | None


@dataclass(frozen=True)
class WrittenCard:
    """A card, and where it and its plot were written, if anywhere."""

    text: str
    path: Path | None
    plot: Path | None
    perplexity: TextPerplexity | None


def write_model_card(file: Path, path: Path | None, repo: str | None, force: bool, options: CardOptions) -> WrittenCard:
    """Make the card of a converted file, and write it to `path` with its plot beside, or nowhere.

    repo: where the file will be, for the commands on the card. Raises UserError as `examine` does, and for files that
    exist, unless forced.
    """
    plot = path.with_name(PLOT) if path and options.plot else None
    with GgufFile(file) as opened, folder_made(path.parent) if path else nullcontext():
        for target in filter(None, (path, plot)):
            check_target(target, 0, force, CARD, [part.path for part in opened.parts])
        entries = [FileEntry(part.path.name, part.size, sha256_of(part.path)) for part in opened.parts]
        found = examine(opened, options)
        text = make_card(opened, repo or file.name, entries, found)
        plot = plot if found.plot else None
        if path:
            _put(path, text, plot, found.plot or b"")
    return WrittenCard(text, path, plot, found.perplexity)


def _put(path: Path, text: str, plot: Path | None, drawing: bytes) -> None:
    with replacing(path) as card_file, replacing(plot) if plot else nullcontext() as plot_file:
        card_file.write_text(text, encoding="utf-8")
        if plot_file:
            plot_file.write_bytes(drawing)


def examine(file: GgufFile, options: CardOptions) -> Findings:
    """Read, draw and measure what a card shows of an open model.

    Raises UserError where a plot is wanted and matplotlib is missing, and for a text that cannot be measured.
    """
    frequencies = read_frequencies(file) if file.structure.neuron_order == "hot" else []
    plot = _plot(file, frequencies) if options.plot and frequencies else None
    return Findings(frequencies, _perplexity(file, options) if options.perplexity else None, plot)


def make_card(file: GgufFile, name: str, files: Sequence[FileEntry], found: Findings) -> str:
    """The card of an open model. name: how the commands on it shall call it; files: those to be listed."""
    drawn = found.plot is not None
    return str(write_card(CardFacts.of(file, name, files, found.frequencies, perplexity=found.perplexity, plot=drawn)))


def _perplexity(file: GgufFile, options: CardOptions) -> TextPerplexity:
    assert options.perplexity
    s, modes, text = file.structure, {}, read_text(options.perplexity)
    names = [*(["dense"] if s.layout == "both" else []), "exact", *(["predicted"] if any(s.predictor_rank) else [])]
    for mode in names:
        with load(file.path, mode, options.threads) as model:
            modes[mode] = measure_perplexity(model, text, tokens=options.perplexity_tokens)
    return TextPerplexity(text.name, text.sha256, options.perplexity_tokens, modes)


def _plot(file: GgufFile, frequencies: Sequence[Frequencies]) -> bytes:
    """Two drawings side by side: active and predicted neurons by layer, and the hot/cold curves."""
    figure = new_figure(11, 4)
    bars, curves = figure.subplots(1, 2)
    n = len(frequencies)
    ffns = [block.ffn for block in file.structure.blocks]
    active = [layer_firing(freq, ffn).active for freq, ffn in zip(frequencies, ffns, strict=True)]
    bars.bar(range(n), active, label="active")
    predictors = predictor_figures(file.metadata, n) or ()
    shown = [(i, found.predicted_share) for i, found in enumerate(predictors) if file.structure.rank(i)]
    if shown:
        bars.plot(*zip(*shown, strict=True), "o", color="black", markersize=4, label="predicted")
    bars.set(title="Active neurons, by layer", xlabel="layer", ylabel="share of the neurons")
    bars.legend()
    draw_curves(curves, frequencies)
    curves.set_title("Hot and cold neurons")
    return drawn(figure, "png", 120)
