"""The predictor of one block as a file holds it, with scores computed in numpy."""

from __future__ import annotations

import math

import numpy as np

from predictors.lowrank import LowRank
from predictors.matrices import Floats, Tensor
from predictors.mlp import Mlp
from predictors.predictor import Candidate
from predictors.signbit import SignBit
from runtime.model_file import tensor_names as names
from runtime.model_file.reader import GgufFile


def stored_predictor(file: GgufFile, i: int) -> tuple[Candidate, Floats] | None:
    """Block `i`'s predictor and its bias, float32 [n_ff] (a neuron is computed where score + bias > 0); None where it
    has none. Neurons are those of all experts, expert by expert.
    """
    s = file.structure
    if s.rank(i) == 0:
        return None
    stems = names.stems(s.ffns[i])
    bias = file.read(names.bias_of(i, stems.predictor_out)).view(np.float32)
    if s.predictor == "signbit":
        return SignBit((_matrix(file, i, stems.predictor_sign),), s.rank(i)), bias
    tensors = tuple(_matrix(file, i, names.weight(stem)) for stem in (names.PREDICTOR_IN, stems.predictor_out))
    kind = Mlp if s.predictor == "mlp" else LowRank
    return kind(tensors, s.rank(i), tensors[1].type, (tensors[0].floats(), tensors[1].floats())), bias


def _matrix(file: GgufFile, i: int, short: str) -> Tensor:
    info = file.tensors[names.in_block(i, short)]
    return Tensor(short, info.type, (info.ne[0], math.prod(info.ne[1:])), file.read(info.name))
