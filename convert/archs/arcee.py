"""Arcee AFM: Llama's body with an ungated FFN of squared ReLU."""

from convert import naming
from convert.arch import Arch, Field
from convert.rope import Rope

_ROPE = Rope(context=4096)

ARCH = Arch(
    family="arcee",
    architectures=("ArceeForCausalLM",),
    model_type="arcee",
    activation=Field("hidden_act", "relu2"),
    activations={"relu2": "relu2", "relu": "relu"},
    base_prefix="model.",
    keys={
        **naming.SIZES,
        **naming.ATTENTION_BIASES,
        **_ROPE.keys(),
        "norm": "rms",
        "norm_epsilon": Field("rms_norm_eps", 1e-5),
        "ffn_gate": "none",
        "ffn_bias": Field("mlp_bias", False),
    },
    tensors={
        **naming.ends(),
        **_ROPE.tensors(),
        **naming.block_norms(),
        **naming.attention(),
        **naming.up("model.layers.{i}.mlp.up_proj"),
        **naming.down("model.layers.{i}.mlp.down_proj"),
    },
)
