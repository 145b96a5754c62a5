"""`python -m convert push`: a converted file to the Hugging Face Hub, with its card."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from convert.commands.card import add_card_options
from convert.publish.card import CardOptions
from convert.publish.push import DEFAULT_SHARD, push_model
from runtime.cli.options import add_json
from runtime.cli.output import note, print_json
from runtime.cli.parser import Parser


def configure_parser(parser: Parser) -> None:
    """Options of `push`."""
    parser.add_argument("file", metavar="OUT.gguf", type=Path, help="a file made by `python -m convert`")
    parser.add_argument("repo", metavar="USER/REPO", help="where to; it is made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="a branch, made if it does not exist (main)")
    parser.add_argument(
        "--split-max-size", default=DEFAULT_SHARD, metavar="SIZE", help=f"send larger files as shards ({DEFAULT_SHARD})"
    )
    parser.add_argument("--replace-card", action="store_true", help="even one that was changed by hand")
    add_card_options(parser)
    add_json(parser)


def push(
    file: Path,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    split_max_size: str = DEFAULT_SHARD,
    replace_card: bool = False,
    as_json: bool = False,
    **options: Any,
) -> None:
    """Send a converted file to the Hub, with a model card.

    Sent again after an interrupt, it goes on with what is missing.
    """
    done = push_model(file, repo, CardOptions(**options), private, revision, split_max_size, replace_card, note)
    sent = sum(entry.size for entry in done.files)
    note(f"{done.commit.url}: {len(done.files)} GGUF files, {sent:,} bytes; use it as {done.name}")
    if as_json:
        files = [asdict(entry) for entry in done.files]
        print_json({"model": done.name, "commit": done.commit.oid, "url": done.commit.url, "files": files})
