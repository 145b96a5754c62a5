"""`python -m runtime sparsity`: how unevenly the neurons of each layer fire, as measured when the file was made."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from runtime.analysis.firing import PredictorFigures, expert_use, layer_firing, predictor_figures, read_frequencies
from runtime.base.atomic import check_target
from runtime.cli.firing import add_plot, check_plot, expert_table, predictor_table, write_plot
from runtime.cli.options import add_json, add_model
from runtime.cli.output import console, print_json
from runtime.cli.parser import Parser
from runtime.model_file.reader import GgufFile


def configure_parser(parser: Parser) -> None:
    """Options of `sparsity`."""
    add_model(parser)
    add_plot(parser)
    add_json(parser)


def sparsity(model: Path, plot: Path | None = None, as_json: bool = False) -> None:
    """Print each layer's activity, and what share of its neurons carries 80 % of the activations."""
    check_plot(plot)
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
        write_plot(plot, frequencies, model.name)
    if as_json:
        rows = [asdict(a) | (b.as_json() if b else {}) for a, b in zip(layers, predictors, strict=True)]
        rows = [row | ({"experts": asdict(use)} if use else {}) for row, use in zip(rows, experts, strict=True)]
        print_json({"model": str(model), "layers": rows})
        return
    console().print(predictor_table(f"neurons of {model.name}", layers, predictors))
    if any(experts):
        console().print(expert_table(experts))
