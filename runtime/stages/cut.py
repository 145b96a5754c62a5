"""Where a model is cut into stages: exactly the best cuts, by dynamic programming."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

from runtime.errors import UserError

_Best = tuple[float, float, tuple[int, ...]]  # the slowest stage's cost, the sum of squares, the cuts
_NONE: _Best = (math.inf, math.inf, ())


def cut(costs: Sequence[float], n_stages: int, first: float = 0.0, last: float = 0.0) -> list[range]:
    """Consecutive blocks for each stage, so that the slowest stage is as fast as can be; of equally fast ones, those
    whose other stages are as even as can be.

    costs: of each block, in any unit; first, last: of the embeddings and of the head, in the same.
    Raises UserError where there are fewer blocks than stages.
    """
    n = len(costs)
    if not 1 <= n_stages <= n:
        raise UserError(f"{n_stages} stages, expected 1 to {n}, one for each block")
    sums = [0.0, *accumulate(costs)]

    def cost(a: int, b: int) -> float:
        return sums[b] - sums[a] + (first if a == 0 else 0.0) + (last if b == n else 0.0)

    # best[b]: of blocks 0 .. b - 1 in so many stages.
    best: list[_Best] = [_NONE] * (n + 1)
    best[0] = (0.0, 0.0, (0,))
    for stage in range(1, n_stages + 1):
        found: list[_Best] = [_NONE] * (n + 1)
        for b in range(stage, n - (n_stages - stage) + 1):
            found[b] = min(
                (max(slowest, cost(a, b)), squares + cost(a, b) ** 2, (*cuts, b))
                for a, (slowest, squares, cuts) in enumerate(best[:b])
                if cuts
            )
        best = found
    return [range(a, b) for a, b in pairwise(best[n][2])]
