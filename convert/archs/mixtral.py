"""Mixtral with ReLU experts, such as TurboSparse-Mixtral (dReLU): Mistral's attention, and gated experts of which a
router chooses two for each token.
"""

from convert import naming
from convert.arch import Arch, Field
from convert.rope import Rope

_ROPE = Rope(theta=1e6, context=131072)

ARCH = Arch(
    family="mixtral",
    architectures=("MixtralForCausalLM", "TurboSparseMixtralForCausalLM"),
    model_type="mixtral",
    activation=Field("hidden_act", "silu"),
    activations={"relu": "relu", "drelu": "drelu"},
    base_prefix="model.",
    keys={
        **naming.SIZES,
        "head_count_kv": naming.heads_kv(8),
        **_ROPE.keys(),
        "sliding_window": naming.sliding_window(_ROPE.context_length),
        "norm": "rms",
        "norm_epsilon": Field("rms_norm_eps", 1e-5),
        "ffn_gate": "gated",
        "expert_count": Field("num_local_experts", 8),
        "expert_used_count": Field("num_experts_per_tok", 2),
        "expert_weights_norm": True,
    },
    tensors={
        **naming.ends(),
        **_ROPE.tensors(),
        **naming.block_norms(),
        **naming.attention(bias=False, output_bias=False),
        **naming.experts(
            "model.layers.{i}.block_sparse_moe.experts.{e}", "w1", "w3", "w2", "model.layers.{i}.block_sparse_moe.gate"
        ),
    },
    expect=naming.PLAIN_ROUTING,
    # TurboSparse checkpoints carry predictors of unpublished names and form; the converter fits its own.
    skip=("model.layers.{i}.*predictor*",),
)
