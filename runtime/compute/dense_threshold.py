"""How a prompt's FFNs are computed fastest: row by row where neurons fire, or as whole matrices through ggml's
products.

A function of formats, of this CPU's kernels and of how many neurons are expected to fire; knows nothing of graphs. It
must not depend on what was computed before, so that a prompt always gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from runtime.bindings import sparse_ffn
from runtime.bindings.ffn_shape import FfnShape
from runtime.compute.products import repacked_for_a_batch, tiles_of_type
from runtime.compute.traffic import Activity
from runtime.model_file.frequencies import fired_share
from runtime.model_file.reader import GgufFile, TensorInfo
from runtime.model_file.structure import Structure
from runtime.model_file.tensor_names import Stems, row_matrices, weight_of

# Share of an FFN's rows from which on whole matrices are faster, by format: time per token and row of ggml's product
# over that of the row kernels, many tokens at once.
# Measured on two Zen 4 cores by `python -m bench.batches` (docs/performance.md). In formats that have row kernels of
# ggml's only, the whole is faster from a few percent on.
# Above 1: ggml's products are slower even with every row.
_LIMITS = {
    "f32": 0.39, "f16": 0.41, "bf16": 0.31, "q8_0": 0.52, "q4_0": 0.61, "q4_1": 1.47, "q5_0": 0.61, "q5_1": 1.45,
    "iq4_nl": 0.57, "q4_k": 0.26, "q5_k": 0.28, "q6_k": 0.31, "iq4_xs": 0.21,
}  # fmt: skip
_OTHER_LIMIT = 0.05
# The same where tiles multiply the whole matrices (and in `exact` mode the gates): share of the neurons that fire.
_TILED_LIMITS = {
    ("avx2", "q4_0"): 0.36,
    ("avxvnni", "q4_0"): 0.36,
    ("avx512", "q4_0"): 0.25,
    ("avx512", "q8_0"): 0.17,
    # Not measured: cycles of the inner loops as llvm-mca counts them (docs/log.md).
    ("neon", "q4_0"): 0.16,
    ("neon", "q8_0"): 0.16,
    ("i8mm", "q4_0"): 0.12,
    ("i8mm", "q8_0"): 0.12,
}
_FILL = 12  # tokens whose products take as long as repacking the matrices that they need
_FEWEST = (
    sparse_ffn.FEW_TOKENS + 1
)  # tokens: fewer have the bits that each has alone, which whole matrices would change
_OVERSHOOT = 1.5  # candidates per neuron that fires, where the file does not say


def dense_from(s: Structure, tensors: Mapping[str, TensorInfo], activity: Activity) -> tuple[float, ...]:
    """For each block, the number of tokens at once from which whole matrices are faster; infinity where they never are.

    Blocks need not have the same types.
    """
    found = [math.inf] * s.block_count
    if s.layout == "both" and activity.ffn != "dense":
        for i, ffn in ((i, ffn) for i, ffn in s.ffns.items() if not ffn.experts):
            found[i] = _dense_from(ffn, tensors, activity, i, _fill(tensors, i))
    return tuple(found)


def _fill(tensors: Mapping[str, TensorInfo], i: int) -> float:
    """Tokens whose products take as long as repacking those matrices of block `i` that have to be."""
    found = [tensor for stem in Stems().matrices if (tensor := tensors.get(weight_of(i, stem)))]
    return _FILL * sum(repacked_for_a_batch(tensor.type_id) for tensor in found) / len(found)


def _dense_from(ffn: FfnShape, tensors: Mapping[str, TensorInfo], activity: Activity, i: int, fill: float) -> float:
    found = [tensors[weight_of(i, stem)] for stem in row_matrices(ffn)]
    tiled, n = all(tiles_of_type(tensor.type_id) for tensor in found), len(found)
    variant = sparse_ffn.VARIANTS[sparse_ffn.variant()]
    limits = [_TILED_LIMITS.get((variant, t.type)) if tiled else _LIMITS.get(t.type) for t in found]
    limit = min(_OTHER_LIMIT if limit is None else limit for limit in limits)
    gates = activity.fired[i] if tiled and activity.ffn == "exact" else activity.gates[i]
    share = (gates + (n - 1) * activity.fired[i]) / n
    if share <= limit:
        return math.inf
    return max(_FEWEST, math.ceil(fill / (share / limit - 1)))


def expected(file: GgufFile, ffn: str, predictor_bias: float) -> Activity:
    """The activity that the file's calibration lets expect; without calibration, that of a model whose neurons all
    fire. Neurons of a shared expert fire as often as those of the chosen ones, and are all candidates.
    """
    s = file.structure
    if s.neuron_order != "hot":
        return Activity.uniform(ffn, s.block_count, 1.0)
    fired = [0.0] * s.block_count
    for i in s.ffns:
        fired[i] = fired_share(file, i)
    gates = candidate_shares(file, ffn, predictor_bias, fired)
    reached = [(block.ffn.n_reached if block.ffn else 0, block.n_reached or 1) for block in s.blocks]
    return Activity(ffn, fired, [1 - (1 - g) * own / n for g, (own, n) in zip(gates, reached, strict=True)])


def candidate_shares(file: GgufFile, ffn: str, predictor_bias: float, fired: Sequence[float]) -> list[float]:
    """By block, the share of the neurons that a token may use, a shared expert's aside, whose first rows it reads.
    fired: the share that fires.
    """
    s = file.structure
    if ffn != "predicted" or predictor_bias > 0 or s.neuron_order != "hot":
        return [1.0] * s.block_count
    stored = file.metadata.get("lazyneuron.predictor.predicted_share", ())
    shares: Sequence[float] = stored if len(stored) else [min(1.0, _OVERSHOOT * f) for f in fired]
    return [float(share) if s.rank(i) else 1.0 for i, share in enumerate(shares)]
