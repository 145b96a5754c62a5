"""What a model file says of its own structure, and which tensors that requires.

The converter writes it, the runtime builds its graph from it: neither side knows an architecture's name. The keys and tensors are those of docs/format.md.
This module knows nothing of files, graphs or checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from runtime.bindings.ffn_shape import ACTIVATIONS, FfnShape
from runtime.errors import UserError

ARCHITECTURE = "lazyneuron"
SCHEMA_VERSION = 2  # the newest; a file names the oldest whose readers compute it rightly
_VERSIONS = range(1, SCHEMA_VERSION + 1)

NORMS = ("rms", "layer")
NORM_PLACEMENTS = ("pre", "post")
POSITIONS = ("rope_norm", "rope_neox", "learned")
ROPE_SCALINGS = ("none", "linear")
RESIDUALS = ("sequential", "parallel")
QK_NORMS = ("none", "before_rope", "after_rope")
GATES = ("none", "gated")
LAYOUTS = ("both", "sparse")
NEURON_ORDERS = ("original", "hot")
PREDICTOR_KINDS = ("none", "lowrank", "mlp", "signbit")
PREDICTOR_TAPS = ("ffn_norm", "residual")


def _key(name: str, choices: tuple[str, ...] = (), since: int = 1, **kwargs: Any) -> Any:
    """since: the first schema version that knows the key; older readers would ignore it."""
    return field(metadata={"key": name, "choices": choices, "since": since}, **kwargs)


@dataclass(frozen=True)
class Attention:
    """Causal self-attention of one block. window: how many positions a token sees, itself included; 0 for all. rope: whether positions rotate queries and keys."""

    head_count: int
    head_count_kv: int
    head_length: int
    rope: bool = True
    window: int = 0

    @property
    def query_length(self) -> int:
        """Elements of one token's queries."""
        return self.head_length * self.head_count

    @property
    def kv_length(self) -> int:
        """Elements of one token's keys, and of its values."""
        return self.head_length * self.head_count_kv


@dataclass(frozen=True)
class Block:
    """One block: what mixes tokens, and what is computed of each token by itself. None where it has no such half."""

    mixer: Attention | None
    ffn: FfnShape | None


