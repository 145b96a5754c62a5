"""How neurons fire, as tables and a drawing: what `sparsity` shows of a file, and `convert --measure-sparsity` of a
checkpoint.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table

from runtime.analysis.drawing import draw_curves, drawn, new_figure
from runtime.analysis.firing import ExpertUse, Frequencies, LayerFiring, PredictorFigures
from runtime.base.atomic import new_path, replacing
from runtime.base.figures import NONE, share
from runtime.cli.options import writes
from runtime.cli.output import new_table
from runtime.cli.parser import Parser
from runtime.errors import UserError

_FORMATS = (".png", ".html")
_FIRING = ("layer", "active", "carry 80 %", "rare (< 1 %)")


def add_plot(parser: Parser, what: str = "") -> None:
    """--plot; what: said first in its help."""
    parser.add_argument(
        "--plot",
        type=new_path,
        metavar="FILE",
        help=f"{what}write the hot/cold curves to a .png or .html file (needs matplotlib)",
    )
    writes(parser, "plot")


def check_plot(path: Path | None) -> None:
    """Raise UserError for a drawing of a kind that is not known."""
    if path is not None and path.suffix not in _FORMATS:
        raise UserError(f"`{path}`: expected a name that ends in {' or '.join(_FORMATS)}")


def firing_table(title: str, layers: Iterable[tuple[int, LayerFiring]]) -> Table:
    """A row for each of some layers, by number."""
    table = new_table(*_FIRING, title=title)
    for i, layer in layers:
        table.add_row(str(i), *map(share, (layer.active, layer.hot, layer.rare)))
    return table


def predictor_table(title: str, layers: Sequence[LayerFiring], predictors: Sequence[PredictorFigures | None]) -> Table:
    """A row for each layer, with what its predictor achieves."""
    table = new_table(*_FIRING, "rank", "predicted", "recall", "precision", title=title)
    for i, (layer, predictor) in enumerate(zip(layers, predictors, strict=True)):
        shares = [layer.active, layer.hot, layer.rare]
        measured: list[float | None] = [None] * 3
        if predictor and predictor.rank:
            measured = [predictor.predicted_share, predictor.recall, predictor.precision]
        rank = str(predictor.rank) if predictor else NONE
        table.add_row(str(i), *map(share, shares), rank, *map(share, measured))
    return table


def expert_table(experts: Sequence[ExpertUse | None]) -> Table:
    """A row for each layer that has experts."""
    table = new_table("layer", "most chosen", "least chosen", "carry 80 %", title="experts")
    for i, use in enumerate(experts):
        if use:
            table.add_row(str(i), share(use.most), share(use.least), share(use.hot))
    return table


def write_plot(path: Path, frequencies: Sequence[Frequencies], name: str) -> None:
    """Draw how much the hottest neurons of each layer carry, hottest first. frequencies: by layer."""
    figure = new_figure(7, 5)
    draw_curves(figure.add_subplot(title=f"{name}: hot and cold neurons"), frequencies)
    made = drawn(figure, "png" if path.suffix == ".png" else "svg", 150)
    if path.suffix == ".html":
        head = f"<!doctype html><meta charset='utf-8'><title>{html.escape(name)}</title>\n"
        made = head.encode() + made[made.index(b"<svg") :]
    with replacing(path) as partial:
        partial.write_bytes(made)
