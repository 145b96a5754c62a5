"""Text generation: a prompt's ids in, pieces of text out, with the figures of the run.

Knows the engine, the tokenizer and the sampler; knows nothing of terminals.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import numpy.typing as npt

from runtime.engine import Engine
from runtime.errors import UserError
from runtime.gguf_file import GgufFile
from runtime.sampling import Sampler, Sampling
from runtime.tokenizer import Tokenizer
from runtime.traffic import Activity, bytes_per_token, kv_bytes


@dataclass
class Stats:
    """Figures of one generation; times in seconds, shares from 0 to 1."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, reused from the sequence before
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    layer_shares: list[float] = field(default_factory=list)  # of the neurons computed while decoding
    gate_shares: list[float] = field(default_factory=list)  # of the neurons whose gate rows were read
    bytes_per_token: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed: tokens after the first, which belongs to the prompt, per second."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds else 0.0

    @property
    def prompt_tokens_per_s(self) -> float:
        """Prompt speed, cached tokens not counted."""
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def computed_share(self) -> float:
        """Share of the FFN neurons computed, over all layers."""
        return sum(self.layer_shares) / len(self.layer_shares) if self.layer_shares else 0.0


class Generation:
    """An iterator over pieces of text. `stop_reason` is "eos", "length", "stop" or "context" at the end, None before.

    Stopping early is `close()`: what was generated stays in `text` and `token_ids`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        file: GgufFile,
        prompt: Sequence[int],
        max_tokens: int | None,
        sampling: Sampling,
        stop: Sequence[str],
        cache_prompt: bool,
    ) -> None:
        if not prompt:
            raise UserError("the prompt has no tokens", "give some text: this model has no start token of its own")
        if len(prompt) >= engine.options.n_ctx:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, expected fewer than the context of {engine.options.n_ctx}",
                "shorten it, or raise --n-ctx if the model allows",
            )
        self.token_ids: list[int] = []
        self.text = ""
        self.stop_reason: str | None = None
        self.stats = Stats(prompt_tokens=len(prompt))
        self._engine, self._tokenizer, self._file, self._prompt = engine, tokenizer, file, list(prompt)
        self._max_tokens, self._stop, self._cache_prompt = max_tokens, tuple(stop), cache_prompt
        self._sampler = Sampler(sampling, engine.structure.vocab_size)
        self.seed = self._sampler.seed
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating."""
        self._pieces.close()
        self._sampler.close()

    def _run(self) -> Generator[str, None, None]:
        emitted = 0
        try:
            for text, final in self._texts():
                self.text, end = self._cut(text, final)
                if end > emitted:
                    yield self.text[emitted:end]
                    emitted = end
                if self.stop_reason:
                    break
        finally:
            self._measure()
            self._sampler.close()

    def _texts(self) -> Iterator[tuple[str, bool]]:
        """The whole text so far after each token, and whether it is complete."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = ""
        for token in self._tokens():
            text += decoder.decode(self._tokenizer.token_bytes(token))
            yield text, False
        yield text + decoder.decode(b"", final=True), True

    def _cut(self, text: str, final: bool) -> tuple[str, int]:
        """Cut at a stop string; returns the text and how much of it cannot become part of one any more."""
        for stop in self._stop:
            at = text.find(stop)
            if at >= 0:
                self.stop_reason = "stop"
                return text[:at], at
        held = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        return text, len(text) - held

    def _tokens(self) -> Iterator[int]:
        ids = self._prompt
        if not self._cache_prompt:
            self._engine.reset()
        logits = self._prefill(ids)
        self._engine.reset_counts()
        started = time.perf_counter()
        while True:
            if self._max_tokens is not None and len(self.token_ids) >= self._max_tokens:
                self.stop_reason = "length"
                return
            token = self._sampler.sample(logits[0])
            if self._tokenizer.is_eog(token):
                self.stop_reason = "eos"
                return
            self.token_ids.append(token)
            self.stats.tokens, self.stats.seconds = len(self.token_ids), time.perf_counter() - started
            yield token
            ids = [*self._prompt, *self.token_ids]
            if len(ids) >= self._engine.options.n_ctx:
                self.stop_reason = "context"
                return
            logits = self._engine.logits(ids, n_outputs=1)

    def _prefill(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Compute the prompt; float32 [1, n_vocab] after its last token."""
        started = time.perf_counter()
        reused = self._engine.reusable(ids)
        logits = self._engine.logits(ids, n_outputs=1)
        self.stats.cached_tokens = reused
        self.stats.prompt_seconds = time.perf_counter() - started
        return logits

    def _measure(self) -> None:
        stats, engine = self.stats, self._engine
        stats.layer_shares, stats.gate_shares = engine.layer_shares(), engine.gate_shares()
        positions = stats.prompt_tokens + (stats.tokens + 1) / 2
        element = 2 if engine.options.kv_type == "f16" else 4
        activity = Activity(engine.options.ffn, stats.layer_shares, stats.gate_shares)
        keys_and_values = kv_bytes(engine.structure, positions, element)
        stats.bytes_per_token = bytes_per_token(engine.structure, self._file.tensors, activity, keys_and_values).total


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
