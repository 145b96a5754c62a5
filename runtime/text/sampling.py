"""From logits to one token id: penalties and greedy choice by numpy, the rest by libllama's samplers, applied to an
array that we fill, without a llama_context.
"""

from __future__ import annotations

import copy
import ctypes
import math
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.base.arguments import number, texts, whole
from runtime.base.closing import Closing, Handles, closed
from runtime.bindings import llama
from runtime.errors import UserError
from runtime.text.grammar import Grammar
from runtime.text.penalties import Penalties
from runtime.text.tokenizer import Tokenizer

Floats = NDArray[np.float32]
_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
_LONGEST = 1 << 24  # tokens of a sequence
_INT32 = (1 << 31) - 1
# A logit over a temperature must be a float32, or the probabilities are no numbers: colder than this is greedy, larger
# logits count as this.
_COLDEST, _LARGEST = 1e-6, 1e30
_NEGLIGIBLE = 1e-34  # of the likeliest token's probability; logarithms of zero would spoil typical_p and mirostat
_MOST_BIASES = 1024
_MOST_BREAKERS, _LONGEST_BREAKER = 16, 40  # each is looked up in the whole vocabulary; libllama cuts longer ones

_NUMBERS: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repeat_penalty": (0.01, 100),
    "frequency_penalty": (-100, 100),
    "presence_penalty": (-100, 100),
    "typical_p": (0, 1),
    "top_n_sigma": (-1, 1000),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "dry_multiplier": (0, 100),
    "dry_base": (0, 100),
    "dynatemp_range": (0, 100),
    "dynatemp_exponent": (0, 100),
    "mirostat_tau": (0, 100),
    "mirostat_eta": (0, 1),
}
_WHOLES: Mapping[str, tuple[int, int]] = {
    "top_k": (-1, _INT32),
    "repeat_last_n": (-1, _LONGEST),
    "dry_allowed_length": (0, _LONGEST),
    "dry_penalty_last_n": (-1, _LONGEST),
    "mirostat": (0, 2),
    "min_keep": (0, _INT32),
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Names, order and defaults are llama.cpp's: biases, penalties, DRY, top_n_sigma,
    top_k, typical_p, top_p, min_p, XTC, temperature, one after the other.

    temperature: 0 takes the likeliest token after biases, penalties and DRY; so does what is less than a millionth.
    top_k: keep the k likeliest, 0 or -1 all. top_p: keep the likeliest tokens that hold this share of the probability,
    1 all. min_p: keep tokens at least this fraction as likely as the likeliest.
    repeat_penalty: divides positive logits of the last `repeat_last_n` tokens, prompt included, and multiplies others;
    1 none. repeat_last_n: 0 none, -1 all. seed: None and -1 draw a new one.
    frequency_penalty, presence_penalty: subtracted from the logit of each token that was generated, as often as it
    was, and once; the prompt does not count, as OpenAI says.
    logit_bias: (token id, what is added to its logit); minus infinity forbids it.
    typical_p: keep tokens whose information is typical, with this share of the probability; 1 all. top_n_sigma: keep
    tokens within so many standard deviations of the best logit; 0 or less all.
    xtc_probability: how often all tokens are left out that are likelier than the last one of those with a probability
    of `xtc_threshold` or more.
    dry_multiplier: subtract multiplier x base^(length - allowed length) from tokens that would repeat a sequence of
    the last `dry_penalty_last_n` tokens (-1 all, prompt included), if it is at least as long as the allowed length; 0
    never. dry_sequence_breakers: texts that end such a sequence, 16 of 40 bytes at most.
    dynatemp_range, dynatemp_exponent: the temperature varies by so much, by the entropy to this power.
    mirostat: 1 or 2 aim at a surprise of `mirostat_tau` bits, corrected at the rate `mirostat_eta`, in place of all
    filters and XTC.
    min_keep: filters leave at least so many tokens.
    Raises UserError for a value that is no number or out of its range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    min_keep: int = 0

    def __post_init__(self) -> None:
        seed = -1 if self.seed is None else whole("seed", self.seed, -1, llama.DEFAULT_SEED - 1)
        checked: dict[str, Any] = {
            **{name: number(name, getattr(self, name), *limits) for name, limits in _NUMBERS.items()},
            **{name: whole(name, getattr(self, name), *limits) for name, limits in _WHOLES.items()},
            "seed": None if seed == -1 else seed,
            "logit_bias": _biases(self.logit_bias),
            "dry_sequence_breakers": _breakers(self.dry_sequence_breakers),
        }
        checked["top_k"] = max(0, checked["top_k"])
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def seeded(self) -> Sampling:
        """The same with a definite seed: a new random one where it was None."""
        # libllama's own "random" seed is the one value left out.
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(llama.DEFAULT_SEED))


