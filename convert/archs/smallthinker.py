"""SmallThinker: ReGLU experts, chosen by a router that reads the block's input before its attention; in some blocks no
rotation, in others a sliding window.
"""

from convert import naming
from convert.arch import Arch, Field
from convert.config import Config
from convert.rope import Rope

_ROPE = Rope(theta=1.5e6, context=32768)
_MOE = "model.layers.{i}.block_sparse_moe"


def _layout(config: Config, name: str, usual: int) -> list[bool]:
    """One value of 0 or 1 per block."""
    found = config.list_of(name, int, [usual] * config.get("num_hidden_layers", int))
    return [bool(value) for value in found]


def _rotated(config: Config) -> tuple[int, ...]:
    length = _ROPE.of(config).dimensions
    return tuple(length * rotates for rotates in _layout(config, "rope_layout", 1))


def _windowed(config: Config) -> tuple[bool, ...]:
    layout = _layout(config, "sliding_window_layout", 0)
    return tuple(layout) if any(layout) else ()


def _window(config: Config) -> int:
    return config.get("sliding_window_size", int, 4096) if _windowed(config) else 0


def _gating(config: Config) -> str:
    return "softmax" if config.get("moe_primary_router_apply_softmax", bool, False) else "sigmoid"


ARCH = Arch(
    family="smallthinker",
    architectures=("SmallThinkerForCausalLM",),
    activation=Field("hidden_act", "relu"),
    activations={"relu": "relu"},
    base_prefix="model.",
    keys={
        **naming.SIZES,
        **_ROPE.keys(),
        "rope_dimension_count": _rotated,
        "sliding_window": _window,
        "sliding_window_pattern": _windowed,
        "norm": "rms",
        "norm_epsilon": Field("rms_norm_eps", 1e-6),
        "ffn_gate": "gated",
        "feed_forward_length": Field("moe_ffn_hidden_size"),
        "expert_count": Field("moe_num_primary_experts"),
        "expert_used_count": Field("moe_num_active_primary_experts"),
        "expert_gating": _gating,
        "expert_weights_norm": True,
        "router_tap": "block",
    },
    tensors={
        **naming.ends(),
        **_ROPE.tensors(),
        **naming.block_norms(),
        **naming.attention(bias=False, output_bias=False),
        **naming.experts(f"{_MOE}.experts.{{e}}", "gate", "up", "down", f"{_MOE}.primary_router"),
    },
    expect={
        **naming.PLAIN_ROUTING,
        "moe_layer_layout": 1,
        "moe_enable_secondary_experts": False,
        "moe_enable_early_router": True,
    },
)