@dataclass(frozen=True)
class Structure:
    """A decoder-only transformer with a ReLU-family FFN. One field per GGUF key `lazyneuron.<key>`.

    Lengths are in elements: n_embd = embedding_length, n_ff = feed_forward_length.
    """

    source_architecture: str = _key("source_architecture")
    vocab_size: int = _key("vocab_size")
    context_length: int = _key("context_length")
    embedding_length: int = _key("embedding_length")
    block_count: int = _key("block_count")
    feed_forward_length: int = _key("feed_forward_length")
    head_count: int = _key("attention.head_count")
    head_count_kv: int = _key("attention.head_count_kv")
    head_length: int = _key("attention.key_length")
    norm: str = _key("norm", NORMS)
    norm_epsilon: float = _key("norm_epsilon")
    position: str = _key("position", POSITIONS)
    ffn_gate: str = _key("ffn.gate", GATES)
    ffn_activation: str = _key("ffn.activation", ACTIVATIONS)

    norm_placement: str = _key("norm_placement", NORM_PLACEMENTS, default="pre")
    output_norm: bool = _key("output_norm", default=True)
    residual: str = _key("residual", RESIDUALS, default="sequential")
    activation_threshold: float = _key("ffn.activation_threshold", default=0.0)
    ffn_bias: bool = _key("ffn.bias", default=False)
    attention_bias: bool = _key("attention.bias", default=False)
    attention_output_bias: bool = _key("attention.output_bias", default=False)
    tied_output: bool = _key("tied_output", default=False)
    token_embedding_length: int = _key("token_embedding_length", default=0)  # 0: the same as embedding_length
    embedding_norm: bool = _key("embedding_norm", since=2, default=False)
    embedding_scale: float = _key("embedding_scale", since=2, default=1.0)
    residual_scale: float = _key("residual_scale", since=2, default=1.0)
    logit_scale: float = _key("logit_scale", since=2, default=1.0)
    logit_softcap: float = _key("logit_softcap", since=2, default=0.0)  # 0: none
    qk_norm: str = _key("attention.qk_norm", QK_NORMS, since=2, default="none")
    attention_sub_norm: bool = _key("attention.sub_norm", since=2, default=False)
    ffn_sub_norm: bool = _key("ffn.sub_norm", since=2, default=False)
    rope_dimension_count: int = _key("rope.dimension_count", default=0)
    rope_freq_base: float = _key("rope.freq_base", default=10000.0)
    rope_scaling: str = _key("rope.scaling.type", ROPE_SCALINGS, default="none")
    rope_scaling_factor: float = _key("rope.scaling.factor", default=1.0)
    rope_freq_factors: bool = _key("rope.freq_factors", default=False)
    rope_attention_factor: float = _key("rope.scaling.attn_factor", since=2, default=1.0)
    layout: str = _key("layout", LAYOUTS, default="both")
    neuron_order: str = _key("neuron_order", NEURON_ORDERS, default="original")
    predictor: str = _key("predictor.kind", PREDICTOR_KINDS, default="none")
    predictor_tap: str = _key("predictor.tap", PREDICTOR_TAPS, default="ffn_norm")
    # One per block; rank 0: no predictor, the block is computed exactly. A sign-bit predictor has rank embedding_length.
    predictor_rank: tuple[int, ...] = _key("predictor.rank", default=())
    # One per block: what the scores are typically off by; the unit of a shift of the threshold at run time.
    predictor_error: tuple[float, ...] = _key("predictor.error", default=())

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks, each with sizes of its own."""
        attention = Attention(self.head_count, self.head_count_kv, self.head_length, self.position.startswith("rope"))
        ffn = FfnShape(
            self.embedding_length,
            self.feed_forward_length,
            self.gated,
            self.ffn_activation,
            self.activation_threshold,
            self.ffn_bias,
            self.ffn_sub_norm,
        )
        return (Block(attention, ffn),) * self.block_count

    @property
    def gated(self) -> bool:
        """Whether a neuron has a gate row beside its up row."""
        return self.ffn_gate == "gated"

    @property
    def kv_length(self) -> int:
        """Elements of one token's keys (and of its values) in one layer."""
        return self.head_length * self.head_count_kv

    @property
    def product_length(self) -> int:
        """Elements of an FFN's product for one token: n_embd, and the sum of its neurons' squares where they are normalised."""
        return self.embedding_length + self.ffn_sub_norm

    def rank(self, i: int) -> int:
        """Rank of block `i`'s predictor, 0 where it has none."""
        return self.predictor_rank[i] if self.predictor_rank else 0

    @property
    def projected(self) -> bool:
        """Whether token embeddings have another width than the blocks."""
        return self.token_embedding_length not in (0, self.embedding_length)

    def to_metadata(self) -> dict[str, Any]:
        """The GGUF key-value pairs that describe this structure, schema version included; per-block values as lists."""
        values = {f.metadata["key"]: getattr(self, f.name) for f in fields(self)}
        described = {
            f"{ARCHITECTURE}.{key}": list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
            if value != ()
        }
        needed = [f.metadata["since"] for f in fields(self) if getattr(self, f.name) != f.default]
        return {f"{ARCHITECTURE}.schema_version": max(needed), **described}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], where: str) -> Structure:
        """Read the structure back from GGUF key-value pairs; `where` names the file in errors.

        Raises UserError for another architecture or schema version, a missing key, a value of the wrong type or out of its range.
        """
        check_schema(metadata, where)
        structure = cls(**{f.name: _value(f, metadata, where) for f in fields(cls)})
        _check(structure, where)
        return structure


def check_schema(metadata: Mapping[str, Any], where: str) -> None:
    """Refuse a GGUF file that is not ours, or of another schema version."""
    found = metadata.get("general.architecture")
    if found != ARCHITECTURE:
        raise UserError(
            f"{where}: general.architecture is `{found}`, expected `{ARCHITECTURE}`",
            "convert the original Hugging Face checkpoint: python -m convert REPO OUT.gguf",
        )
    version = metadata.get(f"{ARCHITECTURE}.schema_version")
    if type(version) is not int or version not in _VERSIONS:
        raise UserError(
            f"{where}: schema version {version}, expected 1 to {SCHEMA_VERSION}",
            "convert the checkpoint again with this version of lazyneuron, or use the version that wrote the file",
        )


