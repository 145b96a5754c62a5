"""Options that several commands share, each with what becomes of it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from runtime.base.atomic import check_target
from runtime.base.text_file import decoded, read_text, without_line_end
from runtime.cli.completion import completed
from runtime.cli.parser import Parser
from runtime.hub.locate import locate


def add_model(parser: Parser) -> None:
    """MODEL, the file that every command takes, or its name on the Hub."""
    completed(
        parser.add_argument(
            "model", metavar="MODEL", help="a GGUF file made by `python -m convert`, or user/repo on the Hub"
        ),
        ".gguf",
    )
    parser.then(lambda options: options | {"model": locate(options["model"])})


def add_prompt(parser: Parser, default: str) -> None:
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


def add_json(parser: Parser) -> None:
    """--json."""
    parser.add_argument(
        "--json", dest="as_json", action="store_true", help="print the results as one JSON object, last line of stdout"
    )


def writes(parser: Parser, *names: str) -> None:
    """Say that the options `names` are files to be written: whether they can be is checked before anything is
    fetched.
    """

    def check(options: dict[str, Any]) -> dict[str, Any]:
        for name in names:
            if options[name] is not None:
                check_target(options[name], 0, options.get("force", True))
        return options

    parser.then(check)


def count(text: str) -> int:
    """A positive number, as an argparse type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}, expected 1 or more")
    return number
