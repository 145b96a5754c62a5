"""`python -m convert card`: the model card of a converted file, with its figures and its plot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from convert.publish.card import CARD, CardOptions, write_model_card
from convert.publish.card_text import PLOT
from runtime.base.atomic import new_path
from runtime.cli.options import add_json, count
from runtime.cli.output import note, print_json
from runtime.cli.parser import Parser


def configure_parser(parser: Parser) -> None:
    """Options of `card`."""
    parser.add_argument("file", metavar="OUT.gguf", type=Path, help="a file made by `python -m convert`")
    parser.add_argument(
        "-o",
        "--out",
        type=_out,
        metavar="PATH",
        help=f"a folder, or README.md in one; {PLOT} is put beside (default: stdout, no plot)",
    )
    parser.add_argument(
        "--repo", metavar="USER/REPO", help="where it will be, for the commands on the card (default: a file)"
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    add_json(parser)
    add_card_options(parser)


def add_card_options(parser: Parser) -> None:
    """What `card` and `push` share: the fields of `CardOptions`."""
    group = parser.add_argument_group("the model card")
    group.add_argument(
        "--perplexity", type=Path, metavar="TEXT", help="measure it on this text, in every FFN mode (default: left out)"
    )
    group.add_argument("--perplexity-tokens", type=count, metavar="N", help="use only the first N tokens of the text")
    group.add_argument("--threads", "-t", type=count, metavar="N", help="default: one per physical core")
    group.add_argument("--no-plot", dest="plot", action="store_false", help="no drawing (it needs matplotlib)")


def card(
    file: Path,
    out: Path | None = None,
    repo: str | None = None,
    force: bool = False,
    as_json: bool = False,
    **options: Any,
) -> None:
    """Write the model card of a converted file, as `push` would."""
    folder_target = out is not None and (out.is_dir() or not out.suffix)
    path = out / CARD if out and folder_target else out
    written = write_model_card(file, path, repo, force, CardOptions(**options | ({} if path else {"plot": False})))
    if path:
        note(f"`{path}`: written" + (f", with {written.plot.name}" if written.plot else ""))
    if not path and not as_json:
        print(written.text, end="")
    if as_json:
        print_json(
            {
                "card": written.text,
                "path": path and str(path),
                "plot": written.plot and str(written.plot),
                "perplexity": written.perplexity and written.perplexity.as_json(),
            }
        )


def _out(text: str) -> Path:
    """A folder, or a card in one, as an argparse type."""
    return Path(text) / CARD if text.endswith(("/", os.sep)) else new_path(text, CARD)
