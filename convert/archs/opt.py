"""OPT: LayerNorm, learned positions, an ungated ReLU FFN with biases, a tied head.

opt-350m alone has its norms after the residual and embeddings narrower than its blocks.
"""

from convert import naming
from convert.arch import Arch, Field, Source
from convert.config import Config
from convert.rope import equal_parts


def _norm_placement(config: Config) -> str:
    return "pre" if config.get("do_layer_norm_before", bool, True) else "post"


def _output_norm(config: Config) -> bool:
    # Checkpoints fine-tuned before transformers 4.20.1 have no final norm although theirs come first.
    return _norm_placement(config) == "pre" and not config.get("_remove_final_layer_norm", bool, False)


_LAYER = "model.decoder.layers.{i}"

ARCH = Arch(
    family="opt",
    architectures=("OPTForCausalLM",),
    model_type="opt",
    activation=Field("activation_function", "relu"),
    activations={"relu": "relu"},
    base_prefix="model.",
    expect={"layer_norm_elementwise_affine": True},
    keys={
        **naming.SIZES,
        "context_length": Field("max_position_embeddings", 2048),
        "token_embedding_length": Field("word_embed_proj_dim", Field("hidden_size")),
        "feed_forward_length": Field("ffn_dim"),
        "head_count_kv": Field("num_attention_heads"),
        "head_length": equal_parts,
        "norm": "layer",
        "norm_epsilon": 1e-5,
        "norm_placement": _norm_placement,
        "output_norm": _output_norm,
        "position": "learned",
        "ffn_gate": "none",
        **naming.biases("enable_bias", True),
        "tied_output": Field("tie_word_embeddings", True),
    },
    tensors={
        "token_embd.weight": Source("model.decoder.embed_tokens.weight"),
        "token_embd_proj.weight": Source("model.decoder.project_in.weight"),
        "output_proj.weight": Source("model.decoder.project_out.weight"),
        "position_embd.weight": Source("model.decoder.embed_positions.weight", "skip_rows_2"),
        **naming.pair("blk.{i}.attn_norm", f"{_LAYER}.self_attn_layer_norm"),
        **naming.attention(at=f"{_LAYER}.self_attn", output="out_proj"),
        **naming.pair("blk.{i}.ffn_norm", f"{_LAYER}.final_layer_norm"),
        **naming.up(f"{_LAYER}.fc1"),
        **naming.down(f"{_LAYER}.fc2"),
        **naming.pair("output_norm", "model.decoder.final_layer_norm"),
        "output.weight": Source("lm_head.weight"),
    },
)
