"""The predictor of one block as a file holds it, with scores computed in numpy."""

from __future__ import annotations

from predictors.lowrank import LowRank
from predictors.matrices import Floats, Tensor
from predictors.mlp import Mlp
from predictors.predictor import Candidate
from predictors.signbit import SignBit
from runtime.model_file import tensor_names as names
from runtime.model_file.reader import GgufFile


def stored_predictor(file: GgufFile, i: int) -> tuple[Candidate, Floats] | None:
    """Block `i`'s predictor and its bias, float32 [n_ff] (a neuron is computed where score + bias > 0); None where it
    has none.
    """
    s = file.structure
    if s.rank(i) == 0:
        return None
    bias = _tensor(file, i, names.bias(names.PREDICTOR_OUT)).floats()
    if s.predictor == "signbit":
        return SignBit((_tensor(file, i, names.PREDICTOR_SIGN),), s.rank(i)), bias
    tensors = tuple(_tensor(file, i, names.weight(stem)) for stem in (names.PREDICTOR_IN, names.PREDICTOR_OUT))
    kind = Mlp if s.predictor == "mlp" else LowRank
    return kind(tensors, s.rank(i), tensors[1].type, (tensors[0].floats(), tensors[1].floats())), bias


def _tensor(file: GgufFile, i: int, short: str) -> Tensor:
    info = file.tensors[names.in_block(i, short)]
    return Tensor(short, info.type, info.ne, file.read(info.name))
