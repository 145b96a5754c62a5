"""Nemotron-3 and -4, Minitron: layer norms whose weights are stored less one, rotation of half a head, an ungated FFN
of squared ReLU.
"""

from convert import naming
from convert.arch import Arch, Field
from convert.rope import Rope

_ROPE = Rope(context=4096, rotated=0.5)

ARCH = Arch(
    family="nemotron",
    architectures=("NemotronForCausalLM",),
    model_type="nemotron",
    activation=Field("hidden_act", "relu2"),
    activations={"relu2": "relu2", "relu": "relu"},
    base_prefix="model.",
    keys={
        **naming.SIZES,
        **naming.ATTENTION_BIASES,
        **_ROPE.keys(),
        "norm": "layer",
        "norm_epsilon": Field("norm_eps", 1e-5),
        "ffn_gate": "none",
        "ffn_bias": Field("mlp_bias", False),
    },
    tensors={
        **naming.ends(bias=True, rewrite="add_one"),
        **_ROPE.tensors(),
        **naming.block_norms(bias=True, rewrite="add_one"),
        **naming.attention(),
        **naming.up("model.layers.{i}.mlp.up_proj"),
        **naming.down("model.layers.{i}.mlp.down_proj"),
    },
)
