"""One ggml graph: `n_tokens` new tokens through a model, or through some of its blocks, built from the file's own description.

Shapes in comments are ggml's: the contiguous dimension first. Knows no architecture by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from runtime import ggml, native_ffn
from runtime.errors import UserError
from runtime.repack import Fill, Repacked
from runtime.structure import Structure
from runtime.weights import KvCache, Weights, new_context

FFN_MATRICES = ("ffn_gate", "ffn_up", "ffn_down")
_NODES_PER_BLOCK = 64
_NULL = ggml.TensorP()


@dataclass(frozen=True)
class GraphSpec:
    """What distinguishes one graph of a model from another."""

    n_tokens: int
    n_kv: int  # positions that attention reads, padded
    n_outputs: int  # the last token (1) or all of them
    ffn: str  # "dense", "exact" or "predicted"
    n_threads: int
    flash_attention: bool = True
    predictor_bias: float = 0.0  # in units of each block's predictor_error
    dense_from: tuple[float, ...] = ()  # by block: so many tokens at once go through every neuron, whatever `ffn` says
    # A part of the model: from the hidden states before block `first` (None: from token ids) to those before block `end` (None: to logits).
    first: int | None = None
    end: int | None = None


@dataclass
class Graph:
    """A built and allocated graph. Call `run` from the thread that owns ggml; `close` frees it."""

    spec: GraphSpec
    structure: Structure
    weights: Weights
    kv: KvCache
    backend: ggml.BackendP
    scratch: Repacked | None = (
        None  # FFN_MATRICES of one block, for blocks that are computed densely without being copied
    )
    ffns: dict[int, native_ffn.Ffn] = field(default_factory=dict)  # by block
    taps: dict[str, ggml.TensorP] = field(default_factory=dict)  # inner results of a part of the model

    def __post_init__(self) -> None:
        size = self.structure.block_count * _NODES_PER_BLOCK + 64
        self.ctx = new_context(2 * size, ggml.ggml_graph_overhead_custom(size, False))
        self.graph = ggml.ggml_new_graph_custom(self.ctx, size, False)
        self._inputs()
        self.output = _Builder(self).build()
        ggml.ggml_set_output(self.output)
        ggml.ggml_build_forward_expand(self.graph, self.output)
        self._check_supported()
        self._allocator = ggml.ggml_gallocr_new(ggml.ggml_backend_cpu_buffer_type())
        if not ggml.ggml_gallocr_alloc_graph(self._allocator, self.graph):
            self.close()
            raise UserError(
                f"not enough memory for the compute buffer of {self.spec.n_tokens} tokens", "use a smaller --n-ctx"
            )

    def _inputs(self) -> None:
        n, spec = self.spec.n_tokens, self.spec
        if spec.first is None:
            self.input = self._input(b"tokens", ggml.I32, n)
        else:
            self.input = self._input(b"hidden", ggml.F32, self.structure.embedding_length, n)
        self.positions = self._input(b"positions", ggml.I32, n)
        self.cells = self._input(b"cells", ggml.I64, n)  # rows of the KV cache that the new tokens take
        self.mask = self._input(b"mask", ggml.F16, spec.n_kv, n)
        self.outputs = self._input(b"outputs", ggml.I32, spec.n_outputs)
        self._mask = np.empty((n, spec.n_kv), np.float16)

    def _input(self, name: bytes, type_id: int, ne0: int, ne1: int = 1) -> ggml.TensorP:
        tensor = ggml.ggml_new_tensor_2d(self.ctx, type_id, ne0, ne1)
        ggml.ggml_set_name(tensor, name)
        ggml.ggml_set_input(tensor)
        # Listed even where nothing reads it, so that it always has memory.
        ggml.ggml_build_forward_expand(self.graph, tensor)
        return tensor

    def _check_supported(self) -> None:
        device = ggml.ggml_backend_get_device(self.backend)
        for i in range(ggml.ggml_graph_n_nodes(self.graph)):
            node = ggml.ggml_graph_node(self.graph, i)
            if not ggml.ggml_backend_dev_supports_op(device, ggml.ConstTensorP(node.value)):
                name = node.struct.name.decode()
                raise UserError(
                    f"this build of ggml cannot compute `{name}` (operation {node.struct.op}, type {node.type})"
                )

    def run(self, data: npt.NDArray[np.int32] | npt.NDArray[np.float32], start: int) -> npt.NDArray[np.float32]:
        """Compute the tokens at positions start.. and return logits, float32 [n_outputs, n_vocab].

        data: ids, int32 [n_tokens]; or hidden states, float32 [n_tokens, n_embd], where the graph starts from them.
        A graph that ends before the last block returns hidden states.
        """
        n = self.spec.n_tokens
        positions = np.arange(start, start + n, dtype=np.int32)
        self._mask.fill(0)
        self._mask[np.arange(self.spec.n_kv)[None, :] > positions[:, None]] = -np.inf
        _set(self.input, data)
        _set(self.positions, positions)
        _set(self.cells, positions.astype(np.int64))
        _set(self.mask, self._mask)
        _set(self.outputs, np.arange(n - self.spec.n_outputs, n, dtype=np.int32))
        if ggml.ggml_backend_graph_compute(self.backend, self.graph) != ggml.STATUS_SUCCESS:
            raise RuntimeError("ggml could not compute the graph")
        return read(self.output)

    @property
    def buffer_size(self) -> int:
        """Bytes of the compute buffer."""
        return ggml.ggml_gallocr_get_buffer_size(self._allocator, 0)

    def close(self) -> None:
        """Free the graph and its compute buffer."""
        ggml.ggml_gallocr_free(self._allocator)
        ggml.ggml_free(self.ctx)


def _set(tensor: ggml.TensorP, array: npt.NDArray[np.generic]) -> None:
    ggml.ggml_backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)


def read(tensor: ggml.TensorP) -> npt.NDArray[np.float32]:
    """A copy of an F32 matrix, [ne1, ne0]."""
    array = np.empty((tensor.ne[1], tensor.ne[0]), np.float32)
    ggml.ggml_backend_tensor_get(ggml.ConstTensorP(tensor.value), array.ctypes.data, 0, array.nbytes)
    return array


class _Builder:
    """Adds the operations of one graph to its context."""

    def __init__(self, graph: Graph) -> None:
        self.g, self.ctx, self.w, self.s, self.spec = graph, graph.ctx, graph.weights, graph.structure, graph.spec

    def build(self) -> ggml.TensorP:
        """Add every operation; returns the logits [n_vocab, n_outputs], or hidden states [n_embd, n_tokens]."""
        x = self.embeddings() if self.spec.first is None else self.g.input
        end = self.spec.end
        for i in range(self.spec.first or 0, self.s.block_count if end is None else end):
            x = self.block(x, i)
        if end is not None:
            return x
        if self.s.output_norm:
            x = self.norm(x, "output_norm")
        if self.s.projected:
            x = self.linear(x, "output_proj")
        head = "token_embd" if self.s.tied_output else "output"
        return self.linear(x, head)

    def embeddings(self) -> ggml.TensorP:
        """Token embeddings, projected and with learned positions where there are any: [n_embd, n_tokens]."""
        x = ggml.ggml_get_rows(self.ctx, self.w["token_embd.weight"], self.g.input)
        if self.s.projected:
            x = self.linear(x, "token_embd_proj")
        if self.s.position == "learned":
            x = ggml.ggml_add(
                self.ctx, x, ggml.ggml_get_rows(self.ctx, self.w["position_embd.weight"], self.g.positions)
            )
        return x

    def block(self, x: ggml.TensorP, i: int) -> ggml.TensorP:
        """One transformer block; the last one keeps only the tokens whose logits are wanted."""
        pre = self.s.norm_placement == "pre"
        h = ggml.ggml_add(self.ctx, x, self.attention(self.norm(x, f"blk.{i}.attn_norm") if pre else x, i))
        if i == self.s.block_count - 1 and self.spec.n_outputs < self.spec.n_tokens:
            h = ggml.ggml_get_rows(self.ctx, h, self.g.outputs)
        if pre:
            return ggml.ggml_add(self.ctx, h, self.ffn(self.norm(h, f"blk.{i}.ffn_norm"), h, i))
        residual, h = h, self.norm(h, f"blk.{i}.attn_norm")
        return self.norm(ggml.ggml_add(self.ctx, h, self.ffn(h, residual, i)), f"blk.{i}.ffn_norm")

    def norm(self, x: ggml.TensorP, name: str) -> ggml.TensorP:
        """RMS or layer norm over n_embd, scaled (and shifted)."""
        normalise = ggml.ggml_rms_norm if self.s.norm == "rms" else ggml.ggml_norm
        x = ggml.ggml_mul(self.ctx, normalise(self.ctx, x, self.s.norm_epsilon), self.w[f"{name}.weight"])
        return self.biased(x, name)

    def linear(self, x: ggml.TensorP, name: str) -> ggml.TensorP:
        """[n_in, n] -> [n_out, n]."""
        return self.biased(ggml.ggml_mul_mat(self.ctx, self.w.matrix(f"{name}.weight"), x), name)

    def biased(self, x: ggml.TensorP, name: str) -> ggml.TensorP:
        bias = self.w.get(f"{name}.bias")
        return ggml.ggml_add(self.ctx, x, bias) if bias else x

    # --- attention ---------------------------------------------------------------------------------------------------

    def attention(self, x: ggml.TensorP, i: int) -> ggml.TensorP:
        """Causal self-attention of the new tokens over the cache: [n_embd, n_tokens]."""
        s, n = self.s, self.spec.n_tokens
        q = self.heads(x, f"blk.{i}.attn_q", s.head_count)
        k = self.heads(x, f"blk.{i}.attn_k", s.head_count_kv)
        if s.position.startswith("rope"):
            q, k = self.rope(q), self.rope(k)
        keys = self.remember(
            self.g.kv.keys[i - (self.spec.first or 0)], ggml.ggml_reshape_2d(self.ctx, k, s.kv_length, n)
        )
        values = self.remember(self.g.kv.values[i - (self.spec.first or 0)], self.linear(x, f"blk.{i}.attn_v"))
        q = ggml.ggml_permute(self.ctx, q, 0, 2, 1, 3)  # [head_length, n_tokens, head_count]
        return self.linear(self.attend(q, keys, values), f"blk.{i}.attn_output")

    def heads(self, x: ggml.TensorP, name: str, n_heads: int) -> ggml.TensorP:
        """[head_length, n_heads, n_tokens]."""
        return ggml.ggml_reshape_3d(self.ctx, self.linear(x, name), self.s.head_length, n_heads, self.spec.n_tokens)

    def rope(self, x: ggml.TensorP) -> ggml.TensorP:
        s = self.s
        mode = ggml.ROPE_TYPE_NEOX if s.position == "rope_neox" else ggml.ROPE_TYPE_NORMAL
        factors = self.w["rope_freqs.weight"] if s.rope_freq_factors else _NULL
        scale = 1 / s.rope_scaling_factor if s.rope_scaling == "linear" else 1.0
        return ggml.ggml_rope_ext(
            self.ctx, x, self.g.positions, factors, s.rope_dimension_count, mode, 0, s.rope_freq_base, scale,
            0.0, 1.0, 0.0, 0.0,
        )  # fmt: skip

    def remember(self, cache: ggml.TensorP, new: ggml.TensorP) -> ggml.TensorP:
        """Write the new tokens' rows into the cache; returns [head_length, n_kv, head_count_kv]."""
        cache = ggml.ggml_set_rows(self.ctx, cache, new, self.g.cells)
        row, head = cache.nb[1], ggml.ggml_row_size(cache.type, self.s.head_length)
        return ggml.ggml_view_3d(
            self.ctx, cache, self.s.head_length, self.spec.n_kv, self.s.head_count_kv, row, head, 0
        )

    def attend(self, q: ggml.TensorP, keys: ggml.TensorP, values: ggml.TensorP) -> ggml.TensorP:
        """[head_length * head_count, n_tokens]."""
        s, scale = self.s, 1 / math.sqrt(self.s.head_length)
        width = s.head_length * s.head_count
        flash = ggml.ggml_flash_attn_ext(self.ctx, q, keys, values, self.g.mask, scale, 0.0, 0.0)
        device = ggml.ggml_backend_get_device(self.g.backend)
        if self.spec.flash_attention and ggml.ggml_backend_dev_supports_op(device, ggml.ConstTensorP(flash.value)):
            return ggml.ggml_reshape_2d(self.ctx, flash, width, self.spec.n_tokens)
        weights = ggml.ggml_mul_mat(self.ctx, keys, q)  # [n_kv, n_tokens, head_count]
        weights = ggml.ggml_soft_max_ext(self.ctx, weights, self.g.mask, scale, 0.0)
        turned = ggml.ggml_cont(
            self.ctx, ggml.ggml_permute(self.ctx, values, 1, 0, 2, 3)
        )  # [n_kv, head_length, head_count_kv]
        mixed = ggml.ggml_mul_mat(self.ctx, turned, weights)  # [head_length, n_tokens, head_count]
        mixed = ggml.ggml_cont(self.ctx, ggml.ggml_permute(self.ctx, mixed, 0, 2, 1, 3))
        return ggml.ggml_reshape_2d(self.ctx, mixed, width, self.spec.n_tokens)

    # --- FFN ---------------------------------------------------------------------------------------------------------

    def ffn(self, x: ggml.TensorP, residual: ggml.TensorP, i: int) -> ggml.TensorP:
        """[n_embd, n] -> [n_embd, n]; residual: the stream before the FFN's norm."""
        if self.spec.end is not None:
            self.tap("ffn_input", x)
            self.tap("residual", residual)
        if self.spec.ffn == "dense" or (self.spec.dense_from and x.ne[1] >= self.spec.dense_from[i]):
            y = self.ffn_dense(x, i)
        elif self.spec.ffn == "predicted" and self.s.rank(i):
            y = self.ffn_native(x, self.candidates(x if self.s.predictor_tap == "ffn_norm" else residual, i), i)
        else:
            y = self.ffn_native(x, None, i)
        return self.biased(y, f"blk.{i}.ffn_down")

    def tap(self, name: str, x: ggml.TensorP) -> None:
        """Keep an inner result for whoever runs a part of the model."""
        ggml.ggml_set_output(x)
        self.g.taps[name] = x

    def ffn_dense(self, x: ggml.TensorP, i: int) -> ggml.TensorP:
        """Every neuron, through ggml's own products."""
        staged = {name: tensor for name in FFN_MATRICES if (tensor := self.staged(name, i))}
        if staged and self.g.scratch:
            # No other mode reads `ffn_down`: its pages are released again.
            fills = [Fill(name, f"blk.{i}.{name}.weight", release=name == "ffn_down") for name in staged]
            x = self.g.scratch.add_fill(self.ctx, x, i, fills)

        def product(x: ggml.TensorP, name: str) -> ggml.TensorP:
            return ggml.ggml_mul_mat(self.ctx, staged.get(name) or self.w.matrix(f"blk.{i}.{name}.weight"), x)

        h = self.biased(product(x, "ffn_up"), f"blk.{i}.ffn_up")
        if self.s.gated:
            gate = self.activate(self.biased(product(x, "ffn_gate"), f"blk.{i}.ffn_gate"))
            h = ggml.ggml_mul(self.ctx, gate, ggml.ggml_relu(self.ctx, h) if self.s.ffn_activation == "drelu" else h)
        else:
            h = self.activate(h)
        return product(h, "ffn_down")

    def staged(self, name: str, i: int) -> ggml.TensorP | None:
        """The scratch tensor that can hold this matrix of block `i`: blocks need not have the same formats."""
        tensor = self.g.scratch.tensors.get(name) if self.g.scratch else None
        return tensor if tensor and tensor.type == self.w[f"blk.{i}.{name}.weight"].type else None

    def activate(self, gate: ggml.TensorP) -> ggml.TensorP:
        if self.s.ffn_activation == "relu2":
            return ggml.ggml_sqr(self.ctx, ggml.ggml_relu(self.ctx, gate))
        if self.s.ffn_activation == "fatrelu":  # gate where it is above the threshold, else 0
            above = ggml.ggml_step(self.ctx, ggml.ggml_scale_bias(self.ctx, gate, 1.0, -self.s.activation_threshold))
            return ggml.ggml_mul(self.ctx, gate, above)
        return ggml.ggml_relu(self.ctx, gate)

    def ffn_native(self, x: ggml.TensorP, candidates: ggml.TensorP | None, i: int) -> ggml.TensorP:
        """Gate rows of every neuron (or of the candidates), up and down rows of those that fire: our own operators."""
        ffn = self.description(i)
        return add_native_ffn(self.ctx, x, ffn, native_tensors(self.w, self.s, i), candidates)

    def description(self, i: int) -> native_ffn.Ffn:
        """The userdata of block `i`'s operators, kept as long as the graph."""
        if i not in self.g.ffns:
            types = native_tensors(self.w, self.s, i).types
            self.g.ffns[i] = native_ffn.describe(self.s, types, self.spec.n_threads)
        return self.g.ffns[i]

    def candidates(self, x: ggml.TensorP, i: int) -> ggml.TensorP:
        """The neurons that block `i`'s predictor expects to fire, from its input x [n_embd, n]."""
        unit = self.s.predictor_error[i]
        shift = self.spec.predictor_bias * unit if math.isfinite(self.spec.predictor_bias) else self.spec.predictor_bias
        bias = self.w[f"blk.{i}.predictor_out.bias"]
        if self.s.predictor == "signbit":
            return add_predictor(self.ctx, x, self.description(i), self.w[f"blk.{i}.predictor_sign"], bias, shift)
        z = ggml.ggml_mul_mat(self.ctx, self.w.matrix(f"blk.{i}.predictor_in.weight"), x)  # [rank, n]
        if self.s.predictor == "mlp":
            z = ggml.ggml_relu(self.ctx, z)
        return add_predictor(self.ctx, z, self.description(i), self.w[f"blk.{i}.predictor_out.weight"], bias, shift)


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


