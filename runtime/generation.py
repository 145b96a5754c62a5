"""Text generation: a prompt's ids in, pieces of text out, with the figures of the run."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from runtime.base.closing import Closing
from runtime.compute.counters import Counters
from runtime.compute.traffic import Activity, bytes_per_token
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile
from runtime.sequence import CachedSequence
from runtime.speculation import Speculation
from runtime.text.pieces import Pieces
from runtime.text.sampling import Sampler, Sampling
from runtime.text.tokenizer import Tokenizer

Floats = npt.NDArray[np.float32]
LogitsProcessor = Callable[[npt.NDArray[np.int32], Floats], Floats]
"""Ids so far, prompt included, int32 [n], and the logits of the next token, float32 [n_vocab], which it may change;
returns logits of that shape.
"""


@dataclass(frozen=True)
class Token:
    """A token that was chosen. data: its bytes, which need not be whole characters; logprob: natural logarithm of the
    probability that its logits (as processed) give it, before sampling filters.
    """

    id: int
    data: bytes
    logprob: float


@dataclass
class Stats:
    """Figures of one generation, or of several together; times in seconds, shares from 0 to 1."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompts, reused from the sequence before
    drafted_tokens: int = 0  # proposed before they were computed
    accepted_tokens: int = 0  # of these, the ones that were right
    prompt_seconds: float = 0.0
    tokens: int = 0
    decoded_tokens: int = 0  # all but the first of each generation, which belongs to its prompt
    seconds: float = 0.0
    layer_shares: list[float] = field(default_factory=list)  # of the neurons computed while decoding
    gate_shares: list[float] = field(default_factory=list)  # of the neurons whose gate rows were read
    bytes_per_token: float = 0.0
    layer_neurons: list[int] = field(default_factory=list)  # how many each layer has

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed."""
        return self.decoded_tokens / self.seconds if self.seconds else 0.0

    @property
    def prompt_tokens_per_s(self) -> float:
        """Prompt speed, cached tokens not counted."""
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def computed_share(self) -> float:
        """Share of the FFN neurons computed, over all layers."""
        shares, neurons = self.layer_shares, self.layer_neurons
        return sum(share * n for share, n in zip(shares, neurons, strict=True)) / sum(neurons) if shares else 0.0

    def __add__(self, other: Stats) -> Stats:
        """Both together: sums, and means weighted by tokens."""
        n = self.tokens + other.tokens

        def mean(a: float, b: float) -> float:
            return (a * self.tokens + b * other.tokens) / n

        def means(a: list[float], b: list[float]) -> list[float]:
            return [mean(*pair) for pair in zip(a, b, strict=True)] if n and a and b else a or b

        return Stats(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            prompt_seconds=self.prompt_seconds + other.prompt_seconds,
            tokens=n,
            decoded_tokens=self.decoded_tokens + other.decoded_tokens,
            seconds=self.seconds + other.seconds,
            layer_shares=means(self.layer_shares, other.layer_shares),
            gate_shares=means(self.gate_shares, other.gate_shares),
            bytes_per_token=mean(self.bytes_per_token, other.bytes_per_token) if n else 0.0,
            layer_neurons=self.layer_neurons or other.layer_neurons,
            drafted_tokens=self.drafted_tokens + other.drafted_tokens,
            accepted_tokens=self.accepted_tokens + other.accepted_tokens,
        )


@dataclass(frozen=True)
class Request:
    """What to generate: the parameters of `Model.generate`, with the prompt as ids."""

    prompt: Sequence[int]
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    cache_prompt: bool = False
    logits_processors: Sequence[LogitsProcessor] = ()
    on_token: Callable[[Token], bool | None] | None = None
    on_prompt: Callable[[int, int], bool | None] | None = None


class Turns:
    """Lets the asynchronous generations of one model run one after the other, in the order they began.

    The model keeps the keys and values of one sequence: two that took turns token by token would compute each other's
    anew every time.
    """

    def __init__(self) -> None:
        self._locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()

    def turn(self) -> asyncio.Lock:
        """What to hold in the running event loop while generating."""
        return self._locks.setdefault(asyncio.get_running_loop(), asyncio.Lock())


class Generation(Closing):
    """An iterator over pieces of text, for `for` and for `async for`.

    `stop_reason` is "eos", "length", "stop", "context" or "callback" at the end, None before.
    Stopping early is `close()`, or leaving the loop: what was generated stays in `text` and `token_ids`.
    """

    def __init__(
        self,
        sequence: CachedSequence,
        tokenizer: Tokenizer,
        file: GgufFile,
        request: Request,
        turns: Turns,
        done: Callable[[Stats], None] = lambda _: None,
    ) -> None:
        prompt, engine = request.prompt, sequence.engine
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
        self._sequence, self._engine, self._tokenizer, self._file = sequence, engine, tokenizer, file
        self._counters = Counters(engine.structure, engine.options.ffn)
        self._request, self._turns, self._done = request, turns, done
        self._speculation: Speculation | None = None
        self._ids = list(prompt)
        self._sampling = request.sampling.seeded()
        self.seed = self._sampling.seed
        self._cancelled = False
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        finally:
            if self._cancelled:
                self._pieces.close()

    async def __aiter__(self) -> AsyncGenerator[str, None]:
        """The pieces, computed in a thread: the event loop goes on meanwhile. A cancelled task stops generating."""
        async with self._turns.turn():
            try:
                while (piece := await self._next()) is not None:
                    yield piece
            finally:
                self.close()

    async def _next(self) -> str | None:
        step = asyncio.get_running_loop().run_in_executor(None, next, self._pieces, None)
        try:
            return await asyncio.shield(step)
        except asyncio.CancelledError:
            # The generator stops after the batch or token that is being computed, even where that makes no piece.
            self._cancelled = True
            while not step.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([step])
            raise

    def close(self) -> None:
        """Stop generating: at once, or after the present token where a callback asks for it, or another thread."""
        self._cancelled = True
        try:
            self._pieces.close()
        except ValueError as error:
            if "already executing" not in str(error):
                raise

    def _run(self) -> Generator[str, None, None]:
        prompt, n_ctx = self._request.prompt, self._engine.options.n_ctx
        pieces = Pieces(self._request.stop)
        n_vocab = self._engine.structure.vocab_size
        with Sampler(self._sampling, n_vocab, prompt, n_ctx, self._tokenizer) as self._sampler:
            if self._engine.options.drafts:
                self._speculation = Speculation(self._sequence, self._file, self._sampler.clone)
            try:
                for text in self._texts(pieces):
                    self.text = pieces.text
                    if pieces.stopped is not None:
                        self.stop_reason = "stop"
                    if text:
                        yield text
                    if self.stop_reason:
                        break
            finally:
                self._measure()
                self._done(self.stats)

    def _texts(self, pieces: Pieces) -> Iterator[str]:
        """What is sure after each token, and at the end."""
        for token in self._tokens():
            yield pieces.push(self._tokenizer.token_bytes(token))
        yield pieces.end()

    def _tokens(self) -> Iterator[int]:
        if not self._request.cache_prompt:
            self._sequence.clear()
        logits = self._prefill()
        started = time.perf_counter()
        if logits is None or self._is_complete():
            return
        while True:
            scores = self._processed(logits[0])
            token = self._sampler.sample(scores)
            if self._tokenizer.is_eog(token):
                self.stop_reason = "eos"
                return
            self._append(token, time.perf_counter() - started)
            told = self._request.on_token and self._request.on_token(self._described(token, scores))
            yield token
            if told is False:
                self.stop_reason = "callback"
                return
            if self._is_complete() or self._cancelled:
                return
            logits = self._next_logits()

    def _next_logits(self) -> Floats:
        """float32 [1, n_vocab]."""
        if self._speculation is None:
            return self._sequence.logits(self._ids, counters=self._counters)
        limit = self._request.max_tokens
        left = self._engine.options.n_ctx if limit is None else limit - len(self.token_ids)
        return self._speculation.logits(self._ids, left - 1)

    def _prefill(self) -> Floats | None:
        """Compute the prompt batch by batch; float32 [1, n_vocab] after its last token, None where it was stopped
        before.
        """
        stats, engine, n = self.stats, self._engine, len(self._ids)
        started, done = time.perf_counter(), self._sequence.reusable(self._ids)
        stats.cached_tokens = done
        while True:
            done = min(done + engine.options.n_batch, n)
            logits = self._sequence.logits(self._ids[:done])
            stats.prompt_seconds = time.perf_counter() - started
            if self._request.on_prompt and self._request.on_prompt(done, n) is False:
                self.stop_reason = "callback"
                return None
            if self._cancelled or done == n:
                return None if self._cancelled else logits

    def _is_complete(self) -> bool:
        """Whether another token is one too many; sets `stop_reason` then."""
        limit = self._request.max_tokens
        if limit is not None and len(self.token_ids) >= limit:
            self.stop_reason = "length"
        elif len(self._ids) >= self._engine.options.n_ctx:
            self.stop_reason = "context"
        return self.stop_reason is not None

    def _processed(self, logits: Floats) -> Floats:
        """Logits [n_vocab] after the request's processors."""
        for process in self._request.logits_processors:
            found = process(np.array(self._ids, np.int32), logits)
            logits = _scores(found, logits.shape)
            if not math.isfinite(logits.max()):
                raise UserError(
                    f"a logits processor left {logits.max()} as the largest logit, expected a number",
                    "-inf forbids a token, and one at least must be allowed",
                )
        return logits

    def _append(self, token: int, seconds: float) -> None:
        self.token_ids.append(token)
        self._ids.append(token)
        n = len(self.token_ids)
        self.stats.tokens, self.stats.decoded_tokens, self.stats.seconds = n, n - 1, seconds

    def _described(self, token: int, logits: Floats) -> Token:
        shifted = logits - logits.max()
        logprob = float(shifted[token]) - math.log(np.exp(shifted, dtype=np.float64).sum())
        return Token(token, self._tokenizer.token_bytes(token), logprob)

    def _measure(self) -> None:
        stats, engine = self.stats, self._engine
        if self._speculation:
            self._speculation.did.add_to(self._counters)
        stats.layer_shares, stats.gate_shares = self._counters.layer_shares(), self._counters.gate_shares()
        stats.layer_neurons = [block.n_reached for block in engine.structure.blocks]
        kv = engine.kv_bytes(stats.prompt_tokens + (stats.tokens + 1) / 2)
        if self._speculation:
            did = self._speculation.did
            stats.drafted_tokens, stats.accepted_tokens = did.drafted, did.accepted
            stats.bytes_per_token = did.bytes_read(kv) / max(1, stats.decoded_tokens)
            return
        activity = Activity(engine.options.ffn, stats.layer_shares, stats.gate_shares)
        stats.bytes_per_token = bytes_per_token(engine.structure, self._file.tensors, activity, kv).total


def _scores(found: Any, shape: tuple[int, ...]) -> Floats:
    """What a logits processor returned."""
    try:
        scores: Floats = np.asarray(found, np.float32)
    except (TypeError, ValueError):
        raise UserError(
            f"a logits processor returned a {type(found).__name__}, expected logits of shape {shape}"
        ) from None
    if scores.shape != shape:
        raise UserError(f"a logits processor returned {scores.shape}, expected logits of shape {shape}")
    return scores
