"""What a kernel benchmark times: one FFN of some shape, type and activity, and the bytes that it has to read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from convert.formats import row_bytes
from runtime.bindings.ffn_shape import FfnShape
from runtime.model_file.structure import Structure

VARIANTS = ("plain", "repacked", "whole", "exact", "listed", "predictor")
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
    def ffn(self) -> FfnShape:
        """The FFN of every block."""
        return self.structure.ffns[0]

    @property
    def fires(self) -> npt.NDArray[np.bool_]:
        """Which neurons fire, [n_ff]: a fixed number, scattered, more of them among the first."""
        n = self.ffn.n_ff
        weights = 1 / (np.arange(n) + n / 8)  # hot ones first, as in a file
        chosen = np.random.default_rng(0).choice(n, round(n * self.active), replace=False, p=weights / weights.sum())
        fires = np.zeros(n, bool)
        fires[chosen] = True
        return fires

    @property
    def predictor_type(self) -> str:
        """Format of the predictor's matrices."""
        return "q4_0" if self.type.startswith(("q4", "q5", "iq4")) else "q8_0"

    def nbytes(self, variant: str, tokens: int = 1) -> float:
        """Bytes of weights that one FFN has to read for tokens whose neurons are independent of each other."""
        ffn = self.ffn
        matrix = row_bytes(self.type, ffn.n_embd) * ffn.n_ff
        rest = matrix * (2 if ffn.gated else 1)
        if variant == "predictor":
            per_row = row_bytes(self.predictor_type, RANK) + 4
            return per_row * ffn.n_ff + RANK * row_bytes(self.predictor_type, ffn.n_embd)
        some = 1 - (1 - self.active) ** tokens  # of the rows are wanted by any of them
        share = {"exact": (1.0, some), "listed": (some, some)}.get(variant, (1.0, 1.0))
        return share[0] * matrix + share[1] * rest
