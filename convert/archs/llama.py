"""Llama with a ReLU-family gate, such as ReluLLaMA (ReLU) and ProSparse (FATReLU): RMSNorm, rotary positions, a gated FFN, perhaps GQA and biases."""

from convert import naming, rope
from convert.arch import Arch, Field

ARCH = Arch(
    family="llama",
    architectures=("LlamaForCausalLM", "SparseLlamaForCausalLM"),
    activation=Field("hidden_act"),
    activations={"relu": "relu", "fatrelu": "fatrelu", "relu2": "relu2"},
    base_prefix="model.",
    keys={
        **naming.SIZES,
        **naming.ATTENTION_BIASES,
        **rope.keys(),
        "norm": "rms",
        "norm_epsilon": Field("rms_norm_eps", 1e-6),
        "ffn_gate": "gated",
        "ffn_bias": Field("mlp_bias", False),
    },
    tensors={
        **naming.ends(),
        **naming.ROPE_FREQS,
        **naming.block_norms(),
        **naming.attention(),
        **naming.gated_ffn(),
    },
    skip=("model.layers.{i}.self_attn.rotary_emb.inv_freq",),
)
