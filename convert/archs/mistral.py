"""Mistral with a ReLU-family gate: Llama without biases; attention that looks back a limited number of tokens."""

from convert import naming
from convert.arch import Arch, Field
from convert.rope import Rope

_ROPE = Rope(context=131072)

ARCH = Arch(
    family="mistral",
    architectures=("MistralForCausalLM",),
    model_type="mistral",
    activation=Field("hidden_act", "silu"),
    activations={"relu": "relu", "fatrelu": "fatrelu", "relu2": "relu2"},
    base_prefix="model.",
    keys={
        **naming.SIZES,
        "head_count_kv": naming.heads_kv(8),
        **_ROPE.keys(),
        "sliding_window": naming.sliding_window(_ROPE.context_length, 4096),
        "norm": "rms",
        "norm_epsilon": Field("rms_norm_eps", 1e-6),
        "ffn_gate": "gated",
    },
    tensors={
        **naming.ends(),
        **_ROPE.tensors(),
        **naming.block_norms(),
        **naming.attention(bias=False, output_bias=False),
        **naming.gated_ffn(bias=False),
    },
)
