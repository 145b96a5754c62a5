"""`python -m predictors evaluate`: what a model's predictors are worth on a text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from predictors.commands.layer_table import layer_table
from predictors.evaluate import Evaluation, evaluate, total_bytes
from runtime.base.figures import share
from runtime.cli.options import add_json, add_model, count
from runtime.cli.output import console, new_table, print_json
from runtime.cli.parser import Parser
from runtime.cli.progress import progress_bar


def configure_parser(parser: Parser) -> None:
    """Options of `evaluate`."""
    add_model(parser)
    parser.add_argument("file", metavar="TEXT", type=Path, help="a UTF-8 text that the predictors were not fitted on")
    parser.add_argument("--tokens", type=count, metavar="N", help="use only the first N tokens (16384)")
    parser.add_argument("--predictor-bias", type=float, default=0.0, metavar="X", help="as at run time (0)")
    parser.add_argument("--threads", "-t", type=count, metavar="N", help="default: one per physical core")
    add_json(parser)


def show_evaluation(
    model: Path,
    file: Path,
    tokens: int | None = None,
    predictor_bias: float = 0.0,
    threads: int | None = None,
    as_json: bool = False,
) -> None:
    """Print what a model's predictors achieve on a text, by layer, and in perplexity and divergence from dense."""
    with progress_bar() as progress:
        found = evaluate(model, file, tokens, threads, predictor_bias, progress)
    out = console()
    out.print(layer_table(found.layers))
    out.print()
    out.print(_mode_table(found))
    if as_json:
        print_json(asdict(found) | {"reference": found.reference, "bytes_per_token": total_bytes(found.layers)})


def _mode_table(found: Evaluation) -> Table:
    title = f"{found.tokens} tokens in windows of {found.window}; compared with {found.reference}"
    columns = ("mode", "perplexity", "difference", "KL, nats", "FFN + predictor bytes")
    table = new_table(*columns, title=title, left=("mode",))
    base = found.modes[0].perplexity
    for m in found.modes:
        difference = f"{m.perplexity / base - 1:+.2%}"
        table.add_row(m.mode, f"{m.perplexity:.3f}", difference, f"{m.kl:.5f}", share(m.bytes))
    return table
