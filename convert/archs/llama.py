"""Llama with a ReLU-family gate, such as ReluLLaMA (ReLU) and ProSparse (FATReLU): RMSNorm, rotary positions, a gated
FFN, perhaps GQA and biases.
"""

from convert import naming
from convert.arch import Arch, Field
from convert.rope import Rope

_ROPE = Rope()

ARCH = Arch(
    family="llama",
    architectures=("LlamaForCausalLM", "SparseLlamaForCausalLM"),
    model_type="llama",
    activation=Field("hidden_act"),
    activations={"relu": "relu", "fatrelu": "fatrelu", "relu2": "relu2"},
    base_prefix="model.",
    keys={
        **naming.SIZES,
        **naming.ATTENTION_BIASES,
        **_ROPE.keys(),
        "norm": "rms",
        "norm_epsilon": Field("rms_norm_eps", 1e-6),
        "ffn_gate": "gated",
        "ffn_bias": Field("mlp_bias", False),
    },
    tensors={
        **naming.ends(),
        **_ROPE.tensors(),
        **naming.block_norms(),
        **naming.attention(),
        **naming.gated_ffn(),
    },
)
