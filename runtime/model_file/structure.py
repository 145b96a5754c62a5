"""What a model file says of its own structure: the model as a whole, and its blocks one by one.

The converter writes it, the runtime builds its graph from it: neither side knows an architecture's name. The keys are
those of docs/format.md; the tensors that follow from them are in tensor_shapes.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from runtime.bindings.ffn_shape import ACTIVATIONS, GATINGS, ROUTER_TAPS, Experts, FfnShape

ARCHITECTURE = "lazyneuron"
SCHEMA_VERSION = 3  # the newest; a file names the oldest whose readers compute it rightly

NORMS = ("rms", "layer")
NORM_PLACEMENTS = ("pre", "post")
POSITIONS = ("rope_norm", "rope_neox", "learned")
ROPE_SCALINGS = ("none", "linear")
RESIDUALS = ("sequential", "parallel")
QK_NORMS = ("none", "before_rope", "after_rope")
GATES = ("none", "gated")
PAGED = "paged"  # the layout with the rows of each neuron side by side: runtime/model_file/bundles.py
LAYOUTS = ("both", "sparse", PAGED)
NEURON_ORDERS = ("original", "hot")
PREDICTOR_KINDS = ("none", "lowrank", "mlp", "signbit")
PREDICTOR_TAPS = ("ffn_norm", "residual")

# Fields that may differ between blocks: an int for all, or a tuple of one for each. A tuple of equal ones becomes the
# int.
PER_BLOCK = (
    "feed_forward_length",
    "head_count",
    "head_count_kv",
    "rope_dimension_count",
    "expert_count",
    "expert_used_count",
    "ssm_time_step_rank",
    "expert_shared_feed_forward_length",
)
MIXED = 3  # the first schema version whose readers know lists of such values, and the layout `paged`


def _key(name: str, choices: tuple[str, ...] = (), since: int = 1, **kwargs: Any) -> Any:
    """since: the first schema version that knows the key; older readers would ignore it. From 3 on, defaults are not
    written.
    """
    return field(metadata={"key": name, "choices": choices, "since": since}, **kwargs)


def item_type(f: Any) -> type:
    """The type of a field's value, or of each of its values where it has one per block."""
    return next(kind for kind in (int, float, bool, str) if kind.__name__ in str(f.type))


@dataclass(frozen=True)
class Attention:
    """Causal self-attention of one block. Lengths are in elements.

    rope: how many elements of each query and key are rotated by its position; 0 for none.
    window: how many positions a token sees, itself included; 0 for all.
    """

    head_count: int
    head_count_kv: int
    head_length: int
    rope: int = 0
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
class Mamba2:
    """A Mamba-2 mixer of one block. Lengths are in elements.

    state_length: of the memory that each element of a head has, and of a group's B and C. group_count: the heads of a
    group share one B and one C. conv_length: the tokens that a channel of the convolution sees, the present one
    included.
    """

    head_count: int
    head_length: int
    state_length: int
    group_count: int
    conv_length: int

    @property
    def inner_length(self) -> int:
        """Elements of all heads."""
        return self.head_count * self.head_length

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: of x, B and C."""
        return self.inner_length + 2 * self.group_count * self.state_length

    @property
    def conv_state(self) -> int:
        """Numbers that a sequence keeps of the convolution: what came before the next token."""
        return (self.conv_length - 1) * self.conv_channels

    @property
    def scan_state(self) -> int:
        """Numbers that a sequence keeps of the scan: the memory of all heads."""
        return self.state_length * self.inner_length

    @property
    def state_bytes(self) -> int:
        """Of both, F32."""
        return 4 * (self.conv_state + self.scan_state)

    @property
    def log_length(self) -> int:
        """Numbers of a token that states follow from: channels before the convolution, and a step for each head."""
        return self.conv_channels + self.head_count

    def held_bytes(self, n_states: int, logged: int) -> int:
        """Bytes of so many sequences' states, and of what states follow from, of so many tokens."""
        return n_states * self.state_bytes + 4 * self.log_length * logged


@dataclass(frozen=True)
class Block:
    """One block: what mixes tokens, and what is computed of each token by itself. None where it has no such half.

    shared: the expert that every token uses beside those that `ffn` chooses.
    """

    mixer: Attention | Mamba2 | None
    ffn: FfnShape | None
    shared: FfnShape | None = None

    @property
    def n_reached(self) -> int:
        """Neurons that one token may use, those of the shared expert included."""
        return sum(ffn.n_reached for ffn in (self.ffn, self.shared) if ffn)

    @property
    def n_neurons(self) -> int:
        """All neurons."""
        return sum(ffn.n_ff for ffn in (self.ffn, self.shared) if ffn)


