"""`python -m runtime sparsity`: how unevenly the neurons of each layer fire, as measured when the file was made."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from runtime.analysis.drawing import draw_curves, drawn, new_figure
from runtime.analysis.firing import (
    ExpertUse,
    Frequencies,
    LayerFiring,
    PredictorFigures,
    expert_use,
    layer_firing,
    predictor_figures,
    read_frequencies,
)
from runtime.base.atomic import check_target, new_path, replacing
from runtime.base.figures import NONE, share
from runtime.cli.options import add_json, add_model, writes
from runtime.cli.output import console, new_table, print_json
from runtime.cli.parser import Parser
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile

_FORMATS = (".png", ".html")


def configure_parser(parser: Parser) -> None:
    """Options of `sparsity`."""
    add_model(parser)
    parser.add_argument(
        "--plot",
        type=new_path,
        metavar="FILE",
        help="write the hot/cold curves to a .png or .html file (needs matplotlib)",
    )
    writes(parser, "plot")
    add_json(parser)


def sparsity(model: Path, plot: Path | None = None, as_json: bool = False) -> None:
    """Print each layer's activity, and what share of its neurons carries 80 % of the activations."""
    if plot is not None and plot.suffix not in _FORMATS:
        raise UserError(f"`{plot}`: expected a name that ends in {' or '.join(_FORMATS)}")
    with GgufFile(model) as file:
        if plot is not None:
            check_target(plot, 0, force=True, inputs=[part.path for part in file.parts])
        frequencies = read_frequencies(file)
        ffns = [block.ffn for block in file.structure.blocks]
        layers = [layer_firing(freq, ffn) for freq, ffn in zip(frequencies, ffns, strict=True)]
        experts = [expert_use(file, i) for i in range(len(layers))]
        known = predictor_figures(file.metadata, len(layers))
        predictors: list[PredictorFigures | None] = [*known] if known else [None] * len(layers)
    if plot is not None:
        _write_plot(plot, frequencies, model.name)
    if as_json:
        rows = [asdict(a) | (b.as_json() if b else {}) for a, b in zip(layers, predictors, strict=True)]
        rows = [row | ({"experts": asdict(use)} if use else {}) for row, use in zip(rows, experts, strict=True)]
        print_json({"model": str(model), "layers": rows})
        return
    console().print(_table(model, layers, predictors))
    if any(experts):
        console().print(_expert_table(experts))


def _table(model: Path, layers: Sequence[LayerFiring], predictors: Sequence[PredictorFigures | None]) -> Table:
    columns = ("layer", "active", "carry 80 %", "rare (< 1 %)", "rank", "predicted", "recall", "precision")
    table = new_table(*columns, title=f"neurons of {model.name}")
    for i, (layer, predictor) in enumerate(zip(layers, predictors, strict=True)):
        shares = [layer.active, layer.hot, layer.rare]
        measured: list[float | None] = [None] * 3
        if predictor and predictor.rank:
            measured = [predictor.predicted_share, predictor.recall, predictor.precision]
        rank = str(predictor.rank) if predictor else NONE
        table.add_row(str(i), *map(share, shares), rank, *map(share, measured))
    return table


def _expert_table(experts: Sequence[ExpertUse | None]) -> Table:
    table = new_table("layer", "most chosen", "least chosen", "carry 80 %", title="experts")
    for i, use in enumerate(experts):
        if use:
            table.add_row(str(i), share(use.most), share(use.least), share(use.hot))
    return table


def _write_plot(path: Path, frequencies: Sequence[Frequencies], name: str) -> None:
    figure = new_figure(7, 5)
    draw_curves(figure.add_subplot(title=f"{name}: hot and cold neurons"), frequencies)
    made = drawn(figure, "png" if path.suffix == ".png" else "svg", 150)
    if path.suffix == ".html":
        head = f"<!doctype html><meta charset='utf-8'><title>{html.escape(name)}</title>\n"
        made = head.encode() + made[made.index(b"<svg") :]
    with replacing(path) as partial:
        partial.write_bytes(made)
