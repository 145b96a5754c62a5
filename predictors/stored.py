"""The predictor of one block as a file holds it, with scores computed in numpy.

Knows the tensors of each kind; knows nothing of how they were fitted.
"""

from __future__ import annotations

from predictors.lowrank import LowRank
from predictors.matrices import Floats, Tensor
from predictors.mlp import Mlp
from predictors.predictor import Candidate
from predictors.signbit import SignBit
from runtime.model_file.reader import GgufFile


def stored_predictor(file: GgufFile, i: int) -> tuple[Candidate, Floats] | None:
    """Block `i`'s predictor and its bias, float32 [n_ff] (a neuron is computed where score + bias > 0); None where it has none."""
    s = file.structure
    if s.rank(i) == 0:
        return None
    bias = _tensor(file, i, "predictor_out.bias").floats()
    if s.predictor == "signbit":
        return SignBit((_tensor(file, i, "predictor_sign"),), s.rank(i)), bias
    tensors = tuple(_tensor(file, i, f"predictor_{part}.weight") for part in ("in", "out"))
    kind = Mlp if s.predictor == "mlp" else LowRank
    return kind(tensors, s.rank(i), tensors[1].type, (tensors[0].floats(), tensors[1].floats())), bias


def _tensor(file: GgufFile, i: int, name: str) -> Tensor:
    info = file.tensors[f"blk.{i}.{name}"]
    return Tensor(name, info.type, info.ne, file.read(info.name))