@dataclass(frozen=True)
class Structure:
    """A decoder-only transformer with a ReLU-family FFN. One field per GGUF key `lazyneuron.<key>`; lengths are in
    elements.

    What is computed is said block by block in `blocks`, made from the values that may differ between blocks.
    """

    source_architecture: str = _key("source_architecture")
    vocab_size: int = _key("vocab_size")
    context_length: int = _key("context_length")
    embedding_length: int = _key("embedding_length")
    block_count: int = _key("block_count")
    feed_forward_length: int | tuple[int, ...] = _key(
        "feed_forward_length"
    )  # of one expert where there are any; 0: the block has no FFN
    head_count: int | tuple[int, ...] = _key("attention.head_count")
    head_count_kv: int | tuple[int, ...] = _key("attention.head_count_kv")  # 0: the block has no attention
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
    sliding_window: int = _key("attention.sliding_window", since=3, default=0)  # 0: none
    # One per block: whether it has the window; (): all have.
    sliding_window_pattern: tuple[bool, ...] = _key("attention.sliding_window_pattern", since=3, default=())
    expert_count: int | tuple[int, ...] = _key("expert_count", since=3, default=0)  # 0: an FFN without experts
    expert_used_count: int | tuple[int, ...] = _key("expert_used_count", since=3, default=0)
    expert_shared_feed_forward_length: int | tuple[int, ...] = _key(
        "expert_shared_feed_forward_length", since=3, default=0
    )  # neurons that every token uses beside those of its experts
    expert_latent_length: int = _key("expert_latent_length", since=3, default=0)  # 0: experts see the FFN's own input
    expert_gating: str = _key("expert_gating_func", GATINGS, since=3, default="softmax")
    expert_bias: bool = _key("expert_bias", since=3, default=False)
    expert_weights_norm: bool = _key("expert_weights_norm", since=3, default=False)
    expert_weights_scale: float = _key("expert_weights_scale", since=3, default=1.0)
    router_tap: str = _key("router.tap", ROUTER_TAPS, since=3, default="ffn_norm")
    ssm_conv_kernel: int = _key("ssm.conv_kernel", since=3, default=0)
    ssm_state_size: int = _key("ssm.state_size", since=3, default=0)
    ssm_group_count: int = _key("ssm.group_count", since=3, default=0)
    ssm_inner_size: int = _key("ssm.inner_size", since=3, default=0)
    ssm_time_step_rank: int | tuple[int, ...] = _key(
        "ssm.time_step_rank", since=3, default=0
    )  # heads; 0: the block has no Mamba
    rope_dimension_count: int | tuple[int, ...] = _key(
        "rope.dimension_count", default=0
    )  # 0: the block does not rotate
    rope_freq_base: float = _key("rope.freq_base", default=10000.0)
    rope_scaling: str = _key("rope.scaling.type", ROPE_SCALINGS, default="none")
    rope_scaling_factor: float = _key("rope.scaling.factor", default=1.0)
    rope_freq_factors: bool = _key("rope.freq_factors", default=False)
    rope_attention_factor: float = _key("rope.scaling.attn_factor", since=2, default=1.0)
    layout: str = _key("layout", LAYOUTS, default="both")
    neuron_order: str = _key("neuron_order", NEURON_ORDERS, default="original")
    predictor: str = _key("predictor.kind", PREDICTOR_KINDS, default="none")
    predictor_tap: str = _key("predictor.tap", PREDICTOR_TAPS, default="ffn_norm")
    # One per block; rank 0: no predictor, the block is computed exactly. A sign-bit predictor has rank
    # embedding_length.
    predictor_rank: tuple[int, ...] = _key("predictor.rank", default=())
    # One per block: what the scores are typically off by; the unit of a shift of the threshold at run time.
    predictor_error: tuple[float, ...] = _key("predictor.error", default=())

    def __post_init__(self) -> None:
        for name in PER_BLOCK:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) == self.block_count and len(set(value)) == 1:
                object.__setattr__(self, name, value[0])
        if len(self.sliding_window_pattern) == self.block_count and all(self.sliding_window_pattern):
            object.__setattr__(self, "sliding_window_pattern", ())

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks, each with sizes of its own."""
        windows = self.sliding_window_pattern or (True,) * self.block_count
        columns = (self.each(name) for name in PER_BLOCK)
        sizes = (dict(zip(PER_BLOCK, values, strict=True)) for values in zip(*columns, strict=True))
        return tuple(self._block(size, windowed) for size, windowed in zip(sizes, windows, strict=True))

    def _block(self, size: Mapping[str, int], windowed: bool) -> Block:
        """size: by name, those of PER_BLOCK."""
        rope = size["rope_dimension_count"] if self.position.startswith("rope") else 0
        window = self.sliding_window if windowed else 0
        heads_kv, mamba = size["head_count_kv"], size["ssm_time_step_rank"]
        attention = Attention(size["head_count"], heads_kv, self.head_length, rope, window)
        mixer = attention if heads_kv else self._mamba2(mamba) if mamba > 0 else None
        return Block(mixer, *self._ffns(size))

    def _ffns(self, size: Mapping[str, int]) -> tuple[FfnShape | None, FfnShape | None]:
        """The FFN of a block of these sizes, and its shared expert."""
        n_ff, experts, shared = (
            size[name] for name in ("feed_forward_length", "expert_count", "expert_shared_feed_forward_length")
        )
        ffn = FfnShape(
            self.embedding_length,
            n_ff * (experts or 1),
            self.ffn_gate == "gated",
            self.ffn_activation,
            self.activation_threshold,
            self.ffn_bias,
            self.ffn_sub_norm,
            self._experts(experts, size["expert_used_count"]) if experts else None,
        )
        beside = replace(ffn, n_ff=shared, experts=None, shared=True) if shared else None
        if experts and self.expert_latent_length:
            ffn = replace(ffn, n_embd=self.expert_latent_length)
        return ffn if n_ff else None, beside

    def _mamba2(self, heads: int) -> Mamba2:
        length = self.ssm_inner_size // heads
        return Mamba2(heads, length, self.ssm_state_size, self.ssm_group_count, self.ssm_conv_kernel)

    def _experts(self, count: int, used: int) -> Experts:
        return Experts(
            count,
            used,
            self.expert_gating,
            self.expert_bias,
            self.expert_weights_norm,
            self.expert_weights_scale,
            self.router_tap,
        )

    def each(self, name: str) -> tuple[int, ...]:
        """A field that may differ between blocks, for each of them."""
        value: int | tuple[int, ...] = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * self.block_count

    @cached_property
    def ffns(self) -> dict[int, FfnShape]:
        """The FFN of each block that has one, by block."""
        return {i: block.ffn for i, block in enumerate(self.blocks) if block.ffn}

    @cached_property
    def shared(self) -> dict[int, FfnShape]:
        """The shared expert of each block that has one, by block."""
        return {i: block.shared for i, block in enumerate(self.blocks) if block.shared}

    @cached_property
    def attentions(self) -> dict[int, Attention]:
        """The attention of each block that has one, by block."""
        return {i: block.mixer for i, block in enumerate(self.blocks) if isinstance(block.mixer, Attention)}

    @cached_property
    def mambas(self) -> dict[int, Mamba2]:
        """The Mamba-2 mixer of each block that has one, by block."""
        return {i: block.mixer for i, block in enumerate(self.blocks) if isinstance(block.mixer, Mamba2)}

    @property
    def windows(self) -> tuple[int, ...]:
        """The distinct windows of attention, 0 for none."""
        return tuple(sorted({a.window for a in self.attentions.values()}))

    @property
    def rope_dimensions(self) -> int:
        """Elements of a head that are rotated, in the blocks that rotate any: one number wherever frequencies have
        factors.
        """
        return max((a.rope for a in self.attentions.values()), default=0)

    def rank(self, i: int) -> int:
        """Rank of block `i`'s predictor, 0 where it has none."""
        return self.predictor_rank[i] if self.predictor_rank else 0

    @property
    def projected(self) -> bool:
        """Whether token embeddings have another width than the blocks."""
        return self.token_embedding_length not in (0, self.embedding_length)

    def to_metadata(self) -> dict[str, Any]:
        """The GGUF key-value pairs that describe this structure, schema version included; per-block values as lists."""
        described = {
            f"{ARCHITECTURE}.{f.metadata['key']}": list(value) if isinstance(value, tuple) else value
            for f in fields(self)
            if (value := getattr(self, f.name)) != () and not (f.metadata["since"] >= MIXED and value == f.default)
        }
        needed = [f.metadata["since"] for f in fields(self) if getattr(self, f.name) != f.default]
        mixed = self.layout == PAGED or any(isinstance(getattr(self, name), tuple) for name in PER_BLOCK)
        return {f"{ARCHITECTURE}.schema_version": max(needed + [MIXED] * mixed), **described}
