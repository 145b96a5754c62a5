"""OPT: LayerNorm, learned positions, an ungated ReLU FFN with biases, a tied head.

opt-350m alone has its norms after the residual and embeddings narrower than its blocks.
"""

from convert.arch import Arch, Field, Source
from convert.config import Config
from convert.rope import equal_parts


def _norm_placement(config: Config) -> str:
    return "pre" if config.get("do_layer_norm_before", bool, True) else "post"


def _output_norm(config: Config) -> bool:
    # Checkpoints fine-tuned before transformers 4.20.1 have no final norm although theirs come first.
    return _norm_placement(config) == "pre" and not config.get("_remove_final_layer_norm", bool, False)


ARCH = Arch(
    family="opt",
    architectures=("OPTForCausalLM",),
    model_type="opt",
    activation=Field("activation_function", "relu"),
    activations={"relu": "relu"},
    base_prefix="model.",
    expect={"layer_norm_elementwise_affine": True},
    keys={
        "vocab_size": Field("vocab_size"),
        "context_length": Field("max_position_embeddings", 2048),
        "embedding_length": Field("hidden_size"),
        "token_embedding_length": Field("word_embed_proj_dim", Field("hidden_size")),
        "block_count": Field("num_hidden_layers"),
        "feed_forward_length": Field("ffn_dim"),
        "head_count": Field("num_attention_heads"),
        "head_count_kv": Field("num_attention_heads"),
        "head_length": equal_parts,
        "norm": "layer",
        "norm_epsilon": 1e-5,
        "norm_placement": _norm_placement,
        "output_norm": _output_norm,
        "position": "learned",
        "ffn_gate": "none",
        "attention_bias": Field("enable_bias", True),
        "attention_output_bias": Field("enable_bias", True),
        "ffn_bias": Field("enable_bias", True),
        "tied_output": Field("tie_word_embeddings", True),
    },
    tensors={
        "token_embd.weight": Source("model.decoder.embed_tokens.weight"),
        "token_embd_proj.weight": Source("model.decoder.project_in.weight"),
        "output_proj.weight": Source("model.decoder.project_out.weight"),
        "position_embd.weight": Source("model.decoder.embed_positions.weight", "skip_rows_2"),
        "blk.{i}.attn_norm.weight": Source("model.decoder.layers.{i}.self_attn_layer_norm.weight"),
        "blk.{i}.attn_norm.bias": Source("model.decoder.layers.{i}.self_attn_layer_norm.bias"),
        "blk.{i}.attn_q.weight": Source("model.decoder.layers.{i}.self_attn.q_proj.weight"),
        "blk.{i}.attn_k.weight": Source("model.decoder.layers.{i}.self_attn.k_proj.weight"),
        "blk.{i}.attn_v.weight": Source("model.decoder.layers.{i}.self_attn.v_proj.weight"),
        "blk.{i}.attn_output.weight": Source("model.decoder.layers.{i}.self_attn.out_proj.weight"),
        "blk.{i}.attn_q.bias": Source("model.decoder.layers.{i}.self_attn.q_proj.bias"),
        "blk.{i}.attn_k.bias": Source("model.decoder.layers.{i}.self_attn.k_proj.bias"),
        "blk.{i}.attn_v.bias": Source("model.decoder.layers.{i}.self_attn.v_proj.bias"),
        "blk.{i}.attn_output.bias": Source("model.decoder.layers.{i}.self_attn.out_proj.bias"),
        "blk.{i}.ffn_norm.weight": Source("model.decoder.layers.{i}.final_layer_norm.weight"),
        "blk.{i}.ffn_norm.bias": Source("model.decoder.layers.{i}.final_layer_norm.bias"),
        "blk.{i}.ffn_up.weight": Source("model.decoder.layers.{i}.fc1.weight"),
        "blk.{i}.ffn_up.bias": Source("model.decoder.layers.{i}.fc1.bias"),
        "blk.{i}.ffn_down.weight": Source("model.decoder.layers.{i}.fc2.weight"),
        "blk.{i}.ffn_down_t.weight": Source("model.decoder.layers.{i}.fc2.weight", "transpose"),
        "blk.{i}.ffn_down.bias": Source("model.decoder.layers.{i}.fc2.bias"),
        "output_norm.weight": Source("model.decoder.final_layer_norm.weight"),
        "output_norm.bias": Source("model.decoder.final_layer_norm.bias"),
        "output.weight": Source("lm_head.weight"),
    },
)
