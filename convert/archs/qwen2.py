"""Qwen2 with a ReLU-family gate, such as SparseQwen2: Llama with biases of queries, keys and values."""

from convert import naming, rope
from convert.arch import Arch, Field

ARCH = Arch(
    family="qwen2",
    architectures=("Qwen2ForCausalLM",),
    activation=Field("hidden_act", "silu"),
    activations={"relu": "relu", "fatrelu": "fatrelu", "relu2": "relu2"},
    base_prefix="model.",
    expect={"use_sliding_window": False},
    keys={
        **naming.SIZES,
        **rope.keys(),
        "attention_bias": True,
        "norm": "rms",
        "norm_epsilon": Field("rms_norm_eps", 1e-6),
        "ffn_gate": "gated",
    },
    tensors={
        **naming.ends(),
        **naming.ROPE_FREQS,
        **naming.block_norms(),
        **naming.attention(output_bias=False),
        **naming.gated_ffn(bias=False),
    },
)
