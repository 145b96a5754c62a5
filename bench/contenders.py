"""The contenders of a race, each in a process of its own: llama.cpp, and our modes. All get the same ids to compute, whatever they would have said themselves.

`open` is timed, so whatever a contender imports is imported when it is made.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import runtime
from runtime.engine import FFN_MODES
from runtime.logs import silence

LLAMA_CPP = "llama_cpp"
BATCH = 512  # tokens of a prompt computed at once, by every contender


class Contender(Protocol):
    """One way to run one model."""

    def open(self) -> None:
        """Load the model."""

    def start(self, ids: Sequence[int]) -> None:
        """Forget the context and compute `ids`, as a prompt: the last one's logits are wanted."""

    def step(self, token: int) -> None:
        """Compute one more token and its logits."""

    def facts(self) -> dict[str, Any]:
        """What is known of the tokens since `start`."""

    def close(self) -> None:
        """Free the model."""


class Ours:
    """Our runtime in one FFN mode."""

    def __init__(self, path: Path, ffn: str, threads: int, n_ctx: int) -> None:
        self._path, self._ffn, self._threads, self._n_ctx = path, ffn, threads, n_ctx
        self._ids: list[int] = []

    def open(self) -> None:
        """Load the model."""
        self._model = runtime.load(self._path, ffn=self._ffn, threads=self._threads, n_ctx=self._n_ctx, n_batch=BATCH)
        self._engine = self._model._engine

    def start(self, ids: Sequence[int]) -> None:
        """Forget the context and compute `ids` as a prompt."""
        self._engine.reset()
        self._ids = list(ids)
        self._engine.logits(self._ids, 1).argmax()
        self._engine.reset_counts()

    def step(self, token: int) -> None:
        """Compute one more token."""
        self._ids.append(token)
        self._engine.logits(self._ids, 1).argmax()

    def facts(self) -> dict[str, Any]:
        """Shares of neurons per block since `start`."""
        return {"fired": self._engine.layer_shares(), "gates": self._engine.gate_shares()}

    def close(self) -> None:
        """Free the model."""
        self._model.close()


class LlamaCpp:
    """llama.cpp through llama-cpp-python with its own best settings: mapped, repacked, flash attention."""

    def __init__(self, path: Path, threads: int, n_ctx: int) -> None:
        import llama_cpp  # noqa: PLC0415  (its import is slow, and no other contender needs it)

        self._lib, self._path, self._threads, self._n_ctx = llama_cpp, path, threads, n_ctx
        silence()

    def open(self) -> None:
        """Load the model."""
        self._llm = self._lib.Llama(
            str(self._path), n_ctx=self._n_ctx, n_batch=BATCH, n_ubatch=BATCH, n_threads=self._threads,
            n_threads_batch=self._threads, flash_attn=True, use_mmap=True, verbose=False,
        )  # fmt: skip
        assert self._llm.model_params.use_extra_bufts  # repacked weights

    def start(self, ids: Sequence[int]) -> None:
        """Forget the context and compute `ids` as a prompt."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._llm.ctx), True)
        for at in range(0, len(ids), BATCH):
            self._compute(ids[at : at + BATCH])

    def step(self, token: int) -> None:
        """Compute one more token."""
        self._compute([token])

    def _compute(self, ids: Sequence[int]) -> None:
        tokens = (self._lib.llama_token * len(ids))(*ids)  # the batch only points to it
        if self._lib.llama_decode(self._llm.ctx, self._lib.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        logits = self._lib.llama_get_logits_ith(self._llm.ctx, -1)
        np.ctypeslib.as_array(logits, (self._llm.n_vocab(),)).argmax()

    def facts(self) -> dict[str, Any]:
        """Nothing: every neuron, always."""
        return {}

    def close(self) -> None:
        """Free the model."""
        self._llm.close()


def make(kind: str, path: Path, threads: int, n_ctx: int) -> Contender:
    """The contender named `kind`: LLAMA_CPP or one of our modes."""
    if kind in FFN_MODES:
        return Ours(path, kind, threads, n_ctx)
    assert kind == LLAMA_CPP, kind
    return LlamaCpp(path, threads, n_ctx)


def timed_open(contender: Contender, ids: Sequence[int]) -> dict[str, float]:
    """Load and answer: seconds until the model is loaded, and until the logits after `ids` are there."""
    begin = time.perf_counter()
    contender.open()
    loaded = time.perf_counter()
    contender.start(ids)
    return {"load_s": loaded - begin, "first_token_s": time.perf_counter() - begin}


def timed_prompt(contender: Contender, ids: Sequence[int]) -> float:
    """Seconds that a prompt takes."""
    begin = time.perf_counter()
    contender.start(ids)
    return time.perf_counter() - begin


def timed_decode(contender: Contender, prompt: Sequence[int], ids: Sequence[int]) -> float:
    """Seconds that the tokens `ids` take one by one, after a prompt that is not counted."""
    contender.start(prompt)
    begin = time.perf_counter()
    for token in ids:
        contender.step(token)
    return time.perf_counter() - begin