def _biases(values: Any) -> tuple[tuple[int, float], ...]:
    pairs = values.items() if isinstance(values, Mapping) else values
    try:
        listed = [(token, bias) for token, bias in pairs]
    except (TypeError, ValueError):
        raise UserError("logit_bias: expected pairs of a token id and a number") from None
    if len(listed) > _MOST_BIASES:
        raise UserError(f"logit_bias has {len(listed)} entries, expected at most {_MOST_BIASES}")
    found: dict[int, float] = {}
    for token, bias in listed:
        forbids = isinstance(bias, float) and bias == -math.inf
        i = whole("logit_bias: a token id", token, 0, _INT32)
        found[i] = -math.inf if forbids else number(f"logit_bias of token {i}", bias, -1e6, 1e6)
    return tuple(found.items())


def _breakers(values: Any) -> tuple[str, ...]:
    found = texts("dry_sequence_breakers", values)
    if len(found) > _MOST_BREAKERS:
        raise UserError(f"dry_sequence_breakers has {len(found)} texts, expected at most {_MOST_BREAKERS}")
    for text in found:
        if len(text.encode("utf-8", "replace")) > _LONGEST_BREAKER or "\0" in text:
            raise UserError(
                f"dry_sequence_breakers: a text of {len(text)} characters, "
                f"expected at most {_LONGEST_BREAKER} bytes, none of them NUL"
            )
    return found


