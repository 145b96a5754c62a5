"""`python -m runtime complete`: continue one prompt, print the continuation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from runtime.base.text_file import decoded, without_line_end
from runtime.cli.options import add_json, add_model, add_prompt, given_prompt
from runtime.cli.output import cleaner, print_json, stream
from runtime.cli.parser import Parser
from runtime.cli.running import add_loading, add_sampling, open_noted
from runtime.commands.footer import paged_figures, print_footer
from runtime.errors import UserError
from runtime.generation import Generation
from runtime.model import Model
from runtime.options import RunOptions
from runtime.text.sampling import Sampling

DEFAULT_MAX_TOKENS = 256


def configure_parser(parser: Parser) -> None:
    """Options of `complete`."""
    add_model(parser)
    add_prompt(parser, "default: read from stdin")
    add_sampling(parser, f"{DEFAULT_MAX_TOKENS}")
    add_loading(parser)
    add_json(parser)


def complete(
    model: Path,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    max_tokens: int | None = None,
    sampling: Sampling | None = None,
    run: RunOptions | None = None,
    as_json: bool = False,
) -> None:
    """Print the continuation of a prompt (`prompt`, else `prompt_file`, else stdin), or one JSON object about it."""
    text = given_prompt(prompt, prompt_file)
    text = _piped() if text is None else text
    sampling = (sampling or Sampling()).seeded()
    with open_noted(model, run or RunOptions()) as loaded:
        with loaded.generate(text, max_tokens or DEFAULT_MAX_TOKENS, sampling) as generation:
            _show(generation, as_json)
        if as_json:
            print_json(_result(loaded, generation))
        elif sys.stderr.isatty():
            print_footer(generation.stats, generation.stop_reason)


def _piped() -> str:
    if sys.stdin.isatty():
        raise UserError("no prompt", "give one with -p TEXT or --prompt-file FILE, or pipe it in")
    return without_line_end(decoded(sys.stdin.buffer.read(), "stdin"))


def _show(generation: Generation, as_json: bool) -> None:
    if as_json:
        for _ in generation:
            pass
        return
    clean = cleaner(sys.stdout)

    def write(piece: str) -> None:
        sys.stdout.write(clean(piece))
        sys.stdout.flush()

    stream(generation, write)


def _result(model: Model, generation: Generation) -> dict[str, Any]:
    stats = generation.stats
    return {
        "text": generation.text,
        "tokens": stats.tokens,
        "tokens_per_s": stats.tokens_per_s,
        "computed_share": stats.computed_share,
        "layer_shares": stats.layer_shares,
        "bytes_per_token": stats.bytes_per_token,
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "prompt_tokens": stats.prompt_tokens,
        "prompt_tokens_per_s": stats.prompt_tokens_per_s,
        "stop_reason": generation.stop_reason,
        "seed": generation.seed,
        "ffn": model.ffn,
        "threads": model.threads,
        "n_ctx": model.n_ctx,
        "kv_type": model.kv_type,
        "paged": paged_figures(model),
    }
