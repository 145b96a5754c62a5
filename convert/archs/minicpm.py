"""MiniCPM with a ReLU-family gate, such as MiniCPM-S (FATReLU): Llama with scaled embeddings, residual branches and
logits.
"""

import math

from convert import naming
from convert.arch import Arch, Field
from convert.config import Config
from convert.rope import Rope


def _residual_scale(config: Config) -> float:
    return config.get("scale_depth", float, 1.0) / math.sqrt(config.positive("num_hidden_layers", int))


def _logit_scale(config: Config) -> float:
    return config.get("dim_model_base", int, 1) / config.positive("hidden_size", int)


_ROPE = Rope()

ARCH = Arch(
    family="minicpm",
    architectures=("MiniCPMForCausalLM",),
    activation=Field("hidden_act", "silu"),
    activations={"relu": "relu", "fatrelu": "fatrelu", "relu2": "relu2"},
    base_prefix="model.",
    keys={
        **naming.SIZES,
        **naming.ATTENTION_BIASES,
        **_ROPE.keys(),
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
        **_ROPE.tensors(),
        **naming.block_norms(),
        **naming.attention(),
        **naming.gated_ffn(bias=False),
    },
)