class Sampler(Closing):
    """One sequence's sampler chain, with its random state and the tokens it has seen; owns a llama_sampler.

    prompt: tokens that come before the first one that is sampled, for the repeat penalty and DRY. n_ctx: the longest
    sequence, prompt included. vocab: the tokens' texts, for grammars, and for what breaks sequences in DRY: nothing
    does without it. grammar: what the answer must look like; it needs vocab.
    seed: the seed in use, given or drawn.
    Raises UserError for a bias of a token that there is not.
    """

    def __init__(
        self,
        sampling: Sampling,
        n_vocab: int,
        prompt: Sequence[int] = (),
        n_ctx: int = _LONGEST,
        vocab: Tokenizer | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        sampling = sampling.seeded()
        assert sampling.seed is not None
        self.seed = sampling.seed
        self._n_vocab = n_vocab
        for token, _ in sampling.logit_bias:
            if token >= n_vocab:
                raise UserError(f"logit_bias: token id {token}, expected 0 to {n_vocab - 1}")
        recent = min(sampling.repeat_last_n if sampling.repeat_last_n >= 0 else n_ctx, n_ctx)
        self._penalties = Penalties(
            sampling.logit_bias,
            sampling.repeat_penalty,
            recent,
            sampling.frequency_penalty,
            sampling.presence_penalty,
            prompt,
        )
        self._greedy = sampling.temperature < _COLDEST and not _dry_length(sampling, n_ctx)
        assert vocab or not grammar
        self._constraint = grammar.start(vocab, n_vocab) if grammar and vocab else None
        self._array = llama.llama_token_data_array()
        with Handles() as handles:
            chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_params(True))
            self._chain: llama.SamplerP | None = handles.add(chain, llama.llama_sampler_free)
            for link in _links(sampling, n_vocab, prompt, n_ctx, vocab):
                llama.llama_sampler_chain_add(self._chain, link)
            self._handles = handles.pop_all()

    def sample(self, logits: Floats) -> int:
        """Choose a token by its `logits` [n_vocab] and remember it for the penalties.

        Raises UserError when a logit is not a number, or none is above minus infinity, or where the grammar allows no
        token.
        """
        scores = self._scores(logits)
        token = self._choose(scores)
        # Most tokens that are drawn fit: the whole vocabulary is looked at for others only, as llama.cpp does.
        if self._constraint and not self._constraint.allows(token):
            scores = np.where(self._constraint.mask(), scores, np.float32(-math.inf))
            if not scores.max() > -math.inf:
                raise UserError("grammar: no token of the vocabulary can follow", "a bias may forbid those that could")
            token = self._choose(scores)
        self.accept(token)
        return token

    def accept(self, token: int) -> None:
        """Take `token` as the next one of the sequence, for the penalties and the grammar."""
        if self._constraint:
            self._constraint.accept(token)
        llama.llama_sampler_accept(self._open_chain, token)
        self._penalties.accept(token)

    def clone(self) -> Sampler:
        """Another sampler in this one's state, which chooses what this one would. Call its `close`, too."""
        other = copy.copy(self)
        other._array, other._penalties = llama.llama_token_data_array(), self._penalties.clone()
        other._constraint = self._constraint.clone() if self._constraint else None
        with Handles() as handles:
            clone = llama.llama_sampler_clone(llama.ConstSamplerP(self._open_chain.value))
            other._chain = handles.add(clone, llama.llama_sampler_free)
            other._handles = handles.pop_all()
        return other

    def reset(self) -> None:
        """Forget the tokens seen and start the random sequence again."""
        llama.llama_sampler_reset(self._open_chain)
        self._penalties.reset()
        if self._constraint:
            self._constraint.reset()

    @property
    def complete(self) -> bool:
        """Whether the grammar lets nothing follow: the answer ends here."""
        return self._constraint is not None and self._constraint.complete

    def close(self) -> None:
        """Free libllama's chain; the sampler cannot be used afterwards."""
        self._chain = None
        self._handles.close()

    @property
    def _open_chain(self) -> llama.SamplerP:
        if self._chain is None:
            raise closed("the sampler")
        return self._chain

    def _scores(self, logits: Floats) -> Floats:
        """The logits after biases and penalties; another array where they differ."""
        _ = self._open_chain
        largest = logits.max()
        if not largest > -math.inf:
            raise UserError(
                "the model's logits are not numbers", "its weights are damaged: convert the checkpoint again"
            )
        if not (self._penalties.used or largest > _LARGEST):
            return logits
        scores = np.minimum(logits, np.float32(_LARGEST))
        self._penalties.apply(scores)
        return scores

    def _choose(self, scores: Floats) -> int:
        best = int(scores.argmax())
        if scores[best] == -math.inf:
            raise UserError("logit_bias forbids every token that could follow")
        if self._greedy:
            return best
        self._fill(scores)
        llama.llama_sampler_apply(self._open_chain, ctypes.byref(self._array))
        # A penalty of DRY can be infinite: where all that is left has one, nothing is drawn.
        return self._selected() if 0 <= self._array.selected < self._array.size else best

    def _fill(self, scores: Floats) -> None:
        """The candidates: all but forbidden tokens. Filters sort and cut the array in place, so every call fills it."""
        candidates = _buffer.of(self._n_vocab)
        if scores.min() > -math.inf:
            candidates["id"], candidates["logit"] = _buffer.ids, scores
        else:
            kept = np.flatnonzero(scores > -math.inf)
            candidates = candidates[: len(kept)]
            candidates["id"], candidates["logit"] = kept, scores[kept]
        self._array.data = candidates.ctypes.data
        self._array.size = len(candidates)
        self._array.selected = -1
        self._array.sorted = False

    def _selected(self) -> int:
        # A sampler may put another array in place of ours, so the pointer is read back.
        return ctypes.c_int32.from_address(self._array.data + self._array.selected * _TOKEN_DATA.itemsize).value


