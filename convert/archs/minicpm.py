"""MiniCPM with a ReLU-family gate, such as MiniCPM-S (FATReLU): Llama with scaled embeddings, residual branches and logits."""

import math

from convert import naming, rope
from convert.arch import Arch, Field
from convert.config import Config


def _residual_scale(config: Config) -> float:
    return config.get("scale_depth", float, 1.0) / math.sqrt(config.get("num_hidden_layers", int))


def _logit_scale(config: Config) -> float:
    return config.get("dim_model_base", int, 1) / config.get("hidden_size", int)


ARCH = Arch(
    family="minicpm",
    architectures=("MiniCPMForCausalLM",),
    activation=Field("hidden_act", "silu"),
    activations={"relu": "relu", "fatrelu": "fatrelu", "relu2": "relu2"},
    base_prefix="model.",
    keys={
        **naming.SIZES,
        **naming.ATTENTION_BIASES,
        **rope.keys(),
        "tied_output": Field("tie_word_embeddings", True),
        "norm": "rms",
        "norm_epsilon": Field("rms_norm_eps", 1e-6),
        "ffn_gate": "gated",
        "embedding_scale": Field("scale_emb", 1.0),
        "residual_scale": _residual_scale,
        "logit_scale": _logit_scale,
    },
    tensors={
        **naming.ends(),
        **naming.block_norms(),
        **naming.attention(),
        **naming.gated_ffn(bias=False),
    },
    skip=("model.layers.{i}.self_attn.rotary_emb.inv_freq",),
)
