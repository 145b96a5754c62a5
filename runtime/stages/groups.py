"""Into how many groups sequences are divided that are decoded at once, so that all stages work at the same time."""

from __future__ import annotations

from collections.abc import Sequence

_FORGETTING = 0.98  # of what was measured, for each new measurement
_LEAST = 8  # measurements before they are believed


class Groups:
    """Learns what a stage needs for so many tokens: a part for each work, and a part for each token.

    A token less in each work makes works shorter, and there are more of them: m groups through S stages take as long as
    m + S - 1 works of the slowest stage.
    """

    def __init__(self, n_stages: int) -> None:
        self._n_stages, self._weight = n_stages, 0.0
        self._x = self._y = self._xx = self._xy = 0.0

    def took(self, n_tokens: int, seconds: Sequence[float]) -> None:
        """A work of so many tokens took so many seconds in each stage."""
        slowest, f = max(seconds), _FORGETTING
        self._weight = f * self._weight + 1
        self._x, self._y = f * self._x + n_tokens, f * self._y + slowest
        self._xx, self._xy = f * self._xx + n_tokens**2, f * self._xy + n_tokens * slowest

    def number(self, n_sequences: int) -> int:
        """How many groups are fastest for so many sequences; as many as there are stages, while nothing is known."""
        most = min(n_sequences, 2 * self._n_stages)
        if most <= 1:
            return 1
        each, token = self._line()
        if each is None:
            return min(n_sequences, self._n_stages)
        times = {m: (m + self._n_stages - 1) * (each + token * -(-n_sequences // m)) for m in range(1, most + 1)}
        return min(times, key=times.__getitem__)

    def _line(self) -> tuple[float | None, float]:
        """Seconds of a work, and of each token in it; None where too little was measured."""
        w = self._weight
        spread = w * self._xx - self._x**2
        if w < _LEAST or spread < 1e-6 * w * self._xx:  # all works had as many tokens
            return None, 0.0
        token = max(0.0, (w * self._xy - self._x * self._y) / spread)
        return max(0.0, (self._y - token * self._x) / w), token
