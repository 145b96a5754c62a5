"""`python -m convert SOURCE OUT.gguf`: a progress bar on stderr, the plan and the known models on stdout."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from convert.arch import Generated
from convert.catalogue import catalogue
from convert.commands.measure import print_measured
from convert.formats import TYPES
from convert.job import Report, convert
from convert.plan import MadeTensor, Origin
from predictors.fit import DEFAULT_ENERGY
from predictors.fit import TYPES as PREDICTOR_TYPES
from predictors.kept_layers import count_kept
from predictors.registry import KINDS
from runtime.base.atomic import place_of
from runtime.base.figures import share
from runtime.base.workspace import kept_for
from runtime.cli.completion import chosen_from, completed
from runtime.cli.firing import add_plot
from runtime.cli.options import add_json, count
from runtime.cli.output import console, new_table, note, print_json
from runtime.cli.parser import Parser
from runtime.cli.progress import progress_bar
from runtime.errors import UserError
from runtime.model_file.structure import LAYOUTS

_WIDE = 180  # columns, where stdout is no terminal
_VERBS = ("card", "push")  # what may stand in the place of a source


def configure_parser(parser: Parser) -> None:
    """The options; their names are the parameters of `convert.convert`."""
    source = "a folder with a checkpoint, a Hub id, a name that --list shows, or a *.powerinfer.gguf file"
    completed(parser.add_argument("source", metavar="SOURCE", nargs="?", help=source), ".powerinfer.gguf", _sources)
    out = parser.add_argument(
        "out",
        metavar="OUT.gguf",
        nargs="?",
        help="the file to write (not needed with --dry-run and --measure-sparsity)",
    )
    completed(out, ".gguf")
    matrices = parser.add_argument("--type", help=f"format of the matrices: {', '.join(TYPES)} (default f16)")
    head = parser.add_argument(
        "--output-type", metavar="TYPE", help="format of the output head (default: q6_k or better)"
    )
    for action in (matrices, head):
        chosen_from(action, TYPES)
    layout = (
        "`sparse`: smaller, for sparse CPU runs only; `paged`: so, too, and for --ram-budget (default both; a "
        "PowerInfer file: sparse)"
    )
    parser.add_argument("--layout", choices=LAYOUTS, help=layout)
    parser.add_argument(
        "--ffn-type",
        metavar="RELU",
        help="the activation, where config.json is wrong about it: relu, relu2, drelu or, with its threshold, "
        "fatrelu:0.01",
    )
    parser.add_argument("--list", dest="known", action="store_true", help="print the known models and leave")
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
    parser.add_argument(
        "--measure-sparsity",
        action="store_true",
        help="write no model: run the checkpoint on the calibration text, layer by layer, and print how many neurons "
        "fire",
    )
    add_plot(parser, "with --measure-sparsity: ")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--force", action="store_true", help="replace OUT.gguf if it exists")
    add_json(parser)


def _add_predictor_options(parser: Parser) -> None:
    group = parser.add_argument_group("calibration and predictors")
    group.add_argument(
        "--calibration",
        metavar="FILE",
        help="text to calibrate on (default: one in the package; `none`: leave neurons as they are, without "
        "predictors)",
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


def convert_source(
    source: str | None,
    out: str | None,
    as_json: bool = False,
    known: bool = False,
    measure_sparsity: bool = False,
    plot: Path | None = None,
    **options: Any,
) -> None:
    """Convert a Hugging Face ReLU checkpoint or a PowerInfer file to one GGUF file for lazyneuron."""
    if known:
        _print_catalogue(as_json)
        return
    if measure_sparsity:
        print_measured(source, out, plot, as_json, options)
        return
    if plot is not None:
        raise UserError(
            "--plot: expected --measure-sparsity with it", "of a converted file: python -m runtime sparsity"
        )
    if source is None or (out is None and not options["dry_run"]):
        raise UserError(
            f"{'SOURCE' if source is None else 'OUT.gguf'} is missing", "python -m convert --help lists the options"
        )
    try:
        with progress_bar() as progress:
            report = convert(source, out, **options, progress=progress)
    except (KeyboardInterrupt, SystemExit):
        with suppress(UserError, OSError):
            _note_kept(Path(out or ""))
        raise
    if report.dry_run:
        _print_plan(report)
    _print_summary(report)
    if as_json:
        print_json(report.to_json())


def _note_kept(out: Path) -> None:
    """Say what an interrupted conversion has left for the next one."""
    if n := count_kept(kept_for(place_of(out))):
        note(f"{n} calibrated layer{'s are' if n > 1 else ' is'} kept: the same command goes on with the others")


def _sources() -> list[str]:
    return [*_VERBS, *(known.name for known in catalogue())]


def _print_plan(report: Report) -> None:
    texts = ("tensor", "from", "rewrite", "shape", "type")
    table = new_table(*texts, "bytes", left=texts)
    for tensor in report.plan.tensors:
        origin = _origin(tensor.source)
        kind = tensor.type if tensor.type == tensor.wanted else f"{tensor.type} (for {tensor.wanted})"
        shape = " x ".join(map(str, tensor.shape))
        table.add_row(tensor.name, *origin, shape, kind, f"{tensor.nbytes:,}")
    console(_WIDE).print(table)


def _origin(source: Origin) -> tuple[str, str]:
    """Where a tensor comes from, and what changes it on the way."""
    if isinstance(source, Generated):
        return "config.json", ""
    return ("made here", "") if isinstance(source, MadeTensor) else (source.name, source.rewrite)


def _print_catalogue(as_json: bool) -> None:
    if as_json:
        print(json.dumps([{"name": known.name, **asdict(known)} for known in catalogue()]))
        return
    columns = ("name", "from", "FFN", "sparsity", "status", "licence")
    table = new_table(*columns, left=columns)
    for known in catalogue():
        sparsity = "" if known.sparsity is None else share(known.sparsity, 0)
        table.add_row(known.name, known.repo, known.ffn_kind, sparsity, known.status, known.licence)
    console(_WIDE).print(table)


def _print_summary(report: Report) -> None:
    """Two or three lines for people, on stderr: stdout is for data."""
    types = ", ".join(f"{count} {name}" for name, count in report.types.items())
    verb = "would write" if report.dry_run else "wrote"
    where = f"`{report.path}`: " if report.path else ""
    where += f"{len(report.files)} shards: " if len(report.files) > 1 else ""
    note(f"{where}{verb} {report.bytes:,} bytes, {report.tensors} tensors ({types})")
    if report.verified:
        note(_verdict_line(report.verified))
    if report.ffn_source == "models.toml":
        activation = report.plan.structure.ffn_activation
        note(f"note: FFN type {activation} as models.toml has it, not what config.json says")
    for line in _fallback_lines(report) + [f"note: {text}" for text in report.notes]:
        note(line)


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
