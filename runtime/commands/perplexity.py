"""`python -m runtime perplexity`: how well a model predicts a text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from runtime.analysis.perplexity import DEFAULT_WINDOW, Perplexity, measure_perplexity
from runtime.base.text_file import read_text
from runtime.cli.options import add_json, add_model, count
from runtime.cli.output import print_json
from runtime.cli.parser import Parser
from runtime.cli.progress import progress_bar
from runtime.cli.running import add_loading, open_noted
from runtime.options import RunOptions


def configure_parser(parser: Parser) -> None:
    """Options of `perplexity`."""
    add_model(parser)
    parser.add_argument("file", metavar="FILE", type=Path, help="a UTF-8 text")
    parser.add_argument(
        "--window", type=count, metavar="N", help=f"tokens seen at once (the context, <= {DEFAULT_WINDOW})"
    )
    parser.add_argument("--stride", type=count, metavar="N", help="tokens counted in each window (half of the window)")
    parser.add_argument("--tokens", type=count, metavar="N", help="use only the first N tokens of the text")
    add_loading(parser)
    add_json(parser)


def perplexity(
    model: Path,
    file: Path,
    window: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    run: RunOptions | None = None,
    as_json: bool = False,
) -> None:
    """Print the perplexity of a text, with the window and stride it was measured with."""
    text = read_text(file)  # one that cannot be read is noticed before the model is loaded
    with open_noted(model, run or RunOptions()) as loaded, progress_bar() as progress:
        found = measure_perplexity(loaded, text, window, stride, tokens, progress)
    if as_json:
        print_json(asdict(found))
    else:
        print(_line(found))


def _line(found: Perplexity) -> str:
    return (
        f"perplexity {found.perplexity:.4f} ± {found.perplexity_error:.4f} over {found.tokens} tokens"
        f" (window {found.window}, stride {found.stride}, {found.ffn}, KV {found.kv_type})"
    )
