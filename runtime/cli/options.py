"""Options that several commands share, and what every command does with its results.

Knows argparse and the terminal's two streams; knows nothing of models.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TextIO

from runtime.base.atomic import check_target, new_path
from runtime.base.closing import Handles
from runtime.base.cpu_quota import cpu_quota
from runtime.base.processors import PRIORITIES, parse_cpus
from runtime.base.text_file import decoded, read_text, without_line_end
from runtime.cli.completion import completed
from runtime.cli.help import HelpParser
from runtime.errors import UserError, printable
from runtime.hub.locate import locate
from runtime.hybrid.choose import Arrangement
from runtime.model import Model, open_model
from runtime.options import AUTO, FFN_MODES, KV_TYPES, RunOptions
from runtime.text.sampling import Sampling


class Parser(HelpParser):
    """argparse, but for a wrong option raising UserError like every other mistake."""

    def error(self, message: str) -> NoReturn:
        """Report a wrong command line."""
        self._refuse(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse's; a command reports options that it does not know by itself, not through the command line above it."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            option = unknown[0].partition("=")[0]
            similar = did_you_mean(option, self._option_string_actions) if option.startswith("-") else ""
            self._refuse(f"unrecognized arguments: {' '.join(unknown)}", similar)
        return found, unknown

    def _refuse(self, message: str, hint: str = "") -> NoReturn:
        raise UserError(message, f"{hint}{self.prog} --help lists the options")


def check_verb(word: str, verbs: Sequence[str], prog: str) -> None:
    """Raise UserError when `word`, the first of a command line, is neither an option nor one of the commands."""
    if not word.startswith("-") and word not in verbs:
        raise UserError(f"unknown command `{word}`", f"{did_you_mean(word, verbs)}`{prog}` lists the commands")


def open_noted(path: Path, options: RunOptions) -> Model:
    """The model `path`, run so, with notes for people on stderr. Raises UserError as `runtime.load` does."""
    quota = cpu_quota()
    if options.threads and options.threads > max(1, quota):
        note(f"note: {options.threads} threads, on a CPU quota of {quota:g} processors: fewer are faster")
    with Handles() as handles:
        model = handles.enter_context(open_model(path, options))
        if model.arrangement:
            note(where(model.arrangement))
        handles.pop_all()
    return model


def where(arrangement: Arrangement) -> str:
    """One line on what is on devices."""
    names = ", ".join(device.name for device in arrangement.devices)
    if not arrangement.used:
        return f"on {names}: nothing, the CPU computes all of it (the budget is too small, or the device would not be faster)"
    residence, placement = arrangement.residence, arrangement.residence.placement
    s = residence.structure
    hot = sum(residence.hot(i) for i in s.ffns) / sum(ffn.n_ff for ffn in s.ffns.values())
    head = ", the output head" if placement.head else ""
    return f"on {names}: attention of {s.block_count - residence.first} of {s.block_count} layers, {hot:.1%} of the neurons{head}; the rest on the CPU"


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL, the file that every command takes, or its name on the Hub."""
    completed(
        parser.add_argument(
            "model", metavar="MODEL", help="a GGUF file made by `python -m convert`, or user/repo on the Hub"
        ),
        ".gguf",
    )


def add_prompt(parser: argparse.ArgumentParser, default: str) -> None:
    """-p and --prompt-file; `default` says what happens without them."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", metavar="TEXT", help=f"the prompt ({default})")
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="a text file with the prompt")


def given_prompt(prompt: str | None, file: Path | None) -> str | None:
    """The text of -p or --prompt-file, without the line end that ends a file; None where neither was given."""
    if file is not None:
        return without_line_end(read_text(file).text)
    return None if prompt is None else typed(prompt, "--prompt")


def typed(value: str, option: str) -> str:
    """An option's text; raises UserError when it was not UTF-8 on the command line."""
    return decoded(os.fsencode(value), option)


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument(
        "--json", dest="as_json", action="store_true", help="print the results as one JSON object, last line of stdout"
    )


# The fields of `RunOptions` that commands offer.
_RUN_OPTIONS = {
    *("ffn", "threads", "n_ctx", "kv_type", "predictor_bias", "cpus", "priority", "device", "vram_budget", "trace"),
}


