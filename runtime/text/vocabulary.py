"""Checks a file's vocabulary before libllama reads it: its loader ends the process where it finds what it did not
expect.

Knows GGUF's keys of tokenizers and what libllama's loader and tokenizers assert; calls nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from runtime.errors import UserError
from runtime.model_file.structure import ARCHITECTURE
from runtime.text.text_rules import KEYS

MODELS = ("llama", "gpt2")  # SentencePiece BPE and byte-level BPE: those that conversions write
END_IDS = f"{KEYS}.end_token_ids"
SPECIAL_TOKENS = (
    "lazyneuron.chat_template.special_tokens"  # a JSON object: what chat templates may name, beside bos and eos
)
_HINT = "the file is damaged or incomplete: download it or convert the checkpoint again"
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def check_vocabulary(metadata: Mapping[str, Any], where: str) -> None:
    """Raise UserError where the vocabulary in a file with these keys (see `GgufFile`) is missing or damaged; where:
    names the file.
    """
    problem = next(_problems(metadata), None)
    if problem:
        raise UserError(f"{where}: {problem}", _HINT)


def _problems(metadata: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong, the first first; each test relies on those before it."""
    model, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if model not in MODELS:
        found = "no `tokenizer.ggml.model`" if model is None else f"the kind `{model}`"
        yield f"its vocabulary has {found}, expected one of {', '.join(MODELS)}"
    if not isinstance(tokens, list) or not tokens:
        yield "no tokens in its vocabulary"
    elif (rows := metadata.get(f"{ARCHITECTURE}.vocab_size", len(tokens))) != len(tokens):
        yield f"{len(tokens)} tokens in its vocabulary, expected {rows}, one for each row of the embeddings"
    else:
        yield from _duplicates(tokens)
        yield from _arrays(metadata, model, len(tokens))
        yield from _ids(metadata, len(tokens))
        if model == "llama" and not set(tokens) >= _BYTES:
            missing = min(_BYTES - set(tokens))
            yield f"its vocabulary has no token `{missing}`, expected one for each of the 256 bytes"


def _duplicates(tokens: list[str]) -> Iterator[str]:
    if len(set(tokens)) == len(tokens) and "" not in tokens:
        return
    seen: dict[str, int] = {}
    named = (text or f"[EMPTY_{i}]" for i, text in enumerate(tokens))  # libllama's name for those without
    for i, text in enumerate(named):
        if text in seen:
            yield f"tokens {seen[text]} and {i} of its vocabulary are both {text!r}, expected different texts"
            return
        seen[text] = i


def _arrays(metadata: Mapping[str, Any], model: Any, n: int) -> Iterator[str]:
    needed = {"llama": ("scores", "token_type"), "gpt2": ("merges", "token_type")}[model]
    for name in ("scores", "token_type", "merges"):
        found = metadata.get(f"tokenizer.ggml.{name}")
        if found is None:
            if name in needed:
                yield f"its vocabulary has no `tokenizer.ggml.{name}`"
            continue
        kind, what = (list, "texts") if name == "merges" else (np.ndarray, "numbers")
        if not isinstance(found, kind):
            yield f"`tokenizer.ggml.{name}` of its vocabulary holds no {what}"
        elif name != "merges" and len(found) != n:
            yield (
                f"{len(found)} values in `tokenizer.ggml.{name}` of its vocabulary, expected one for each of {n} tokens"
            )
        elif name == "scores" and np.isnan(found).any():
            yield "a score of its vocabulary is no number"
        elif name == "merges" and (broken := next((m for m in found if " " not in m[1:-1]), None)) is not None:
            yield f"the merge {broken!r} of its vocabulary has no two parts"


def _ids(metadata: Mapping[str, Any], n: int) -> Iterator[str]:
    for key, value in metadata.items():
        if key.startswith(("tokenizer.ggml.", KEYS)) and key.endswith(("_token_id", "_token_ids")):
            ids = np.atleast_1d(np.asarray(value))
            if ids.dtype.kind not in "iu" and ids.size:
                yield f"`{key}` is {value!r}, expected ids of tokens"
            elif ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < n):
                yield f"`{key}` is {value}, expected 0 to {n - 1}, the tokens of its vocabulary"