class _Buffer(threading.local):
    """The array of candidates, one for all samplers of a thread: with many sequences it stays in the cache."""

    def __init__(self) -> None:
        self.candidates, self.ids = np.zeros(0, _TOKEN_DATA), np.zeros(0, np.int32)

    def of(self, n_vocab: int) -> NDArray[Any]:
        """An array for so many tokens; `ids` are theirs."""
        if len(self.ids) != n_vocab:
            self.candidates, self.ids = np.zeros(n_vocab, _TOKEN_DATA), np.arange(n_vocab, dtype=np.int32)
        return self.candidates


_buffer = _Buffer()


def _links(
    s: Sampling, n_vocab: int, prompt: Sequence[int], n_ctx: int, vocab: Tokenizer | None
) -> Iterator[llama.SamplerP]:
    assert s.seed is not None
    if _dry_length(s, n_ctx):
        yield _dry(s, prompt, n_ctx, vocab)
    if s.temperature < _COLDEST:
        yield llama.llama_sampler_init_greedy()
        return
    if not s.mirostat:
        yield from _filters(s)
    yield llama.llama_sampler_init_temp_ext(s.temperature, 0.0 if s.mirostat else s.dynatemp_range, s.dynatemp_exponent)
    if s.mirostat == 1:
        yield llama.llama_sampler_init_min_p(_NEGLIGIBLE, 1)
        yield llama.llama_sampler_init_mirostat(n_vocab, s.seed, s.mirostat_tau, s.mirostat_eta, 100)
    elif s.mirostat == 2:
        yield llama.llama_sampler_init_mirostat_v2(s.seed, s.mirostat_tau, s.mirostat_eta)
    else:
        yield llama.llama_sampler_init_dist(s.seed)


def _filters(s: Sampling) -> Iterator[llama.SamplerP]:
    assert s.seed is not None
    keep = max(1, s.min_keep)
    if s.top_n_sigma > 0:
        yield llama.llama_sampler_init_top_n_sigma(s.top_n_sigma)
    if s.top_k:
        yield llama.llama_sampler_init_top_k(s.top_k)
    if s.typical_p < 1:
        yield llama.llama_sampler_init_min_p(_NEGLIGIBLE, 1)
        yield llama.llama_sampler_init_typical(s.typical_p, keep)
    if s.top_p < 1:
        yield llama.llama_sampler_init_top_p(s.top_p, keep)
    if s.min_p > 0:
        yield llama.llama_sampler_init_min_p(s.min_p, keep)
    if s.xtc_probability > 0 and s.xtc_threshold <= 0.5:
        yield llama.llama_sampler_init_xtc(s.xtc_probability, s.xtc_threshold, keep, s.seed)


def _dry_length(s: Sampling, n_ctx: int) -> int:
    """How many tokens DRY looks at; 0: it is off."""
    if not s.dry_multiplier or s.dry_base < 1:
        return 0
    return min(s.dry_penalty_last_n if s.dry_penalty_last_n >= 0 else n_ctx, n_ctx)


def _dry(s: Sampling, prompt: Sequence[int], n_ctx: int, vocab: Tokenizer | None) -> llama.SamplerP:
    length = _dry_length(s, n_ctx)
    breakers = [text.encode("utf-8", "replace") for text in s.dry_sequence_breakers] if vocab else []
    link = llama.llama_sampler_init_dry(
        vocab.handle if vocab else llama.VocabP(),
        s.dry_multiplier,
        s.dry_base,
        s.dry_allowed_length,
        length,
        (ctypes.c_char_p * len(breakers))(*breakers),
        len(breakers),
    )
    for token in prompt[max(0, len(prompt) - length) :]:
        llama.llama_sampler_accept(link, token)
    return link
