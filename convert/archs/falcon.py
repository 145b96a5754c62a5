"""Falcon with ReLU, such as ReluFalcon: layer norms, fused projections, an ungated FFN, attention and FFN side by side.

The 40B form has GQA and a norm for either side, the 7B form one key-value head and one norm for both; so have the
configs of checkpoints from before transformers knew Falcon, under other names.
"""

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


_LAYER = "transformer.h.{i}"
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
        **naming.biases("bias", False),
        "norm": "layer",
        "norm_epsilon": Field("layer_norm_epsilon", 1e-5),
        "ffn_gate": "none",
    },
    tensors={
        "token_embd.weight": Source("transformer.word_embeddings.weight"),
        **_ROPE.tensors(),
        **naming.pair("blk.{i}.attn_norm", (f"{_LAYER}.input_layernorm", f"{_LAYER}.ln_attn")),
        **naming.pair(
            "blk.{i}.ffn_norm", (f"{_LAYER}.post_attention_layernorm", f"{_LAYER}.ln_mlp", f"{_LAYER}.input_layernorm")
        ),
        **naming.fused_attention(f"{_LAYER}.self_attention.query_key_value", f"{_LAYER}.self_attention.dense"),
        **naming.up(f"{_LAYER}.mlp.dense_h_to_4h"),
        **naming.down(f"{_LAYER}.mlp.dense_4h_to_h"),
        **naming.pair("output_norm", "transformer.ln_f"),
        "output.weight": Source("lm_head.weight"),
    },
)
