"""What changes single logits before a token is chosen: biases, and penalties of tokens that were there before.

Few tokens are concerned, so numpy does it on those alone, where libllama looks at every token of the vocabulary.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Penalties:
    """Biases and penalties of one sequence, with the tokens that it has seen.

    bias: (token id, what is added to its logit). repeat: divides logits above zero of the last `recent` tokens, those
    of the prompt too, and multiplies others; 1 none. frequency, presence: subtracted from the logits of tokens that
    were generated, as often as they were, and once.
    """

    def __init__(
        self,
        bias: Sequence[tuple[int, float]],
        repeat: float,
        recent: int,
        frequency: float,
        presence: float,
        prompt: Sequence[int],
    ) -> None:
        self._biased = np.array([token for token, _ in bias], np.int64)
        self._bias = np.array([value for _, value in bias], np.float32)
        self._repeat = np.float32(repeat)
        self._frequency, self._presence = np.float32(frequency), np.float32(presence)
        self._repeats = repeat != 1 and recent > 0
        self._counts = frequency != 0 or presence != 0
        self._last: deque[int] = deque(maxlen=recent)
        self._recent: Counter[int] = Counter()
        self._generated: Counter[int] = Counter()
        if self._repeats:
            for token in prompt[max(0, len(prompt) - recent) :]:
                self._remember(token)

    @property
    def used(self) -> bool:
        """Whether it changes anything, now or later."""
        return bool(len(self._biased)) or self._repeats or self._counts

    def apply(self, logits: Floats) -> None:
        """Change logits [n_vocab] in place."""
        with np.errstate(over="ignore"):
            if len(self._biased):
                logits[self._biased] += self._bias
            if self._recent:
                ids = np.fromiter(self._recent, np.int64, len(self._recent))
                old = logits[ids]
                logits[ids] = _possible(np.where(old <= 0, old * self._repeat, old / self._repeat), old)
            if self._generated:
                n = len(self._generated)
                ids = np.fromiter(self._generated, np.int64, n)
                counts = np.fromiter(self._generated.values(), np.float32, n)
                old = logits[ids]
                logits[ids] = _possible(old - (counts * self._frequency + self._presence), old)

    def accept(self, token: int) -> None:
        """Take a generated token."""
        if self._repeats:
            self._remember(token)
        if self._counts:
            self._generated[token] += 1

    def clone(self) -> Penalties:
        """Another one in this one's state."""
        other = copy.copy(self)
        other._last, other._recent, other._generated = self._last.copy(), self._recent.copy(), self._generated.copy()
        return other

    def reset(self) -> None:
        """Forget all tokens."""
        self._last.clear()
        self._recent.clear()
        self._generated.clear()

    def _remember(self, token: int) -> None:
        if len(self._last) == self._last.maxlen:
            oldest = self._last[0]
            self._recent[oldest] -= 1
            if not self._recent[oldest]:
                del self._recent[oldest]
        self._last.append(token)
        self._recent[token] += 1


def _possible(new: Floats, old: Floats) -> Floats:
    """The new logits, but for penalties that would forbid a token: only biases may."""
    return np.where(old > -np.inf, np.maximum(new, _LOWEST), old)


_LOWEST = np.finfo(np.float32).min
