"""Persimmon: layer norms (of queries and keys too), fused projections, rotation of half a head, an ungated FFN of
squared ReLU.
"""

from convert import naming
from convert.arch import Arch, Field
from convert.config import Config
from convert.rope import Rope, equal_parts


def _qk_norm(config: Config) -> str:
    return "before_rope" if config.get("qk_layernorm", bool, True) else "none"


_ROPE = Rope(context=16384, rotated=0.5, head_length=equal_parts)

ARCH = Arch(
    family="persimmon",
    architectures=("PersimmonForCausalLM",),
    model_type="persimmon",
    activation=Field("hidden_act", "relu2"),
    activations={"relu2": "relu2", "relu": "relu"},
    base_prefix="model.",
    keys={
        **naming.SIZES,
        **_ROPE.keys(),
        "head_count_kv": Field("num_attention_heads"),
        "attention_bias": True,
        "attention_output_bias": True,
        "qk_norm": _qk_norm,
        "norm": "layer",
        "norm_epsilon": Field("layer_norm_eps", 1e-5),
        "ffn_gate": "none",
        "ffn_bias": True,
    },
    tensors={
        **naming.ends("model.final_layernorm", bias=True),
        **_ROPE.tensors(),
        **naming.block_norms(bias=True),
        **naming.fused_attention("model.layers.{i}.self_attn.query_key_value", "model.layers.{i}.self_attn.dense"),
        **naming.pair("blk.{i}.attn_q_norm", "model.layers.{i}.self_attn.q_layernorm"),
        **naming.pair("blk.{i}.attn_k_norm", "model.layers.{i}.self_attn.k_layernorm"),
        **naming.up("model.layers.{i}.mlp.dense_h_to_4h"),
        **naming.down("model.layers.{i}.mlp.dense_4h_to_h"),
    },
)
