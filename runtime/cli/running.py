"""How a model is run: the options for it, and the model opened as they say."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runtime.base.atomic import new_path
from runtime.base.closing import Handles
from runtime.base.cpu_quota import cpu_quota
from runtime.base.figures import share
from runtime.base.processors import PRIORITIES, parse_cpus
from runtime.base.sizes import parse_budget
from runtime.cli.options import count, writes
from runtime.cli.output import note
from runtime.cli.parser import Parser
from runtime.hybrid.choose import Arrangement
from runtime.hybrid.tensor_map import CPU
from runtime.model import Model, open_model
from runtime.options import AUTO, FFN_MODES, KV_TYPES, RunOptions
from runtime.text.sampling import Sampling

# The fields of `RunOptions` that commands offer.
_RUN_OPTIONS = {
    *("ffn", "threads", "n_ctx", "kv_type", "predictor_bias", "draft_max", "draft_bias", "lookup"),
    *("cpus", "priority", "device", "vram_budget", "ram_budget", "mmap", "trace", "stages", "stage_timeout"),
}


def add_loading(parser: Parser) -> None:
    """How the model is run: the fields of `RunOptions`, which the command gets as `run`."""
    _grouped(parser, "run", RunOptions, _RUN_OPTIONS)
    writes(parser, "trace")
    group = parser.add_argument_group("running the model")
    group.add_argument(
        "--ffn",
        choices=FFN_MODES,
        help="compute the neurons expected to fire, those that do (verified: the same, drafted by predicted), or all "
        "(predicted where the file has a predictor, else exact)",
    )
    group.add_argument(
        "--predictor-bias",
        type=float,
        default=0.0,
        metavar="X",
        help="compute more neurons (above 0; inf: all that fire) or fewer, "
        "in units of the predictor's typical error (0)",
    )
    group.add_argument(
        "--draft-max",
        type=int,
        default=8,
        metavar="N",
        help="tokens drafted at once by verified or --lookup, at most (8)",
    )
    group.add_argument(
        "--draft-bias", type=float, metavar="X", help="--predictor-bias of verified's drafts (chosen while running)"
    )
    group.add_argument(
        "--lookup", action="store_true", help="draft what followed where the last tokens stood before; changes no token"
    )
    group.add_argument("--threads", "-t", type=int, metavar="N", help="default: one per physical core")
    group.add_argument(
        "--cpus", type=cpus, default=(), metavar="LIST", help="processors to compute on, e.g. 0-3,6 (all)"
    )
    group.add_argument(
        "--priority",
        choices=PRIORITIES,
        default="normal",
        help="of the computing threads (normal; above it needs rights)",
    )
    group.add_argument(
        "--device",
        default=AUTO,
        metavar="NAME[,NAME]",
        help="see `devices`; none: the CPU alone (the first GPU, if any)",
    )
    group.add_argument(
        "--vram-budget", metavar="GIB[,GIB]", help="memory to use on the device, e.g. 6 or 800MiB (what is free)"
    )
    group.add_argument(
        "--ram-budget",
        type=parse_budget,
        metavar="GIB",
        help="main memory for the model, e.g. 4 or 800MiB; neurons that do not fit are read when they fire (no limit)",
    )
    group.add_argument(
        "--mmap",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="leave all weights in the mapped file, or read all into memory (what every token reads whole)",
    )
    group.add_argument(
        "--trace", type=new_path, metavar="FILE", help="write what was computed when, for Chrome's trace viewer (JSON)"
    )
    group.add_argument(
        "--stages",
        type=stages,
        metavar="N",
        help="divide the model among N processes of a Ray cluster; auto: one on each machine (none)",
    )
    group.add_argument(
        "--stage-timeout",
        type=float,
        default=300.0,
        metavar="S",
        help="seconds after which stages that do not answer are begun anew (300)",
    )
    group.add_argument("--n-ctx", "-c", type=int, metavar="N", help="context in tokens (default: the model's, <= 8192)")
    group.add_argument("--kv-type", choices=KV_TYPES, default="f16", help="numbers of the KV cache (f16)")


def add_sampling(parser: Parser, max_tokens: str) -> None:
    """How the next token is chosen: the fields of `Sampling`, which the command gets as `sampling`, and -n, whose
    default `max_tokens` describes.
    """
    default = Sampling()
    _grouped(parser, "sampling", Sampling, (name for _, name, _, _ in _SAMPLING_OPTIONS))
    group = parser.add_argument_group("choosing tokens")
    group.add_argument("--max-tokens", "-n", type=count, metavar="N", help=f"length of a reply ({max_tokens})")
    for flag, name, kind, text in _SAMPLING_OPTIONS:
        value = getattr(default, name)
        shown = "a new one" if value is None else f"{value:g}"
        group.add_argument(flag, dest=name, type=kind, default=value, metavar="X", help=f"{text} ({shown})")


# The fields of `Sampling` that commands offer, under llama.cpp's names.
_SAMPLING_OPTIONS = (
    ("--temp", "temperature", float, "0 takes the likeliest token"),
    ("--top-k", "top_k", int, "keep the K likeliest, 0 all"),
    ("--top-p", "top_p", float, "keep the likeliest tokens with this share of the probability"),
    ("--min-p", "min_p", float, "keep tokens at least this fraction as likely as the likeliest"),
    ("--repeat-penalty", "repeat_penalty", float, "divide the logits of recent tokens, 1 none"),
    ("--repeat-last-n", "repeat_last_n", int, "how many tokens are recent, those of the prompt too; -1 all"),
    ("--frequency-penalty", "frequency_penalty", float, "against generated tokens, by how often they were, 0 none"),
    ("--presence-penalty", "presence_penalty", float, "against generated tokens, 0 none"),
    ("--typical", "typical_p", float, "keep tokens of typical information with this share of the probability, 1 all"),
    ("--top-nsigma", "top_n_sigma", float, "keep tokens within X standard deviations of the best logit, -1 all"),
    ("--xtc-probability", "xtc_probability", float, "how often the likeliest tokens are left out"),
    ("--xtc-threshold", "xtc_threshold", float, "how likely such tokens are at least"),
    ("--dry-multiplier", "dry_multiplier", float, "DRY, against repeated sequences, 0 none"),
    ("--dry-base", "dry_base", float, "DRY: growth with the length of what would be repeated"),
    ("--dry-allowed-length", "dry_allowed_length", int, "DRY: shorter sequences may be repeated"),
    ("--dry-penalty-last-n", "dry_penalty_last_n", int, "DRY: how many tokens count, -1 all"),
    ("--dynatemp-range", "dynatemp_range", float, "let the temperature vary by X with the entropy"),
    ("--dynatemp-exp", "dynatemp_exponent", float, "the power of the entropy in this"),
    ("--mirostat", "mirostat", int, "1 or 2: choose for a steady surprise, without the filters above"),
    ("--mirostat-ent", "mirostat_tau", float, "the surprise aimed at, in bits"),
    ("--mirostat-lr", "mirostat_eta", float, "how fast it is corrected"),
    ("--seed", "seed", int, "of the random choice"),
)


def _grouped(parser: Parser, name: str, group: type[Any], names: Iterable[str]) -> None:
    """Make one argument `name`, a `group`, of the options `names`."""
    wanted = set(names)

    def grouped(options: dict[str, Any]) -> dict[str, Any]:
        value = group(**{key: options[key] for key in wanted})
        return {key: v for key, v in options.items() if key not in wanted} | {name: value}

    parser.then(grouped)


def cpus(text: str) -> tuple[int, ...]:
    """A list of processors, as an argparse type."""
    try:
        return parse_cpus(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected processors such as 0-3,6") from None


def stages(text: str) -> int | str:
    """A number of stages, or auto, as an argparse type."""
    if text == AUTO:
        return text
    try:
        return count(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number, or auto") from None


def open_noted(path: Path, options: RunOptions) -> Model:
    """The model `path`, run so, with notes for people on stderr. Raises UserError as `runtime.load` does."""
    quota = cpu_quota()
    if options.threads and options.threads > max(1, quota):
        note(f"note: {options.threads} threads, on a CPU quota of {quota:g} processors: fewer are faster")
    with Handles() as handles:
        model = handles.enter_context(open_model(path, options))
        if model.arrangement:
            note(where(model.arrangement))
            if model.arrangement.note:
                note(f"note: {model.arrangement.note}")
        if model.memory_note:
            note(f"note: {model.memory_note}")
        handles.pop_all()
    return model


def where(arrangement: Arrangement) -> str:
    """One line on what is on devices."""
    names = ", ".join(device.name for device in arrangement.devices)
    if not arrangement.used:
        why = "the budget is too small, or the device would not be faster"
        return f"on {names}: nothing, the CPU computes all of it ({why})"
    tensor_map, s = arrangement.tensor_map, arrangement.tensor_map.structure
    hot = sum(tensor_map.on_devices) / sum(block.n_reached for block in s.blocks)
    head = ", the output head" if tensor_map.head != CPU else ""
    layers = f"{s.block_count - len(tensor_map.homes(CPU))} of {s.block_count} layers"
    return f"on {names}: attention of {layers}, {share(hot)} of the neurons{head}; the rest on the CPU"
