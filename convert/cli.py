"""The command line `python -m convert`: options in, a progress bar on stderr, results on stdout.

Everything it does is `convert.convert`; knows nothing of formats.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType, ModuleType
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from convert import card, push
from convert.arch import Source
from convert.job import Report, convert
from convert.quantize import TYPES
from predictors.fit import DEFAULT_ENERGY
from predictors.fit import TYPES as PREDICTOR_TYPES
from predictors.kinds import KINDS
from runtime.commands.options import Parser
from runtime.errors import run_command
from runtime.structure import LAYOUTS

# A folder of such a name is ./card, ./push.
VERBS: dict[str, tuple[ModuleType, Callable[..., None]]] = {"card": (card, card.card), "push": (push, push.push)}

_START = """\
Give a Hugging Face checkpoint and a file to write:

    python -m convert SparseLLM/ReluLLaMA-7B relullama-7b.gguf --type q8_0
    python -m convert path/to/checkpoint model.gguf

then run it with `python -m runtime chat model.gguf`, and share it:

    python -m convert push model.gguf user/repo

All options: python -m convert --help, python -m convert push --help, python -m convert card --help"""


def configure_parser() -> argparse.ArgumentParser:
    """The options; their names are the parameters of `convert.convert`."""
    parser = argparse.ArgumentParser(
        prog="python -m convert", description="Convert a Hugging Face ReLU checkpoint to one GGUF file for lazyneuron."
    )
    parser.add_argument("source", metavar="REPO_OR_DIR", help="a folder with a checkpoint, or a Hub id")
    parser.add_argument("out", metavar="OUT.gguf", nargs="?", help="the file to write (not needed with --dry-run)")
    parser.add_argument("--type", default="f16", help=f"format of the matrices: {', '.join(TYPES)} (default f16)")
    parser.add_argument("--output-type", metavar="TYPE", help="format of the output head (default: q6_k or better)")
    parser.add_argument("--layout", choices=LAYOUTS, default="both", help="`sparse`: smaller, for sparse CPU runs only")
    parser.add_argument("--ffn-type", metavar="RELU", help="the activation, where config.json is wrong about it")
    parser.add_argument("--threads", type=_positive, metavar="N", help="default: one per CPU")
    _add_predictor_options(parser)
    parser.add_argument(
        "--split-max-size", metavar="SIZE", help="write a larger model as shards of at most this size, e.g. 45G or 500M"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--force", action="store_true", help="replace OUT.gguf if it exists")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object, last line of stdout")
    return parser


def _add_predictor_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration and predictors")
    group.add_argument(
        "--calibration",
        metavar="FILE",
        help="text to calibrate on (default: one in the package; `none`: leave neurons as they are, without predictors)",
    )
    group.add_argument("--calibration-tokens", type=_positive, metavar="N", help="how many of its tokens")
    group.add_argument(
        "--predictor", choices=tuple(KINDS), default="lowrank", help="kind of predictor (default lowrank)"
    )
    group.add_argument("--predictor-type", choices=PREDICTOR_TYPES, default="auto", help="format of its matrices")
    group.add_argument(
        "--energy",
        type=float,
        default=DEFAULT_ENERGY,
        metavar="SHARE",
        help=f"share of the FFNs' output energy to keep (default {DEFAULT_ENERGY})",
    )
    group.add_argument("--seed", type=int, default=0, help="which parts of the text are used for what")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments:
        print(_START)
        return 2
    if arguments[0] in VERBS:
        _stop_cleanly()
        return run_command(lambda: _run_verb(*VERBS[arguments[0]], arguments))
    parser = configure_parser()
    options = vars(parser.parse_args(arguments))
    if options["out"] is None and not options["dry_run"]:
        parser.error("OUT.gguf is missing")
    _stop_cleanly()
    return run_command(lambda: _run(options.pop("json"), options))


def _run_verb(module: ModuleType, command: Callable[..., None], arguments: Sequence[str]) -> None:
    parser = Parser(prog=f"python -m convert {arguments[0]}", description=command.__doc__)
    module.configure_parser(parser)
    command(**vars(parser.parse_args(arguments[1:])))


def _run(as_json: bool, options: dict[str, Any]) -> None:
    with _Bar() as bar:
        report = convert(**options, progress=bar)
    if report.dry_run:
        _print_plan(report)
    _print_summary(report)
    if as_json:
        print(json.dumps(report.to_json()))


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
        source = tensor.source
        origin = (source.name, source.rewrite) if isinstance(source, Source) else ("config.json", "")
        kind = tensor.type if tensor.type == tensor.wanted else f"{tensor.type} (for {tensor.wanted})"
        shape = " x ".join(map(str, tensor.shape))
        table.add_row(tensor.name, *origin, shape, kind, f"{tensor.nbytes:,}")
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def _print_summary(report: Report) -> None:
    """Two or three lines for people, on stderr: stdout is for data."""
    types = ", ".join(f"{count} {name}" for name, count in report.types.items())
    verb = "would write" if report.dry_run else "wrote"
    where = f"`{report.path}`: " if report.path else ""
    where += f"{len(report.files)} shards: " if len(report.files) > 1 else ""
    print(f"{where}{verb} {report.bytes:,} bytes, {report.tensors} tensors ({types})", file=sys.stderr)
    for line in _fallback_lines(report):
        print(line, file=sys.stderr)


def _fallback_lines(report: Report) -> list[str]:
    kinds: dict[tuple[str, str], list[str]] = {}
    for tensor in report.plan.tensors:
        if tensor.type != tensor.wanted:
            kinds.setdefault((tensor.wanted, tensor.type), []).append(tensor.name)
    return [
        f"note: {len(names)} tensors, such as {names[0]}, are {used} because rows are no multiple of {wanted}'s block"
        for (wanted, used), names in kinds.items()
    ]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _stop_cleanly() -> None:
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    """Leave through the same clean-up as an interrupt."""
    raise SystemExit(128 + signal.SIGTERM)
