"""`python -m convert card`: the model card of a converted file, with its figures and its plot.

Collects and measures; the text is `convert.publish.card_text`'s.
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.publish.card_text import PLOT, Facts, FileEntry, Perplexity, write_card
from runtime.base.atomic import check_target, folder_made, new_path, replacing
from runtime.base.text_file import read_text
from runtime.cli.options import add_json, count, note, print_json
from runtime.commands.perplexity import measure
from runtime.commands.sparsity import (
    Frequencies,
    draw_curves,
    layer_facts,
    new_figure,
    predictor_facts,
    read_frequencies,
)
from runtime.hub.download import sha256_of
from runtime.model import load
from runtime.model_file.reader import GgufFile

_CARD = "README.md"


@dataclass(frozen=True)
class Options:
    """What may be asked of a card. perplexity: a UTF-8 text to measure it on, or its first `perplexity_tokens`; plot: whether to draw."""

    perplexity: Path | None = None
    perplexity_tokens: int | None = None
    threads: int | None = None
    plot: bool = True


@dataclass(frozen=True)
class Findings:
    """What a card shows of a model, besides what its keys say. plot: a PNG, None where there is nothing to draw or none was wanted."""

    frequencies: Sequence[Frequencies]
    perplexity: Perplexity | None
    plot: bytes | None


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Options of `card`."""
    parser.add_argument("file", metavar="OUT.gguf", type=Path, help="a file made by `python -m convert`")
    parser.add_argument(
        "-o",
        "--out",
        type=_out,
        metavar="PATH",
        help=f"a folder, or README.md in one; {PLOT} is put beside (default: stdout, no plot)",
    )
    parser.add_argument(
        "--repo", metavar="USER/REPO", help="where it will be, for the commands on the card (default: a file)"
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    add_json(parser)
    add_card_options(parser)


def add_card_options(parser: argparse.ArgumentParser) -> None:
    """What `card` and `push` share: the fields of `Options`."""
    group = parser.add_argument_group("the model card")
    group.add_argument(
        "--perplexity", type=Path, metavar="TEXT", help="measure it on this text, in every FFN mode (default: left out)"
    )
    group.add_argument("--perplexity-tokens", type=count, metavar="N", help="use only the first N tokens of the text")
    group.add_argument("--threads", "-t", type=count, metavar="N", help="default: one per physical core")
    group.add_argument("--no-plot", dest="plot", action="store_false", help="no drawing (it needs matplotlib)")


def card(
    file: Path,
    out: Path | None = None,
    repo: str | None = None,
    force: bool = False,
    as_json: bool = False,
    **options: Any,
) -> None:
    """Write the model card of a converted file, as `push` would."""
    folder_target = out is not None and (out.is_dir() or not out.suffix)
    path = out / _CARD if out and folder_target else out
    wanted = Options(**options | ({} if path else {"plot": False}))
    plot = path.with_name(PLOT) if path and wanted.plot else None
    with GgufFile(file) as opened, folder_made(path.parent) if path else nullcontext():
        for target in filter(None, (path, plot)):
            check_target(target, 0, force, _CARD, [part.path for part in opened.parts])
        entries = [FileEntry(part.path.name, part.size, sha256_of(part.path)) for part in opened.parts]
        found = examine(opened, wanted)
        text = make_card(opened, repo or file.name, entries, found)
        drawn = plot if found.plot else None
        if path:
            _put(path, text, drawn, found.plot or b"")
    if not path and not as_json:
        print(text, end="")
    if as_json:
        print_json(
            {
                "card": text,
                "path": path and str(path),
                "plot": drawn and str(drawn),
                "perplexity": found.perplexity and found.perplexity.modes,
            }
        )


def _out(text: str) -> Path:
    """A folder, or a card in one, as an argparse type."""
    return Path(text) / _CARD if text.endswith(("/", os.sep)) else new_path(text, _CARD)


def _put(path: Path, text: str, plot: Path | None, drawing: bytes) -> None:
    with replacing(path) as card_file, replacing(plot) if plot else nullcontext() as plot_file:
        card_file.write_text(text, encoding="utf-8")
        if plot_file:
            plot_file.write_bytes(drawing)
    note(f"`{path}`: written" + (f", with {plot.name}" if plot else ""))


def examine(file: GgufFile, options: Options) -> Findings:
    """Read, draw and measure what a card shows of an open model.

    Raises UserError where a plot is wanted and matplotlib is missing, and for a text that cannot be measured.
    """
    frequencies = read_frequencies(file) if file.structure.neuron_order == "hot" else []
    plot = _plot(file, frequencies) if options.plot and frequencies else None
    return Findings(frequencies, _perplexity(file, options) if options.perplexity else None, plot)


def make_card(file: GgufFile, name: str, files: Sequence[FileEntry], found: Findings) -> str:
    """The card of an open model. name: how the commands on it shall call it; files: those to be listed."""
    drawn = found.plot is not None
    return str(write_card(Facts.of(file, name, files, found.frequencies, perplexity=found.perplexity, plot=drawn)))


def _perplexity(file: GgufFile, options: Options) -> Perplexity:
    assert options.perplexity
    s, modes, text = file.structure, {}, read_text(options.perplexity)
    names = [*([] if s.layout == "sparse" else ["dense"]), "exact", *(["predicted"] if any(s.predictor_rank) else [])]
    for mode in names:
        with load(file.path, mode, options.threads) as model:
            found = measure(model, text, tokens=options.perplexity_tokens)
        modes[mode] = found | {"limit": options.perplexity_tokens}
    return Perplexity(text.name, text.sha256, modes)


def _plot(file: GgufFile, frequencies: list[Frequencies]) -> bytes:
    """Two drawings side by side: active and predicted neurons by layer, and the hot/cold curves."""
    figure = new_figure(11, 4)
    bars, curves = figure.subplots(1, 2)
    n = len(frequencies)
    bars.bar(range(n), [layer_facts(freq)["active"] for freq in frequencies], label="active")
    predicted = [facts.get("predicted_share") for facts in predictor_facts(file.metadata, n)]
    shown = [(i, share) for i, share in enumerate(predicted) if share is not None and file.structure.rank(i)]
    if shown:
        bars.plot(*zip(*shown, strict=True), "o", color="black", markersize=4, label="predicted")
    bars.set(title="Active neurons, by layer", xlabel="layer", ylabel="share of the neurons")
    bars.legend()
    draw_curves(curves, frequencies)
    curves.set_title("Hot and cold neurons")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
