"""Calibration text as windows of token ids: which corpus, cut and chosen the same way for a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime.base.text_file import TextFile, read_text
from runtime.errors import UserError
from runtime.text.tokenizer import Tokenizer

DEFAULT_CORPUS = Path(__file__).parent / "calibration.txt"
LONGEST_WINDOW = 512
FEWEST_TOKENS = 512
_FEWEST_WINDOWS = 20  # enough to be shared out to fit, validation and test

Ids = npt.NDArray[np.int32]


def read_corpus(path: Path | None) -> TextFile:
    """Read a calibration text, None for the one that comes with the package.

    Raises UserError when it is empty or not UTF-8.
    """
    corpus = read_text(path or DEFAULT_CORPUS)
    if not corpus.text.strip():
        raise UserError(
            f"`{path}`: empty, expected a calibration text", "give some 100 kB of the language you will use"
        )
    return corpus


def window_length(tokens: int, context: int) -> int:
    """Tokens per window: up to 512, less where the context or the number of tokens is small."""
    return min(context, LONGEST_WINDOW, max(16, tokens // _FEWEST_WINDOWS))


def encode(corpus: TextFile, tokenizer: Tokenizer) -> tuple[Ids, list[int]]:
    """The text's ids, without BOS; and what goes before each window: BOS, where the tokenizer adds one."""
    bos = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
    return np.array(tokenizer.encode(corpus.text, add_special=False, parse_special=False), np.int32), bos


def cut(ids: Ids, bos: list[int], length: int) -> Ids:
    """All whole windows of a text, one after the other, int32 [n_windows, length], `bos` before each."""
    body = length - len(bos)
    pieces = ids[: len(ids) // body * body].reshape(-1, body)
    starts = np.tile(np.array(bos, np.int32), (len(pieces), 1))
    return np.ascontiguousarray(np.concatenate([starts, pieces], axis=1))


def windows(corpus: TextFile, tokenizer: Tokenizer, tokens: int, context: int, seed: int) -> Ids:
    """Windows to calibrate on, int32 [n_windows, length], about `tokens` in all.

    The text is cut from end to end; which pieces are taken, and in what order, is drawn with `seed`.
    Raises UserError when there are fewer tokens than asked for.
    """
    if tokens < FEWEST_TOKENS:
        raise UserError(f"{tokens} calibration tokens, expected at least {FEWEST_TOKENS}")
    length = window_length(tokens, context)
    ids, bos = encode(corpus, tokenizer)
    n = tokens // length
    if len(ids) < n * (length - len(bos)):
        less = f", or ask for less: --calibration-tokens {len(ids)}" if len(ids) >= FEWEST_TOKENS else ""
        raise UserError(
            f"`{corpus.name}`: {len(ids)} tokens of calibration text, expected at least {n * (length - len(bos))}",
            f"give a longer text{less}",
        )
    pieces = cut(ids, bos, length)
    return pieces[np.random.default_rng(seed).permutation(len(pieces))[:n]]