def native_tensors(weights: Weights, s: Structure, i: int) -> NativeTensors:
    """The FFN rows of block `i`."""
    first = "ffn_gate" if s.gated else "ffn_up"
    return NativeTensors(
        gate=weights[f"blk.{i}.{first}.weight"],
        down=weights[f"blk.{i}.ffn_down_t.weight"],
        up=weights[f"blk.{i}.ffn_up.weight"] if s.gated else None,
        gate_bias=weights.get(f"blk.{i}.{first}.bias"),
        up_bias=weights.get(f"blk.{i}.ffn_up.bias") if s.gated else None,
    )


def add_native_ffn(
    ctx: ggml.ContextP, x: ggml.TensorP, ffn: native_ffn.Ffn, t: NativeTensors, candidates: ggml.TensorP | None = None
) -> ggml.TensorP:
    """Add the operators of one sparse FFN; x and the result are F32 [n_embd, n_tokens].

    candidates: from `add_predictor`, or None for every neuron. `ffn` must outlive the graph.
    """
    n = x.ne[1]
    quantized = _custom(ctx, ffn, "quantize", ggml.I8, (ffn.x_stride, n), x)
    gate = _custom(
        ctx, ffn, "gate", ggml.I8, (native_ffn.gate_size(ffn, n), 1), quantized, t.gate, t.gate_bias, candidates
    )
    down = _custom(
        ctx, ffn, "down", ggml.I8, (native_ffn.down_size(ffn, n), 1), quantized, gate, t.down, t.up, t.up_bias
    )
    return _custom(ctx, ffn, "reduce", ggml.F32, (ffn.n_embd, n), down, gate)


