"""`python -m predictors fit`: other predictors for a converted model."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from predictors.commands.layer_table import layer_table
from predictors.evaluate import total_bytes
from predictors.fit import DEFAULT_ENERGY, TYPES, ModelFit
from predictors.refit import refit
from predictors.registry import KINDS
from runtime.base.atomic import new_path
from runtime.cli.completion import completed
from runtime.cli.options import add_json, add_model, count, writes
from runtime.cli.output import console, note, print_json
from runtime.cli.parser import Parser
from runtime.cli.progress import progress_bar
from runtime.model_file.structure import LAYOUTS


def configure_parser(parser: Parser) -> None:
    """The options; their names are the parameters of `fit`, those of `fit_model` among them."""
    add_model(parser)
    completed(parser.add_argument("out", metavar="OUT.gguf", type=new_path, help="the file to write"), ".gguf")
    writes(parser, "out")
    parser.add_argument("--kind", choices=tuple(KINDS), default="lowrank", help="kind of predictor (lowrank)")
    energy = f"share of the FFNs' output energy that predictors have to keep ({DEFAULT_ENERGY})"
    parser.add_argument("--energy", type=float, default=DEFAULT_ENERGY, metavar="SHARE", help=energy)
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="UTF-8 text (default: one in the package)")
    parser.add_argument("--calibration-tokens", dest="tokens", type=count, metavar="N", help="how many of its tokens")
    parser.add_argument("--predictor-type", choices=TYPES, default="auto", help="format of its matrices (auto)")
    layout = "`paged`: each neuron's rows side by side, for --ram-budget; `sparse`: without ffn_down (the file's)"
    parser.add_argument("--layout", choices=LAYOUTS, help=layout)
    parser.add_argument("--seed", type=int, default=0, help="which parts of the text are used for what (0)")
    parser.add_argument("--force", action="store_true", help="replace OUT.gguf if it exists")
    parser.add_argument("--threads", "-t", type=count, metavar="N", help="default: one per physical core")
    add_json(parser)


def fit(model: Path, out: Path, force: bool = False, as_json: bool = False, **options: Any) -> None:
    """Write a model file again with other predictors; the order of its neurons stays."""
    with progress_bar() as progress:
        written = refit(model, out, force, progress=progress, **options)
    made = written.fit
    note(f"`{out}`: wrote {written.bytes:,} bytes, {_summary(made)}")
    for text in made.notes:
        note(f"note: {text}")
    figures = [b.figures for b in made.blocks]
    if made.kind != "none":
        console().print(layer_table(figures, [f"{b.type} {b.rank}" if b.rank else "exact" for b in made.blocks]))
    if as_json:
        layers = [asdict(b.figures) | {"rank": b.rank, "type": b.type, "error": b.error} for b in made.blocks]
        bytes_read = total_bytes(figures)
        print_json({"path": os.fspath(out), "bytes": written.bytes, "layers": layers, "bytes_per_token": bytes_read})


def _summary(made: ModelFit) -> str:
    if made.kind == "none":
        return "no predictors"
    paying = sum(b.rank > 0 for b in made.blocks)
    if not paying:
        return f"`{made.kind}` pays in no layer: all are computed exactly"
    return f"`{made.kind}` pays in {paying} of {len(made.blocks)} layers"
