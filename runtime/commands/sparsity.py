"""`python -m runtime sparsity`: how unevenly the neurons of each layer fire, as measured when the file was made.

Reads the file's own frequencies; runs nothing.
"""

from __future__ import annotations

import argparse
import html
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from runtime.base.atomic import check_target, new_path, replacing
from runtime.cli.options import add_json, add_model, print_json
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile

HELP = "show how unevenly the neurons of each layer fire"
CARRIED = 0.8  # of the activations: how many of the hottest neurons carry that
RARE = 0.01  # a neuron that fires for fewer tokens than this
_FORMATS = (".png", ".html")

Frequencies = npt.NDArray[np.float32]


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Options of `sparsity`."""
    add_model(parser)
    parser.add_argument(
        "--plot",
        type=new_path,
        metavar="FILE",
        help="write the hot/cold curves to a .png or .html file (needs matplotlib)",
    )
    add_json(parser)


def sparsity(model: Path, plot: Path | None = None, as_json: bool = False) -> None:
    """Print each layer's activity, and what share of its neurons carries 80 % of the activations."""
    if plot is not None and plot.suffix not in _FORMATS:
        raise UserError(f"`{plot}`: expected a name that ends in {' or '.join(_FORMATS)}")
    with GgufFile(model) as file:
        if plot is not None:
            check_target(plot, 0, force=True, inputs=[part.path for part in file.parts])
        frequencies = read_frequencies(file)
        layers = [layer_facts(freq) for freq in frequencies]
        achieved = predictor_facts(file.metadata, len(layers))
    if plot is not None:
        _write_plot(plot, frequencies, model.name)
    if as_json:
        print_json({"model": str(model), "layers": [a | b for a, b in zip(layers, achieved, strict=True)]})
        return
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(_table(model, layers, achieved))


def read_frequencies(file: GgufFile) -> list[Frequencies]:
    """How often each neuron fired on the calibration text, per layer, hottest first. Raises UserError where the file does not say."""
    if file.structure.neuron_order != "hot":
        raise UserError(
            f"`{file.path}`: holds no neuron frequencies: it was converted without calibration",
            "convert it again without --calibration none",
        )
    return [file.read(f"blk.{i}.ffn_neuron_freq").view(np.float32) for i in range(file.structure.block_count)]


def layer_facts(freq: Frequencies) -> dict[str, float]:
    """active: mean share of neurons firing; hot: share of the neurons that carries 80 % of the activations; rare: share firing for less than 1 % of the tokens."""
    carried = np.cumsum(freq, dtype=np.float64)
    hot = (np.searchsorted(carried, CARRIED * carried[-1]) + 1) / len(freq) if carried[-1] else 0.0
    return {"active": float(freq.mean()), "hot": float(hot), "rare": float((freq < RARE).mean())}


def predictor_facts(metadata: dict[str, Any], n_layers: int) -> list[dict[str, float]]:
    """What the file says of each layer's predictor; empty where it has none."""
    keys = {
        name: metadata.get(f"lazyneuron.predictor.{name}")
        for name in ("rank", "predicted_share", "recall", "precision")
    }
    if any(values is None for values in keys.values()):
        return [{} for _ in range(n_layers)]
    return [{name: float(values[i]) for name, values in keys.items() if values is not None} for i in range(n_layers)]


def _table(model: Path, layers: list[dict[str, float]], achieved: list[dict[str, float]]) -> Table:
    table = Table(title=f"neurons of {model.name}", box=None, header_style="bold", pad_edge=False, title_justify="left")
    for name in ("layer", "active", "carry 80 %", "rare (< 1 %)", "rank", "predicted", "recall", "precision"):
        table.add_column(name, justify="right")
    for i, (layer, predictor) in enumerate(zip(layers, achieved, strict=True)):
        shares = [f"{layer[name]:.1%}" for name in ("active", "hot", "rare")]
        rank = f"{predictor['rank']:.0f}" if predictor else "-"
        measured = [
            f"{predictor[name]:.1%}" if predictor.get("rank") else "-"
            for name in ("predicted_share", "recall", "precision")
        ]
        table.add_row(str(i), *shares, rank, *measured)
    return table


def _write_plot(path: Path, frequencies: list[Frequencies], name: str) -> None:
    figure = new_figure(7, 5)
    draw_curves(figure.add_subplot(title=f"{name}: hot and cold neurons"), frequencies)
    drawing = io.BytesIO()
    figure.savefig(drawing, format="png" if path.suffix == ".png" else "svg", dpi=150)
    made = drawing.getvalue()
    if path.suffix == ".html":
        head = f"<!doctype html><meta charset='utf-8'><title>{html.escape(name)}</title>\n"
        made = head.encode() + made[made.index(b"<svg") :]
    with replacing(path) as partial:
        partial.write_bytes(made)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure, in inches. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  (an extra: only plots need it)
    except ImportError:
        raise UserError("plots need matplotlib", "pip install 'lazyneuron[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def draw_curves(axes: Any, frequencies: list[Frequencies]) -> None:
    """One curve per layer: share of the activations over share of the neurons, hottest first."""
    axes.set(xlabel="share of the neurons, hottest first", ylabel="share of the activations", xlim=(0, 1), ylim=(0, 1))
    for i, freq in enumerate(frequencies):
        carried = np.cumsum(freq, dtype=np.float64)
        axes.plot(
            np.arange(1, len(freq) + 1) / len(freq), carried / (carried[-1] or 1.0), label=f"layer {i}", linewidth=1
        )
    axes.axhline(CARRIED, color="gray", linestyle=":", linewidth=1)
    axes.grid(visible=True, alpha=0.3)
    if len(frequencies) <= 16:
        axes.legend(fontsize="small")
