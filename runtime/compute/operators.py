"""Our own operators as nodes of a ggml graph: the sparse FFN and the choice of its candidates.

Shapes in comments are ggml's: the contiguous dimension first. Knows tensors; knows nothing of files or of where a tensor lies.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.bindings import ggml, sparse_ffn


@dataclass(frozen=True)
class NativeTensors:
    """The rows of one FFN. Ungated: `gate` holds the up rows and `gate_bias` their bias; `up` is absent."""

    gate: ggml.TensorP
    down: ggml.TensorP
    up: ggml.TensorP | None = None
    gate_bias: ggml.TensorP | None = None
    up_bias: ggml.TensorP | None = None

    @property
    def types(self) -> tuple[int, int, int]:
        """ggml types of the gate, up and down rows."""
        return self.gate.type, (self.up or self.gate).type, self.down.type


def add_native_ffn(
    ctx: ggml.ContextP, x: ggml.TensorP, ffn: sparse_ffn.Ffn, t: NativeTensors, candidates: ggml.TensorP | None = None
) -> ggml.TensorP:
    """Add the operators of one sparse FFN: F32 [n_embd, n_tokens] -> its product, as long (see FfnShape.product_length).

    candidates: from `add_predictor`, or None for every neuron. `ffn` must outlive the graph, and counts its tokens.
    """
    n = x.ne[1]
    sparse_ffn.count(ffn, n)
    quantized = _custom(ctx, ffn, "quantize", ggml.I8, (ffn.x_stride, n), x)
    gate = _custom(
        ctx, ffn, "gate", ggml.I8, (sparse_ffn.gate_size(ffn, n), 1), quantized, t.gate, t.gate_bias, candidates
    )
    down = _custom(
        ctx, ffn, "down", ggml.I8, (sparse_ffn.down_size(ffn, n), 1), quantized, gate, t.down, t.up, t.up_bias
    )
    return _custom(ctx, ffn, "reduce", ggml.F32, (ffn.n_embd + ffn.squares, n), down, gate)


def add_predictor(
    ctx: ggml.ContextP, x: ggml.TensorP, ffn: sparse_ffn.Ffn, rows: ggml.TensorP, bias: ggml.TensorP, shift: float
) -> ggml.TensorP:
    """Add the operator that chooses an FFN's candidates: x F32 [rank, n_tokens] against predictor rows [rank, n_ff].

    Rows of type I8 are sign bits, and x is then F32 [n_embd, n_tokens].
    """
    signs = rows.type == ggml.I8
    sparse_ffn.predict(ffn, x.ne[0], None if signs else rows.type, shift)
    size = sparse_ffn.predict_size(ffn, x.ne[1])
    return _custom(ctx, ffn, "predict_sign" if signs else "predict", ggml.I8, (size, 1), x, rows, bias)


def add_choice(
    ctx: ggml.ContextP, scores: ggml.TensorP, ffn: sparse_ffn.Ffn, bias: ggml.TensorP, shift: float
) -> ggml.TensorP:
    """Add the operator that chooses an FFN's candidates by scores F32 [n_ff, n_tokens] computed elsewhere; as in `add_predictor`."""
    sparse_ffn.choose(ffn, shift)
    size = sparse_ffn.predict_size(ffn, scores.ne[1])
    return _custom(ctx, ffn, "choose", ggml.I8, (size, 1), scores, bias)


def _custom(
    ctx: ggml.ContextP, ffn: sparse_ffn.Ffn, name: str, type_id: int, ne: tuple[int, int], *sources: ggml.TensorP | None
) -> ggml.TensorP:
    given = [s for s in sources if s is not None]
    args = (ggml.TensorP * len(given))(*given)
    address = sparse_ffn.address_of(ffn)
    return ggml.ggml_custom_4d(
        ctx, type_id, *ne, 1, 1, args, len(given), sparse_ffn.operator(name), ffn.n_threads, address
    )
