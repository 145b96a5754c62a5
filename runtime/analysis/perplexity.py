"""How well a model predicts a text, in overlapping windows.

Every token of the text but the first is predicted exactly once, each but those of the first window with at least
`window - stride` tokens of context (Hugging Face's "strided" perplexity).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime.analysis.likelihood import LARGEST_EXPONENT, token_losses
from runtime.base.progress import Progress, silent
from runtime.base.text_file import TextFile
from runtime.errors import UserError
from runtime.model import Model

DEFAULT_WINDOW = 1024


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a text, its standard error, and how it was measured. nll: mean loss per token, in nats.

    tokens: how many were predicted; window and stride: in tokens; bos: whether one began each window.
    """

    perplexity: float
    perplexity_error: float
    nll: float
    tokens: int
    window: int
    stride: int
    bos: bool
    ffn: str
    kv_type: str
    threads: int
    model: str
    file: str
    seconds: float


@dataclass(frozen=True)
class Windows:
    """A text's ids, and how windows are laid over them. window counts the BOS that is put before each, if any."""

    ids: Sequence[int]
    bos: tuple[int, ...]
    window: int
    stride: int

    def __iter__(self) -> Iterator[tuple[list[int], int]]:
        """Each window's ids, and how many of its last tokens are counted there."""
        body = self.window - len(self.bos)
        counted = 1  # the first token has nothing before it
        end = min(body, len(self.ids))
        while True:
            yield [*self.bos, *self.ids[max(0, end - body) : end]], end - counted
            if end == len(self.ids):
                return
            counted, end = end, min(end + self.stride, len(self.ids))


def measure_perplexity(
    model: Model,
    text: TextFile,
    window: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    progress: Progress = silent,
) -> Perplexity:
    """The perplexity of a text under a loaded model.

    window: tokens seen at once (the context, at most 1024); stride: tokens counted in each (half of the window);
    tokens: how many of the text are used (all). progress is told counted tokens, with the perplexity so far.
    Raises UserError for a text of fewer than two tokens, windows out of range, and logits that are not numbers.
    """
    started = time.perf_counter()
    windows = _windows(model, text.path, model.tokenize(text.text, add_special=False)[:tokens], window, stride)
    losses = np.concatenate(list(_measured(model, windows, progress)))
    mean = float(losses.mean())
    if not math.isfinite(mean):
        raise UserError(
            f"`{model.path}`: the model's logits are not numbers", "its weights are damaged: convert it again"
        )
    value = math.exp(min(mean, LARGEST_EXPONENT))
    return Perplexity(
        perplexity=value,
        perplexity_error=value * float(losses.std()) / math.sqrt(len(losses)),
        nll=mean,
        tokens=len(losses),
        window=windows.window,
        stride=windows.stride,
        bos=bool(windows.bos),
        ffn=model.ffn,
        kv_type=model.kv_type,
        threads=model.threads,
        model=str(model.path),
        file=str(text.path),
        seconds=time.perf_counter() - started,
    )


def _windows(model: Model, file: Path, ids: Sequence[int], window: int | None, stride: int | None) -> Windows:
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
    return Windows(ids, bos, window, stride)


def _measured(model: Model, windows: Windows, progress: Progress) -> Iterator[npt.NDArray[np.float64]]:
    """Losses of the counted tokens, window by window."""
    total, n = 0.0, 0
    progress("perplexity", 0, len(windows.ids) - 1)
    for ids, counted in windows:
        losses = token_losses(model.logits(ids)[-counted - 1 : -1], ids[-counted:])
        total, n = total + float(losses.sum()), n + counted
        so_far = math.exp(min(total / n, LARGEST_EXPONENT))
        progress(f"perplexity {so_far:.3f}", n, len(windows.ids) - 1)
        yield losses