def add_loading(parser: argparse.ArgumentParser) -> None:
    """How the model is run: the fields of `RunOptions`."""
    group = parser.add_argument_group("running the model")
    group.add_argument(
        "--ffn",
        choices=FFN_MODES,
        help="compute the neurons expected to fire, those that do, or all (predicted where the file has a predictor, else exact)",
    )
    group.add_argument(
        "--predictor-bias",
        type=float,
        default=0.0,
        metavar="X",
        help="compute more neurons (above 0; inf: all that fire) or fewer, in units of the predictor's typical error (0)",
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
        "--trace", type=new_path, metavar="FILE", help="write what was computed when, for Chrome's trace viewer (JSON)"
    )
    group.add_argument("--n-ctx", "-c", type=int, metavar="N", help="context in tokens (default: the model's, <= 8192)")
    group.add_argument("--kv-type", choices=KV_TYPES, default="f16", help="numbers of the KV cache (f16)")


def add_sampling(parser: argparse.ArgumentParser, max_tokens: str) -> None:
    """How the next token is chosen: the fields of `Sampling`, and -n, whose default `max_tokens` describes."""
    default = Sampling()
    group = parser.add_argument_group("choosing tokens")
    group.add_argument("--max-tokens", "-n", type=count, metavar="N", help=f"length of a reply ({max_tokens})")
    for flag, name, kind, text in (
        ("--temp", "temperature", float, "0 takes the likeliest token"),
        ("--top-k", "top_k", int, "keep the K likeliest, 0 all"),
        ("--top-p", "top_p", float, "keep the likeliest tokens with this share of the probability"),
        ("--min-p", "min_p", float, "keep tokens at least this fraction as likely as the likeliest"),
        ("--repeat-penalty", "repeat_penalty", float, "divide the logits of recent tokens, 1 none"),
        ("--repeat-last-n", "repeat_last_n", int, "how many tokens are recent, those of the prompt too; -1 all"),
        ("--seed", "seed", int, "of the random choice"),
    ):
        value = getattr(default, name)
        shown = "a new one" if value is None else value
        group.add_argument(flag, dest=name, type=kind, default=value, metavar="X", help=f"{text} ({shown})")


def arguments_of(options: dict[str, Any]) -> dict[str, Any]:
    """The parsed options as keyword arguments of a command.

    Those of a group become one `sampling` or one `run`, and `model` is located. Before a model is fetched, files to be
    written are known to be writable.
    """
    check_outputs(options)
    options = _grouped(options, "sampling", Sampling, {field.name for field in fields(Sampling)})
    options = _grouped(options, "run", RunOptions, _RUN_OPTIONS)
    return options | ({"model": locate(options["model"])} if "model" in options else {})


def _grouped(options: dict[str, Any], name: str, group: type[Any], names: set[str]) -> dict[str, Any]:
    if not names <= options.keys():
        return options
    value = group(**{key: options[key] for key in names})
    return {key: v for key, v in options.items() if key not in names} | {name: value}


def check_outputs(options: dict[str, Any]) -> None:
    """Raise UserError or OSError where a file that an option names could not be written."""
    for name in ("out", "plot", "trace"):
        if options.get(name) is not None:
            check_target(options[name], 0, options.get("force", True))


def cpus(text: str) -> tuple[int, ...]:
    """A list of processors, as an argparse type."""
    try:
        return parse_cpus(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected processors such as 0-3,6") from None


def count(text: str) -> int:
    """A positive number, as an argparse type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}, expected 1 or more")
    return number


def cleaner(out: TextIO) -> Callable[[str], str]:
    """How a model's text is written to `out`: as it is, but for a terminal, which it could steer."""
    return printable if out.isatty() else str


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The beginning of a hint, "did you mean `chat`? ", or "" where nothing known is similar to `word`."""
    similar = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean `{similar[0]}`? " if similar else ""


def print_json(values: dict[str, Any]) -> None:
    """One JSON object as one line of stdout; what its encoding lacks is escaped."""
    text = json.dumps(values, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # also halves of surrogate pairs, which stand for bytes in names of files
        text = json.dumps(values)
    print(text, flush=True)


def note(text: str) -> None:
    """A line for people: on stderr, because stdout is for data."""
    print(text, file=sys.stderr, flush=True)


def stream(pieces: Iterable[str], write: Callable[[str], object]) -> str:
    """Write pieces as they come, and a newline at the end where they bring none; returns them joined."""
    text = ""
    for piece in pieces:
        text += piece
        write(piece)
    if not text.endswith("\n"):
        write("\n")
    return text