def add_predictor(
    ctx: ggml.ContextP, x: ggml.TensorP, ffn: native_ffn.Ffn, rows: ggml.TensorP, bias: ggml.TensorP, shift: float
) -> ggml.TensorP:
    """Add the operator that chooses an FFN's candidates: x F32 [rank, n_tokens] against predictor rows [rank, n_ff].

    Rows of type I8 are sign bits, and x is then F32 [n_embd, n_tokens].
    """
    signs = rows.type == ggml.I8
    native_ffn.predict(ffn, x.ne[0], None if signs else rows.type, shift)
    size = native_ffn.predict_size(ffn, x.ne[1])
    return _custom(ctx, ffn, "predict_sign" if signs else "predict", ggml.I8, (size, 1), x, rows, bias)


def _custom(
    ctx: ggml.ContextP, ffn: native_ffn.Ffn, name: str, type_id: int, ne: tuple[int, int], *sources: ggml.TensorP | None
) -> ggml.TensorP:
    given = [s for s in sources if s is not None]
    args = (ggml.TensorP * len(given))(*given)
    address = native_ffn.address_of(ffn)
    return ggml.ggml_custom_4d(
        ctx, type_id, *ne, 1, 1, args, len(given), native_ffn.operator(name), ffn.n_threads, address
    )