def _value(f: Any, metadata: Mapping[str, Any], where: str) -> Any:
    key = f"{ARCHITECTURE}.{f.metadata['key']}"
    if key not in metadata:
        if f.default is MISSING:
            raise UserError(f"{where}: no key `{key}`", "the file is incomplete: convert the checkpoint again")
        return f.default
    if str(f.type).startswith("tuple"):
        return _values(metadata[key], key, int if "int" in str(f.type) else float, where)
    value, kind = metadata[key], {"int": int, "float": float, "bool": bool, "str": str}[str(f.type)]
    if type(value) is not kind:
        raise UserError(f"{where}: `{key}` is {value!r}, expected {kind.__name__}")
    choices = f.metadata["choices"]
    if choices and value not in choices:
        raise UserError(f"{where}: `{key}` is `{value}`, expected one of {', '.join(choices)}")
    return value


def _values(found: Any, key: str, kind: type, where: str) -> tuple[Any, ...]:
    values = found.tolist() if isinstance(found, np.ndarray) else found
    fitting = (int,) if kind is int else (int, float)
    if not isinstance(values, list) or not all(type(value) in fitting for value in values):
        raise UserError(f"{where}: `{key}` is {found!r}, expected one {kind.__name__} per block")
    return tuple(map(kind, values))


# Lengths beyond these are taken for damage before anything is allocated.
_LIMITS = {
    "vocab_size": 1 << 24,
    "context_length": 1 << 27,
    "embedding_length": 1 << 20,
    "block_count": 1 << 14,
    "feed_forward_length": 1 << 24,
    "head_count": 1 << 14,
    "head_count_kv": 1 << 14,
    "head_length": 1 << 16,
}


_LARGEST = 3.4e38  # of a number: what an F32 holds


def _check(s: Structure, where: str) -> None:
    for f in fields(s):
        value = getattr(s, f.name)
        if any(
            isinstance(v, float) and not abs(v) <= _LARGEST for v in (value if isinstance(value, tuple) else (value,))
        ):
            raise UserError(f"{where}: `{ARCHITECTURE}.{f.metadata['key']}` is {value}, expected finite numbers")
    for name, limit in _LIMITS.items():
        if not 0 < getattr(s, name) <= limit:
            raise UserError(f"{where}: {name} is {getattr(s, name)}, expected 1 to {limit}")
    if s.head_count % s.head_count_kv:
        raise UserError(f"{where}: {s.head_count} heads, expected a multiple of the {s.head_count_kv} key-value heads")
    if s.position.startswith("rope") and not (
        0 < s.rope_dimension_count <= s.head_length and s.rope_dimension_count % 2 == 0
    ):
        raise UserError(
            f"{where}: rope.dimension_count is {s.rope_dimension_count}, expected an even number up to the head length {s.head_length}"
        )
    if s.predictor != "none" and not len(s.predictor_rank) == len(s.predictor_error) == s.block_count:
        raise UserError(
            f"{where}: predictor ranks and errors for {len(s.predictor_rank)} and {len(s.predictor_error)} blocks, expected {s.block_count}"
        )
    if any(not 0 <= rank <= 1 << 20 for rank in s.predictor_rank):
        raise UserError(f"{where}: a predictor rank of {max(s.predictor_rank)}, expected 0 to {1 << 20}")
    if not (0 < s.norm_epsilon < 1 and s.rope_freq_base > 0 and s.rope_scaling_factor > 0):
        raise UserError(
            f"{where}: norm_epsilon, rope.freq_base and rope.scaling.factor must be positive (norm_epsilon below 1)"
        )
    scales = (s.embedding_scale, s.residual_scale, s.logit_scale, s.rope_attention_factor)
    if min(scales) <= 0 or min(s.logit_softcap, s.activation_threshold) < 0:
        raise UserError(
            f"{where}: the scales of embeddings, residuals, logits and rotation must be positive, "
            "logit_softcap and ffn.activation_threshold 0 or more"
        )
    if s.residual == "parallel" and s.norm_placement != "pre":
        raise UserError(
            f"{where}: residual is `parallel`, expected norm_placement `pre` with it, found `{s.norm_placement}`"
        )
    if s.ffn_activation == "drelu" and not s.gated:
        raise UserError(f"{where}: ffn.activation is `drelu`, expected ffn.gate `gated` with it, found `{s.ffn_gate}`")


