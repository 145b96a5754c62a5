"""The command line `python -m predictors`: options in, progress on stderr, tables and JSON on stdout.

Everything it does is `fit_model` and `evaluate`; knows nothing of how they work.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from predictors.evaluate import Evaluation, evaluate, total_bytes
from predictors.fit import DEFAULT_ENERGY, TYPES, Figures, ModelFit, fit_model
from predictors.registry import KINDS
from predictors.rewrite import rewritten
from runtime.base.atomic import check_target, new_path, writing
from runtime.cli.completion import completed
from runtime.cli.options import Parser, add_json, add_model, check_outputs, check_verb, count, print_json
from runtime.cli.program import run_command
from runtime.hub.locate import locate
from runtime.model_file.reader import GgufFile
from runtime.model_file.writer import write_parts

_START = """\
Fit other predictors to a converted model, or see what a model's predictors are worth:

    python -m predictors fit MODEL.gguf OUT.gguf --kind lowrank
    python -m predictors evaluate MODEL.gguf TEXT

All options: python -m predictors fit --help"""


def configure_parser() -> argparse.ArgumentParser:
    """The options; their names are the parameters of `fit` and `evaluate`."""
    parser = Parser(prog="python -m predictors", description="Fit and judge activation predictors.")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    refit = verbs.add_parser("fit", help="write a model file again with other predictors")
    refit.set_defaults(command=fit)
    add_model(refit)
    completed(refit.add_argument("out", metavar="OUT.gguf", type=new_path, help="the file to write"), ".gguf")
    _add_fit_options(refit)
    judge = verbs.add_parser("evaluate", help="measure a model's predictors on a text")
    judge.set_defaults(command=show_evaluation)
    add_model(judge)
    judge.add_argument("file", metavar="TEXT", type=Path, help="a UTF-8 text that the predictors were not fitted on")
    judge.add_argument("--tokens", type=count, metavar="N", help="use only the first N tokens (16384)")
    judge.add_argument("--predictor-bias", type=float, default=0.0, metavar="X", help="as at run time (0)")
    for verb in (refit, judge):
        verb.add_argument("--threads", "-t", type=count, metavar="N", help="default: one per physical core")
        add_json(verb)
    return parser


def _add_fit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", choices=tuple(KINDS), default="lowrank", help="kind of predictor (lowrank)")
    energy = f"share of the FFNs' output energy that predictors have to keep ({DEFAULT_ENERGY})"
    parser.add_argument("--energy", type=float, default=DEFAULT_ENERGY, metavar="SHARE", help=energy)
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="UTF-8 text (default: one in the package)")
    parser.add_argument("--calibration-tokens", dest="tokens", type=count, metavar="N", help="how many of its tokens")
    parser.add_argument("--predictor-type", choices=TYPES, default="auto", help="format of its matrices (auto)")
    parser.add_argument("--seed", type=int, default=0, help="which parts of the text are used for what (0)")
    parser.add_argument("--force", action="store_true", help="replace OUT.gguf if it exists")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return run_command(lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    if not arguments:
        print(_START)
        return
    check_verb(arguments[0], ("fit", "evaluate"), "python -m predictors")
    options = vars(configure_parser().parse_args(arguments))
    command = options.pop("command")
    check_outputs(options)
    command(**options | {"model": locate(options["model"])})


def fit(model: Path, out: Path, force: bool = False, as_json: bool = False, **options: Any) -> None:
    """Write `model` to `out` with other predictors; options are those of `fit_model`.

    The order of the neurons stays: `python -m convert` is what changes it.
    """
    with GgufFile(model) as file:
        read = [part.path for part in file.parts]
        check_target(out, file.size, force, inputs=[*read, *filter(None, [options.get("calibration")])])
    with writing(out) as work:
        with _Bar() as bar:
            made = fit_model(model, reorder=False, progress=bar, **options)
        new = work.folder / work.target.name
        size = write_parts([rewritten(model, new, [block.tensors for block in made.blocks], made.metadata)])
        work.publish([new.name])
    print(f"`{out}`: wrote {size:,} bytes, {_summary(made)}", file=sys.stderr)
    figures = [b.figures for b in made.blocks]
    if made.kind != "none":
        _console().print(_layer_table(figures, [f"{b.type} {b.rank}" if b.rank else "exact" for b in made.blocks]))
    if as_json:
        layers = [asdict(b.figures) | {"rank": b.rank, "type": b.type, "error": b.error} for b in made.blocks]
        bytes_read = total_bytes(figures)
        print_json({"path": os.fspath(out), "bytes": size, "layers": layers, "bytes_per_token": bytes_read})


def _summary(made: ModelFit) -> str:
    if made.kind == "none":
        return "no predictors"
    paying = sum(b.rank > 0 for b in made.blocks)
    if not paying:
        return f"`{made.kind}` pays in no layer: all are computed exactly"
    return f"`{made.kind}` pays in {paying} of {len(made.blocks)} layers"


def show_evaluation(model: Path, file: Path, as_json: bool = False, **options: Any) -> None:
    """Print what a model's predictors achieve on a text; options are those of `evaluate`."""
    with _Bar() as bar:
        found = evaluate(model, file, progress=bar, **options)
    console = _console()
    console.print(_layer_table(found.layers))
    console.print()
    console.print(_mode_table(found))
    if as_json:
        print_json(asdict(found) | {"reference": found.reference, "bytes_per_token": total_bytes(found.layers)})


def _layer_table(layers: Sequence[Figures], stored: Sequence[str] = ()) -> Table:
    names = ("active", "recall", "precision", "predicted", "energy kept", "bytes", "exact", "dense")
    table = Table("layer", *(["predictor"] if stored else []), box=None, header_style="bold", pad_edge=False)
    for name in names:
        table.add_column(name, justify="right")
    for i, f in enumerate(layers):
        shares = (f.active_share, f.recall, f.precision, f.predicted_share, f.energy_kept)
        nbytes = (f.bytes_predicted, f.bytes_exact, f.bytes_dense)
        texts = [*(f"{share:.2%}" for share in shares), *(f"{n:,.0f}" for n in nbytes)]
        table.add_row(str(i), *([stored[i]] if stored else []), *texts)
    return table


def _mode_table(found: Evaluation) -> Table:
    title = f"{found.tokens} tokens in windows of {found.window}; compared with {found.reference}"
    table = Table("mode", title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for name in ("perplexity", "difference", "KL, nats", "FFN + predictor bytes"):
        table.add_column(name, justify="right")
    base = found.modes[0].perplexity
    for m in found.modes:
        difference = f"{m.perplexity / base - 1:+.2%}"
        table.add_row(m.mode, f"{m.perplexity:.3f}", difference, f"{m.kl:.5f}", f"{m.bytes:.1%}")
    return table


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


class _Bar:
    """A progress bar on stderr, when that is a terminal."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<12}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        hidden = not sys.stderr.isatty()
        self.progress = Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True)
        self.task = self.progress.add_task("layer 0")

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, layer: int, n_layers: int, fraction: float) -> None:
        """Show that `fraction` of layer `layer` is done."""
        done = (layer + fraction) / n_layers
        self.progress.update(self.task, description=f"layer {layer}", completed=100 * done)
