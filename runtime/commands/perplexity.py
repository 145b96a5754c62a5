"""`python -m runtime perplexity`: how well a model predicts a text, in overlapping windows.

Every token of the text but the first is predicted exactly once, each but those of the first window with at least
`window - stride` tokens of context (Hugging Face's "strided" perplexity).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from runtime.base.text_file import TextFile, read_text
from runtime.cli.options import add_json, add_loading, add_model, count, open_noted, print_json
from runtime.errors import UserError
from runtime.model import Model
from runtime.options import RunOptions

HELP = "measure how well a model predicts a text"
DEFAULT_WINDOW = 1024
_ROWS = 64  # float64 copies of the logits are made for this many positions at a time


def configure_parser(parser: argparse.ArgumentParser) -> None:
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
    with open_noted(model, run or RunOptions()) as loaded:
        result = measure(loaded, text, window, stride, tokens)
    if as_json:
        print_json(result)
    else:
        print(_line(result))


def measure(
    model: Model, text: TextFile, window: int | None = None, stride: int | None = None, tokens: int | None = None
) -> dict[str, Any]:
    """The perplexity of a text under a loaded model, with how it was measured: what --json prints."""
    plan = _plan(model, text.path, model.tokenize(text.text, add_special=False)[:tokens], window, stride)
    started = time.perf_counter()
    losses = np.concatenate(list(_measured(model, plan)))
    return _result(model, text.path, plan, losses) | {"seconds": time.perf_counter() - started}


@dataclass(frozen=True)
class Plan:
    """A text's ids, and how windows are laid over them. window counts the BOS that is put before each, if any."""

    ids: Sequence[int]
    bos: tuple[int, ...]
    window: int
    stride: int

    def windows(self) -> Iterator[tuple[list[int], int]]:
        """Each window's ids, and how many of its last tokens are counted there."""
        body = self.window - len(self.bos)
        counted = 1  # the first token has nothing before it
        end = min(body, len(self.ids))
        while True:
            yield [*self.bos, *self.ids[max(0, end - body) : end]], end - counted
            if end == len(self.ids):
                return
            counted, end = end, min(end + self.stride, len(self.ids))


def _plan(model: Model, file: Path, ids: Sequence[int], window: int | None, stride: int | None) -> Plan:
    window = min(model.n_ctx, DEFAULT_WINDOW) if window is None else window
    stride = window // 2 if stride is None else stride
    tokenizer = model.tokenizer
    bos = (tokenizer.bos,) if tokenizer.add_bos and tokenizer.bos is not None else ()
    if not 3 <= window <= model.n_ctx:
        raise UserError(f"window {window}, expected 3 to the context of {model.n_ctx}")
    if not 1 <= stride < window:
        raise UserError(f"stride {stride}, expected 1 to {window - 1}, less than the window")
    if len(ids) < 2:
        raise UserError(f"`{file}`: {len(ids)} tokens, expected 2 or more")
    return Plan(ids, bos, window, stride)


def _measured(model: Model, plan: Plan) -> Iterator[npt.NDArray[np.float64]]:
    """Negative log-likelihoods of the counted tokens, window by window, with progress on a terminal's stderr."""
    console = Console(stderr=True)
    columns = (TextColumn("perplexity"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[so_far]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(plan.ids) - 1, so_far="")
        total, n = 0.0, 0
        for ids, counted in plan.windows():
            losses = token_losses(model.logits(ids)[-counted - 1 : -1], ids[-counted:])
            total, n = total + float(losses.sum()), n + counted
            progress.update(task, advance=counted, so_far=f"{math.exp(min(total / n, 700)):.3f}")
            yield losses


def token_losses(logits: npt.NDArray[np.float32], ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """Negative log-likelihood of each of `ids` under its row of `logits` [len(ids), n_vocab], in float64 nats."""
    losses = np.empty(len(ids))
    for start in range(0, len(ids), _ROWS):
        part = slice(start, start + _ROWS)
        rows = logits[part].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        likelihood = rows[np.arange(len(rows)), np.asarray(ids[part])]
        losses[part] = np.log(np.exp(rows).sum(axis=1)) - likelihood
    return losses


def _result(model: Model, file: Path, plan: Plan, losses: npt.NDArray[np.float64]) -> dict[str, Any]:
    mean = float(losses.mean())
    if not math.isfinite(mean):
        raise UserError(
            f"`{model.path}`: the model's logits are not numbers", "its weights are damaged: convert it again"
        )
    value = math.exp(min(mean, 700))
    return {
        "perplexity": value,
        "perplexity_error": value * float(losses.std()) / math.sqrt(len(losses)),
        "nll": mean,
        "tokens": len(losses),
        "window": plan.window,
        "stride": plan.stride,
        "bos": bool(plan.bos),
        "ffn": model.ffn,
        "kv_type": model.kv_type,
        "threads": model.threads,
        "model": str(model.path),
        "file": str(file),
    }


def _line(result: dict[str, Any]) -> str:
    return (
        f"perplexity {result['perplexity']:.4f} ± {result['perplexity_error']:.4f} over {result['tokens']} tokens"
        f" (window {result['window']}, stride {result['stride']}, {result['ffn']}, KV {result['kv_type']})"
    )
