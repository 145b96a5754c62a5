"""Falcon with ReLU, such as ReluFalcon: layer norms, fused projections, an ungated FFN, attention and FFN side by side.

The 40B form has GQA and a norm for either side, the 7B form one key-value head and one norm for both; so have the configs of
checkpoints from before transformers knew Falcon, under other names.
"""

from collections.abc import Callable

from convert import naming
from convert.arch import Arch, Field, Source
from convert.config import Config
from convert.rope import Rope, equal_parts


def _is_new(config: Config) -> bool:
    return config.get("new_decoder_architecture", bool, config.get("model_type", str, "falcon") == "RefinedWeb")


def _is_parallel(config: Config) -> bool:
    return _is_new(config) or config.get("parallel_attn", bool, True)


def _heads_kv(config: Config) -> int:
    if not _is_new(config) and config.get("multi_query", bool, True):
        return 1
    return config.get("num_kv_heads", int, config.get("num_attention_heads", int))


def _norm(side: str, part: str) -> Callable[[Config], Source]:
    """The norm before attention ("attn") or FFN ("mlp"); part: weight or bias."""

    def source(config: Config) -> Source:
        if _is_new(config) and config.get("num_ln_in_parallel_attn", int, 2) == 2:
            name = f"ln_{side}"
        else:
            name = "input_layernorm" if side == "attn" or _is_parallel(config) else "post_attention_layernorm"
        return Source(f"transformer.h.{{i}}.{name}.{part}")

    return source


_ROPE = Rope(head_length=equal_parts)

ARCH = Arch(
    family="falcon",
    architectures=("FalconForCausalLM", "RWForCausalLM"),
    model_type="falcon",
    activation=Field("activation", "gelu"),
    activations={"relu": "relu", "relu2": "relu2"},
    base_prefix="transformer.",
    expect={"alibi": False},
    renamed={
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_head_kv": "num_kv_heads",
        "n_embed": "hidden_size",
    },
    keys={
        **naming.SIZES,
        **_ROPE.keys(),
        "feed_forward_length": lambda config: config.get("ffn_hidden_size", int, 4 * config.get("hidden_size", int)),
        "head_count_kv": _heads_kv,
        "residual": lambda config: "parallel" if _is_parallel(config) else "sequential",
        "tied_output": Field("tie_word_embeddings", True),
        "attention_bias": Field("bias", False),
        "attention_output_bias": Field("bias", False),
        "ffn_bias": Field("bias", False),
        "norm": "layer",
        "norm_epsilon": Field("layer_norm_epsilon", 1e-5),
        "ffn_gate": "none",
    },
    tensors={
        "token_embd.weight": Source("transformer.word_embeddings.weight"),
        **_ROPE.tensors(),
        **{f"blk.{{i}}.attn_norm.{part}": _norm("attn", part) for part in ("weight", "bias")},
        **{f"blk.{{i}}.ffn_norm.{part}": _norm("mlp", part) for part in ("weight", "bias")},
        **naming.fused_attention(
            "transformer.h.{i}.self_attention.query_key_value", "transformer.h.{i}.self_attention.dense"
        ),
        **naming.up("transformer.h.{i}.mlp.dense_h_to_4h"),
        **naming.down("transformer.h.{i}.mlp.dense_4h_to_h"),
        **naming.pair("output_norm", "transformer.ln_f"),
        "output.weight": Source("lm_head.weight"),
    },
)
