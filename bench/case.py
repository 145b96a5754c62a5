"""What a kernel benchmark times: one FFN of some shape, type and activity, and the bytes that it has to read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from convert.formats import row_bytes
from runtime.model_file.structure import Structure

VARIANTS = ("plain", "repacked", "exact", "listed", "predictor")
RANK = 128  # of the predictor


@dataclass(frozen=True)
class Case:
    """What is timed. type: ggml's name in lower case; active: share of neurons that fire; copies: FFNs in rotation."""

    structure: Structure
    type: str
    active: float
    threads: int
    copies: int = 6

    @property
    def fires(self) -> npt.NDArray[np.bool_]:
        """Which neurons fire, [n_ff]: a fixed number, scattered, more of them among the first."""
        n = self.structure.feed_forward_length
        weights = 1 / (np.arange(n) + n / 8)  # hot ones first, as in a file
        chosen = np.random.default_rng(0).choice(n, round(n * self.active), replace=False, p=weights / weights.sum())
        fires = np.zeros(n, bool)
        fires[chosen] = True
        return fires

    @property
    def predictor_type(self) -> str:
        """Format of the predictor's matrices."""
        return "q4_0" if self.type.startswith(("q4", "q5", "iq4")) else "q8_0"

    def nbytes(self, variant: str) -> float:
        """Bytes of weights that one FFN has to read."""
        s = self.structure
        matrix = row_bytes(self.type, s.embedding_length) * s.feed_forward_length
        rest = matrix * (2 if s.gated else 1)
        if variant == "predictor":
            per_row = row_bytes(self.predictor_type, RANK) + 4
            return per_row * s.feed_forward_length + RANK * row_bytes(self.predictor_type, s.embedding_length)
        share = {"exact": (1.0, self.active), "listed": (self.active, self.active)}.get(variant, (1.0, 1.0))
        return share[0] * matrix + share[1] * rest