def block_tensors(s: Structure) -> dict[str, tuple[int, ...]]:
    """Tensors of one block without their `blk.N.` prefix -> shape in ggml's order, contiguous dimension first."""
    d, ff = s.embedding_length, s.feed_forward_length
    q, kv = s.head_length * s.head_count, s.kv_length
    tensors: dict[str, tuple[int, ...]] = {
        **_norm(s, "attn_norm", d),
        "attn_q.weight": (d, q),
        "attn_k.weight": (d, kv),
        "attn_v.weight": (d, kv),
        "attn_output.weight": (q, d),
        **_norm(s, "ffn_norm", d),
        "ffn_up.weight": (d, ff),
        "ffn_down_t.weight": (d, ff),
    }
    if s.attention_bias:
        tensors |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    if s.attention_output_bias:
        tensors["attn_output.bias"] = (d,)
    if s.qk_norm != "none":
        tensors |= _norm(s, "attn_q_norm", s.head_length) | _norm(s, "attn_k_norm", s.head_length)
    if s.attention_sub_norm:
        tensors |= _norm(s, "attn_sub_norm", q)
    if s.gated:
        tensors["ffn_gate.weight"] = (d, ff)
    if s.layout == "both":
        tensors["ffn_down.weight"] = (ff, d)
    if s.ffn_bias:
        tensors |= {"ffn_up.bias": (ff,), "ffn_down.bias": (d,)} | ({"ffn_gate.bias": (ff,)} if s.gated else {})
    return tensors


def neuron_tensors(s: Structure, i: int) -> dict[str, tuple[int, ...]]:
    """What block `i` stores of its neurons' order and their predictor, without its prefix -> shape in ggml's order."""
    d, ff, r = s.embedding_length, s.feed_forward_length, s.rank(i)
    tensors: dict[str, tuple[int, ...]] = {}
    if s.neuron_order == "hot":
        tensors |= {"ffn_neuron_index": (ff,), "ffn_neuron_freq": (ff,)}
    if r and s.predictor == "signbit":
        tensors |= {"predictor_sign": (d // 8, ff), "predictor_out.bias": (ff,)}
    elif r:
        tensors |= {"predictor_in.weight": (d, r), "predictor_out.weight": (r, ff), "predictor_out.bias": (ff,)}
    return tensors


def required_tensors(s: Structure) -> dict[str, tuple[int, ...]]:
    """Every tensor that a file of this structure must hold -> shape in ggml's order, contiguous dimension first."""
    d = s.embedding_length
    e = s.token_embedding_length or d
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (e, s.vocab_size)}
    if s.projected:
        tensors |= {"token_embd_proj.weight": (e, d), "output_proj.weight": (d, e)}
    if s.position == "learned":
        tensors["position_embd.weight"] = (d, s.context_length)
    if s.embedding_norm:
        tensors |= _norm(s, "token_embd_norm", d)
    if s.rope_freq_factors:
        tensors["rope_freqs.weight"] = (s.rope_dimension_count // 2,)
    for i in range(s.block_count):
        block = block_tensors(s) | neuron_tensors(s, i)
        tensors |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    if s.output_norm:
        tensors |= _norm(s, "output_norm", d)
    if not s.tied_output:
        tensors["output.weight"] = (e, s.vocab_size)
    return tensors


def _norm(s: Structure, name: str, width: int) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias") if s.norm == "layer" else ("weight",)
    return {f"{name}.{part}": (width,) for part in parts}
