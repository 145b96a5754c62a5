"""The command line `python -m convert`: options in, a progress bar on stderr, results on stdout.

Everything it does is `convert.convert`; knows nothing of formats.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from convert.arch import Generated
from convert.catalogue import catalogue
from convert.formats import TYPES
from convert.job import Report, convert
from convert.plan import Given, Origin
from predictors.fit import DEFAULT_ENERGY
from predictors.fit import TYPES as PREDICTOR_TYPES
from predictors.registry import KINDS
from runtime.cli.completion import chosen_from, completed, offer_completions
from runtime.cli.options import Parser, add_json, count, print_json
from runtime.cli.program import run_command
from runtime.model_file.structure import LAYOUTS

VERBS = ("card", "push")  # modules of that name, slow to import; a folder of such a name is ./card, ./push

_START = """\
Give a Hugging Face checkpoint and a file to write:

    python -m convert SparseLLM/ReluLLaMA-7B relullama-7b.gguf --type q8_0
    python -m convert prosparse-llama-2-7b prosparse.gguf      (short names: python -m convert --list)
    python -m convert path/to/checkpoint model.gguf

then run it with `python -m runtime chat model.gguf`, and share it:

    python -m convert push model.gguf user/repo

All options: python -m convert --help, python -m convert push --help, python -m convert card --help"""


def configure_parser() -> Parser:
    """The options; their names are the parameters of `convert.convert`."""
    parser = Parser(
        prog="python -m convert",
        description="Convert a Hugging Face ReLU checkpoint or a PowerInfer file to one GGUF file for lazyneuron.",
    )
    source = "a folder with a checkpoint, a Hub id, a name that --list shows, or a *.powerinfer.gguf file"
    completed(parser.add_argument("source", metavar="SOURCE", nargs="?", help=source), ".powerinfer.gguf", _sources)
    out = parser.add_argument(
        "out", metavar="OUT.gguf", nargs="?", help="the file to write (not needed with --dry-run)"
    )
    completed(out, ".gguf")
    matrices = parser.add_argument("--type", help=f"format of the matrices: {', '.join(TYPES)} (default f16)")
    head = parser.add_argument(
        "--output-type", metavar="TYPE", help="format of the output head (default: q6_k or better)"
    )
    for action in (matrices, head):
        chosen_from(action, TYPES)
    layout = "`sparse`: smaller, for sparse CPU runs only (default both; a PowerInfer file: sparse)"
    parser.add_argument("--layout", choices=LAYOUTS, help=layout)
    parser.add_argument(
        "--ffn-type",
        metavar="RELU",
        help="the activation, where config.json is wrong about it: relu, relu2, drelu or, with its threshold, fatrelu:0.01",
    )
    parser.add_argument("--list", action="store_true", help="print the known models and leave")
    parser.add_argument("--threads", type=count, metavar="N", help="default: one per CPU")
    _add_predictor_options(parser)
    parser.add_argument(
        "--split-max-size", metavar="SIZE", help="write a larger model as shards of at most this size, e.g. 45G or 500M"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare logits with transformers or the checkpoint itself; a wrong file is not kept",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--force", action="store_true", help="replace OUT.gguf if it exists")
    add_json(parser)
    return parser


def _add_predictor_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration and predictors")
    group.add_argument(
        "--calibration",
        metavar="FILE",
        help="text to calibrate on (default: one in the package; `none`: leave neurons as they are, without predictors)",
    )
    group.add_argument("--calibration-tokens", type=count, metavar="N", help="how many of its tokens")
    group.add_argument("--predictor", choices=tuple(KINDS), help="kind of predictor (default lowrank)")
    group.add_argument("--predictor-type", choices=PREDICTOR_TYPES, default="auto", help="format of its matrices")
    group.add_argument(
        "--energy",
        type=float,
        metavar="SHARE",
        help=f"share of the FFNs' output energy to keep (default {DEFAULT_ENERGY})",
    )
    folder = "REPO_OR_DIR"
    group.add_argument("--import-predictor", metavar=folder, help="take PowerInfer's predictors (model_N.pt) instead")
    group.add_argument("--activations", metavar=folder, help="order neurons by PowerInfer's counts (activation_N.pt)")
    group.add_argument("--seed", type=int, default=0, help="which parts of the text are used for what")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return run_command(lambda: _run(arguments))


def complete_for_shell() -> None:
    """Answer a shell that asks what can follow, and leave; else do nothing."""
    offer_completions(configure_parser, {verb: lambda verb=verb: _verb(verb)[0] for verb in VERBS})  # type: ignore[misc]


def _run(arguments: Sequence[str]) -> None:
    if not arguments:
        print(_START)
        return
    if arguments[0] in VERBS:
        parser, command = _verb(arguments[0])
        command(**vars(parser.parse_args(arguments[1:])))
        return
    parser = configure_parser()
    options = vars(parser.parse_args(arguments))
    as_json = options.pop("as_json")
    if options.pop("list"):
        _print_catalogue(as_json)
        return
    for name, metavar in (("source", "SOURCE"), ("out", "OUT.gguf")):
        if options[name] is None and not (name == "out" and options["dry_run"]):
            parser.error(f"{metavar} is missing")
    _convert(as_json, options)


def _verb(name: str) -> tuple[Parser, Callable[..., None]]:
    module = import_module(f"convert.publish.{name}")
    command: Callable[..., None] = getattr(module, name)
    parser = Parser(prog=f"python -m convert {name}", description=command.__doc__)
    module.configure_parser(parser)
    return parser, command


def _sources() -> list[str]:
    return [*VERBS, *(known.name for known in catalogue())]


def _convert(as_json: bool, options: dict[str, Any]) -> None:
    with _Bar() as bar:
        report = convert(**options, progress=bar)
    if report.dry_run:
        _print_plan(report)
    _print_summary(report)
    if as_json:
        print_json(report.to_json())


class _Bar:
    """A progress bar on stderr, when that is a terminal."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<26}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self.progress = Progress(
            *columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
        )
        self.task = self.progress.add_task("", visible=False)

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, tensor: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are written, the last ones to `tensor`."""
        self.progress.update(self.task, description=tensor, completed=done, total=total, visible=True)


def _print_plan(report: Report) -> None:
    table = Table("tensor", "from", "rewrite", "shape", "type", box=None, header_style="bold", pad_edge=False)
    table.add_column("bytes", justify="right")
    for tensor in report.plan.tensors:
        origin = _origin(tensor.source)
        kind = tensor.type if tensor.type == tensor.wanted else f"{tensor.type} (for {tensor.wanted})"
        shape = " x ".join(map(str, tensor.shape))
        table.add_row(tensor.name, *origin, shape, kind, f"{tensor.nbytes:,}")
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def _origin(source: Origin) -> tuple[str, str]:
    """Where a tensor comes from, and what changes it on the way."""
    if isinstance(source, Generated):
        return "config.json", ""
    return ("made here", "") if isinstance(source, Given) else (source.name, source.rewrite)


def _print_catalogue(as_json: bool) -> None:
    if as_json:
        print(json.dumps([{"name": known.name, **asdict(known)} for known in catalogue()]))
        return
    table = Table("name", "from", "FFN", "sparsity", "status", "licence", box=None, header_style="bold", pad_edge=False)
    for known in catalogue():
        sparsity = "" if known.sparsity is None else f"{known.sparsity:.0%}"
        table.add_row(known.name, known.repo, known.ffn_kind, sparsity, known.status, known.licence)
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def _print_summary(report: Report) -> None:
    """Two or three lines for people, on stderr: stdout is for data."""
    types = ", ".join(f"{count} {name}" for name, count in report.types.items())
    verb = "would write" if report.dry_run else "wrote"
    where = f"`{report.path}`: " if report.path else ""
    where += f"{len(report.files)} shards: " if len(report.files) > 1 else ""
    print(f"{where}{verb} {report.bytes:,} bytes, {report.tensors} tensors ({types})", file=sys.stderr)
    if report.verified:
        print(_verdict_line(report.verified), file=sys.stderr)
    if report.ffn_source == "models.toml":
        activation = report.plan.structure.ffn_activation
        print(f"note: FFN type {activation} as models.toml has it, not what config.json says", file=sys.stderr)
    for line in _fallback_lines(report) + [f"note: {note}" for note in report.notes]:
        print(line, file=sys.stderr)


def _verdict_line(verified: dict[str, Any]) -> str:
    modes = " and ".join(verified["modes"])
    figures = f"max difference {verified['max_difference']:.2g}, KL {verified['kl']:.2g} nats per token"
    return f"verified against {verified['reference']}: {figures} ({modes}, {verified['tokens']} tokens)"


def _fallback_lines(report: Report) -> list[str]:
    kinds: dict[tuple[str, str], list[str]] = {}
    for tensor in report.plan.tensors:
        if tensor.type != tensor.wanted:
            kinds.setdefault((tensor.wanted, tensor.type), []).append(tensor.name)
    return [
        f"note: {len(names)} tensors, such as {names[0]}, are {used} because rows are no multiple of {wanted}'s block"
        for (wanted, used), names in kinds.items()
    ]
