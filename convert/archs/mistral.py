"""Mistral with a ReLU-family gate: Llama without biases; attention that looks back a limited number of tokens."""

from convert import naming, rope
from convert.arch import Arch, Field

ARCH = Arch(
    family="mistral",
    architectures=("MistralForCausalLM",),
    activation=Field("hidden_act", "silu"),
    activations={"relu": "relu", "fatrelu": "fatrelu", "relu2": "relu2"},
    base_prefix="model.",
    keys={
        **naming.SIZES,
        **rope.keys(),
        "context_length": naming.unlimited_context,
        "norm": "rms",
        "norm_epsilon": Field("rms_norm_eps", 1e-6),
        "ffn_gate": "gated",
    },
    tensors={
        **naming.ends(),
        **naming.ROPE_FREQS,
        **naming.block_norms(),
        **naming.attention(bias=False, output_bias=False),
        **naming.gated_ffn(bias=False),
    },
)
