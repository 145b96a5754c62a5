"""From logits to one token id: libllama's sampler chain, applied to an array that we fill, without a llama_context."""

from __future__ import annotations

import copy
import ctypes
import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runtime.base.arguments import number, whole
from runtime.base.closing import Closing, Handles, closed
from runtime.bindings import llama
from runtime.errors import UserError

_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
_LONGEST = 1 << 24  # tokens of a sequence
# A logit over a temperature must be a float32, or the probabilities are no numbers: colder than this is greedy, larger
# logits count as this.
_COLDEST, _LARGEST = 1e-6, 1e30


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: penalty, top_k, top_p, min_p, temperature, one after the other, as in llama.cpp.

    temperature: 0 takes the likeliest token; so does what is less than a millionth. top_k: keep the k likeliest, 0 or
    -1 all.
    top_p: keep the likeliest tokens that hold this share of the probability, 1 all. min_p: keep tokens at least this
    fraction as likely as the likeliest.
    repeat_penalty: divides positive logits of the last `repeat_last_n` tokens, prompt included, and multiplies negative
    ones; 1 none.
    repeat_last_n: 0 none, -1 all. seed: None and -1 draw a new one.
    Raises UserError for a value that is no number or out of its range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        seed = -1 if self.seed is None else whole("seed", self.seed, -1, llama.DEFAULT_SEED - 1)
        checked = {
            "temperature": number("temperature", self.temperature, 0, 100),
            "top_k": max(0, whole("top_k", self.top_k, -1, (1 << 31) - 1)),
            "top_p": number("top_p", self.top_p, 0, 1),
            "min_p": number("min_p", self.min_p, 0, 1),
            "repeat_penalty": number("repeat_penalty", self.repeat_penalty, 0.01, 100),
            "repeat_last_n": whole("repeat_last_n", self.repeat_last_n, -1, _LONGEST),
            "seed": None if seed == -1 else seed,
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def seeded(self) -> Sampling:
        """The same with a definite seed: a new random one where it was None."""
        # libllama's own "random" seed is the one value left out.
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(llama.DEFAULT_SEED))


class Sampler(Closing):
    """One sequence's sampler chain, with its random state and the tokens it has seen; owns a llama_sampler.

    prompt: tokens that come before the first one that is sampled, for the repeat penalty. n_ctx: the longest sequence,
    prompt included.
    seed: the seed in use, given or drawn.
    """

    def __init__(self, sampling: Sampling, n_vocab: int, prompt: Sequence[int] = (), n_ctx: int = _LONGEST) -> None:
        sampling = sampling.seeded()
        assert sampling.seed is not None
        self.seed = sampling.seed
        self._candidates = np.zeros(n_vocab, _TOKEN_DATA)
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._array = llama.llama_token_data_array()
        recent = min(sampling.repeat_last_n if sampling.repeat_last_n >= 0 else n_ctx, n_ctx)
        with Handles() as handles:
            chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_params(True))
            self._chain: llama.SamplerP | None = handles.add(chain, llama.llama_sampler_free)
            for link in _links(sampling, n_vocab, recent):
                llama.llama_sampler_chain_add(self._chain, link)
            if sampling.repeat_penalty != 1:
                for token in prompt[max(0, len(prompt) - recent) :]:
                    self.accept(token)
            self._handles = handles.pop_all()

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Choose a token by its `logits` [n_vocab] and remember it for the repeat penalty.

        Raises UserError when a logit is not a number, or none is above minus infinity.
        """
        largest = logits.max()
        if not largest > -math.inf:
            raise UserError(
                "the model's logits are not numbers", "its weights are damaged: convert the checkpoint again"
            )
        self._fill(np.minimum(logits, _LARGEST) if largest > _LARGEST else logits)
        llama.llama_sampler_apply(self._open_chain, ctypes.byref(self._array))
        token = self._selected()
        self.accept(token)
        return token

    def accept(self, token: int) -> None:
        """Take `token` as the next one of the sequence, e.g. one of the prompt's, for the repeat penalty."""
        llama.llama_sampler_accept(self._open_chain, token)

    def clone(self) -> Sampler:
        """Another sampler in this one's state, which chooses what this one would. Call its `close`, too."""
        other = copy.copy(self)
        other._candidates, other._array = np.zeros_like(self._candidates), llama.llama_token_data_array()
        with Handles() as handles:
            clone = llama.llama_sampler_clone(llama.ConstSamplerP(self._open_chain.value))
            other._chain = handles.add(clone, llama.llama_sampler_free)
            other._handles = handles.pop_all()
        return other

    def reset(self) -> None:
        """Forget the tokens seen and start the random sequence again."""
        llama.llama_sampler_reset(self._open_chain)

    def close(self) -> None:
        """Free libllama's chain; the sampler cannot be used afterwards."""
        self._chain = None
        self._handles.close()

    @property
    def _open_chain(self) -> llama.SamplerP:
        if self._chain is None:
            raise closed("the sampler")
        return self._chain

    def _fill(self, logits: NDArray[np.float32]) -> None:
        # The filters sort and cut the array in place, so every call starts from the whole vocabulary.
        self._candidates["id"] = self._ids
        self._candidates["logit"] = logits
        self._candidates["p"] = 0
        self._array.data = self._candidates.ctypes.data
        self._array.size = len(self._candidates)
        self._array.selected = -1
        self._array.sorted = False

    def _selected(self) -> int:
        # A sampler may put another array in place of ours, so the pointer is read back.
        assert 0 <= self._array.selected < self._array.size
        return ctypes.c_int32.from_address(self._array.data + self._array.selected * _TOKEN_DATA.itemsize).value


def _links(s: Sampling, n_vocab: int, recent: int) -> Iterator[llama.SamplerP]:
    if s.repeat_penalty != 1 and recent:
        yield llama.llama_sampler_init_penalties(n_vocab, recent, s.repeat_penalty, 0.0, 0.0)
    if s.temperature < _COLDEST:
        yield llama.llama_sampler_init_greedy()
        return
    yield llama.llama_sampler_init_top_k(s.top_k)
    yield llama.llama_sampler_init_top_p(s.top_p, 1)
    yield llama.llama_sampler_init_min_p(s.min_p, 1)
    yield llama.llama_sampler_init_temp(s.temperature)
    assert s.seed is not None
    yield llama.llama_sampler_init_dist(s.seed)
