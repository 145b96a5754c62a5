"""Jais 2: layer norms, biases everywhere, an ungated FFN of squared ReLU."""

from convert import naming
from convert.arch import Arch, Field
from convert.rope import Rope

_ROPE = Rope(context=8192)

ARCH = Arch(
    family="jais2",
    architectures=("Jais2ForCausalLM",),
    model_type="jais2",
    activation=Field("hidden_act", "relu2"),
    activations={"relu2": "relu2", "relu": "relu"},
    base_prefix="model.",
    keys={
        **naming.SIZES,
        **_ROPE.keys(),
        "attention_bias": Field("attention_bias", True),
        "attention_output_bias": Field("attention_bias", True),
        "norm": "layer",
        "norm_epsilon": Field("layer_norm_eps", 1e-5),
        "ffn_gate": "none",
        "ffn_bias": Field("mlp_bias", True),
    },
    tensors={
        **naming.ends(bias=True),
        **_ROPE.tensors(),
        **naming.block_norms(bias=True),
        **naming.attention(),
        **naming.up("model.layers.{i}.mlp.up_proj"),
        **naming.down("model.layers.{i}.mlp.down_proj"),
    },
)
