"""One answer that is being computed: from logits to tokens, text and figures."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from runtime.base_engine import BaseEngine
from runtime.compute.counters import Counters, LayerCount
from runtime.compute.traffic import BytesRead
from runtime.errors import UserError
from runtime.generation import Stats
from runtime.serve.jobs import End, Event, Job, Piece, Progress, PromptTokens, TokenInfo
from runtime.serve.scheduler import Part, Task
from runtime.text.pieces import Pieces
from runtime.text.sampling import Sampler
from runtime.text.tokenizer import Tokenizer

Floats = npt.NDArray[np.float32]
Tell = Callable[["Event | UserError"], None]


class _Counted(Counters):
    """Counters that remember what was added last."""

    last: Mapping[int, LayerCount] = MappingProxyType({})

    def add(self, counted: Mapping[int, LayerCount]) -> None:
        """Add what layers did."""
        self.last = counted
        super().add(counted)


@dataclass(frozen=True)
class Served:
    """What all answers need of a model."""

    engine: BaseEngine
    tokenizer: Tokenizer
    read: BytesRead

    @functools.cached_property
    def ends(self) -> list[int]:
        """Tokens that end a text."""
        return self.tokenizer.end_ids


class Answer:
    """An answer: its task, its sampler, its text, and whom to tell of events. To be used by one thread.

    follows: an answer to the same prompt, which is computed first. ended: it needs no more steps.
    """

    def __init__(self, job: Job, served: Served, tell: Tell, follows: Answer | None = None) -> None:
        options = served.engine.options
        self.job, self.tell, self._served = job, tell, served
        n, n_ctx = len(job.prompt), options.n_ctx
        self._most = n_ctx - n if job.max_tokens is None else min(job.max_tokens, n_ctx - n)
        self.task: Task = Task(
            list(job.prompt),
            max(n, n + self._most - 1),
            leader=follows.task if follows else None,
            all_logits=job.prompt_logprobs,
            shares=job.cache_prompt,
        )
        self.counters = _Counted(served.engine.structure, options.ffn)
        self.ended = False
        self._sampling = job.sampling.seeded()
        n_vocab = served.engine.structure.vocab_size
        self._sampler = Sampler(self._sampling, n_vocab, job.prompt, n_ctx, served.tokenizer, job.grammar)
        self._pieces = Pieces(job.stop)
        self._stats = Stats(prompt_tokens=n)
        self._prompt_tokens: list[TokenInfo] = []
        self._bytes = 0.0
        self._layer_neurons = [block.n_reached for block in served.engine.structure.blocks]
        self.asked = time.perf_counter()
        self.begun = self.first = self.latest = math.nan  # when its prompt, its first and its last token came

    def began(self) -> None:
        """It was admitted."""
        self.begun = time.perf_counter()
        self._stats.cached_tokens = self.task.cached
        self.tell(Progress(self.task.known, self.task.n_prompt, self.task.cached))

    def took(self, part: Part, logits: Floats, n_together: int) -> None:
        """A part of it was computed. logits: [number of `part.wanted`, n_vocab]; n_together: tokens of the whole
        step. Raises UserError where this answer cannot go on.
        """
        if part.end <= self.task.n_prompt:
            self._stats.prompt_seconds = time.perf_counter() - self.begun
            self.tell(Progress(part.end, self.task.n_prompt, self.task.cached))
            if self.job.prompt_logprobs:
                self._note_prompt(part, logits)
        else:
            self._bytes = self._read(n_together)
        if part.end == len(self.task.ids):
            self._choose(logits[-1])

    def end(self, reason: str) -> None:
        """It ends here: tell what is left, and the figures."""
        if self.ended:
            return
        self.ended = True
        rest = self._pieces.end()
        if self._pieces.stopped is not None:
            reason = "stop"
        if rest:
            self.tell(Piece(rest, ()))
        self._measure()
        self.tell(End(reason, self._stats, self._sampler.seed, self._pieces.text, self._pieces.stopped))
        self._sampler.close()

    def fail(self, error: UserError) -> None:
        """It cannot go on."""
        if not self.ended:
            self.ended = True
            self._sampler.close()
            self.tell(error)

    @property
    def n_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.task.ids) - self.task.n_prompt

    def _choose(self, logits: Floats) -> None:
        """The next token, by logits [n_vocab]."""
        job, tokenizer, now = self.job, self._served.tokenizer, time.perf_counter()
        if self._most <= 0:
            self.end("length")
            return
        scores = _without(logits, self._served.ends) if job.ignore_eos else logits
        token = self._sampler.sample(scores)
        if math.isnan(self.first):
            self.first = now
        self.latest = now
        if tokenizer.is_eog(token) and not job.ignore_eos:
            self.end("eos")
            return
        self.task.ids.append(token)
        self._stats.tokens += 1
        data = tokenizer.token_bytes(token)
        text = self._pieces.push(data)
        info = TokenInfo(token, data)
        if job.top_logprobs is not None:
            info = TokenInfo(token, data, *described(logits, token, job.top_logprobs))
        self.tell(Piece(text, (info,), tuple(self._shares()) if job.activity else (), self._bytes))
        if self._pieces.stopped is not None:
            self.end("stop")
        elif self._sampler.complete:
            self.end("eos")
        elif self.n_tokens >= self._most:
            full = self.job.max_tokens is None or self.n_tokens < self.job.max_tokens
            self.end("context" if full else "length")

    def _note_prompt(self, part: Part, logits: Floats) -> None:
        """Probabilities of the prompt's tokens that follow the computed ones."""
        tokenizer, top = self._served.tokenizer, self.job.top_logprobs or 0
        if part.first == 0:
            first = self.task.ids[0]
            self._prompt_tokens.append(TokenInfo(first, tokenizer.token_bytes(first, special=True)))
        for at, row in zip(range(part.first + 1, part.end + 1), logits, strict=True):
            if at < self.task.n_prompt:
                token = self.task.ids[at]
                data = tokenizer.token_bytes(token, special=True)
                self._prompt_tokens.append(TokenInfo(token, data, *described(row, token, top)))
        if part.end == self.task.n_prompt:
            self.tell(PromptTokens(tuple(self._prompt_tokens)))

    def _shares(self) -> list[float]:
        """Share of each layer's neurons computed for the last token; none where it came with the prompt."""
        return _of(self.counters.last, self._layer_neurons, "fired") if self.counters.last else []

    def _read(self, n_together: int) -> float:
        """Bytes read for the last token; also added to the figures."""
        last, neurons = self.counters.last, self._layer_neurons
        kv = self._served.engine.kv_bytes(self.task.known)
        dense = self._served.engine.options.ffn == "dense"
        fired, gates = ([1.0] * len(neurons) if dense else _of(last, neurons, what) for what in ("fired", "gates"))
        read = self._served.read.per_token(fired, gates, n_together, kv)
        stats = self._stats
        stats.decoded_tokens += 1
        stats.bytes_per_token += (read - stats.bytes_per_token) / stats.decoded_tokens
        return read

    def _measure(self) -> None:
        stats = self._stats
        stats.layer_shares, stats.gate_shares = self.counters.layer_shares(), self.counters.gate_shares()
        stats.layer_neurons = self._layer_neurons
        stats.seconds = self.latest - self.first if not math.isnan(self.first) else 0.0


def described(logits: Floats, token: int, n_top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The natural logarithm of a token's probability, and the n likeliest tokens with theirs; logits: [n_vocab]."""
    shifted = logits.astype(np.float64) - logits.max()
    shifted -= math.log(np.exp(shifted).sum())
    top = np.argpartition(shifted, -n_top)[-n_top:] if 0 < n_top < len(shifted) else np.arange(min(n_top, len(shifted)))
    ranked = top[np.argsort(-shifted[top], kind="stable")]
    return float(shifted[token]), tuple((int(i), float(shifted[i])) for i in ranked)


def _of(counted: Mapping[int, LayerCount], neurons: list[int], what: str) -> list[float]:
    """Share of each layer's neurons, by what one token counted; 1 where a layer was computed as a whole."""
    shares = [1.0 if n else 0.0 for n in neurons]
    for i, count in counted.items():
        if count.seen and neurons[i]:
            shares[i] = getattr(count, what) / (count.seen * neurons[i])
    return shares


def _without(logits: Floats, tokens: list[int]) -> Floats:
    kept = logits.copy()
    kept[tokens] = -np.inf
    return kept
