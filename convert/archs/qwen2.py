"""Qwen2 with a ReLU-family gate, such as SparseQwen2: Llama with biases of queries, keys and values."""

from convert import naming
from convert.arch import Arch, Field
from convert.rope import Rope

_ROPE = Rope(context=32768)

ARCH = Arch(
    family="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_type="qwen2",
    activation=Field("hidden_act", "silu"),
    activations={"relu": "relu", "fatrelu": "fatrelu", "relu2": "relu2"},
    base_prefix="model.",
    expect={"use_sliding_window": False, "layer_types": "full_attention"},
    keys={
        **naming.SIZES,
        "head_count_kv": naming.heads_kv(32),
        **_ROPE.keys(),
        "attention_bias": True,
        "norm": "rms",
        "norm_epsilon": Field("rms_norm_eps", 1e-6),
        "ffn_gate": "gated",
    },
    tensors={
        **naming.ends(),
        **_ROPE.tensors(),
        **naming.block_norms(),
        **naming.attention(output_bias=False),
        **naming.gated_ffn(bias=False),
    },
)
