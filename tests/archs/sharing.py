"""A mixture with an expert that every token uses, and with experts that see another width than the model's.

Its names are Mixtral's. No published model is called so; see tests/experts.py.
"""

from convert import naming
from convert.arch import Arch, Field
from convert.config import Config
from convert.rope import Rope

_ROPE, _MOE = Rope(theta=1e4, context=512), "model.layers.{i}.block_sparse_moe"


def _gate(config: Config) -> str:
    return "gated" if config.get("gated", bool) else "none"


def _gating(config: Config) -> str:
    return "sigmoid" if config.get("sigmoid", bool) else "softmax"


ARCH = Arch(
    family="sharing",
    architectures=("SharingForCausalLM",),
    activation=Field("hidden_act"),
    activations={"relu": "relu", "relu2": "relu2"},
    base_prefix="model.",
    keys={
        **naming.SIZES,
        **_ROPE.keys(),
        "norm": "rms",
        "norm_epsilon": Field("rms_norm_eps"),
        "ffn_gate": _gate,
        "expert_count": Field("num_local_experts"),
        "expert_used_count": Field("num_experts_per_tok"),
        "expert_shared_feed_forward_length": Field("shared"),
        "expert_latent_length": Field("latent"),
        "expert_gating": _gating,
        "expert_bias": Field("biased"),
        "expert_weights_norm": True,
        "expert_weights_scale": Field("scale"),
    },
    tensors={
        **naming.ends(),
        **_ROPE.tensors(),
        **naming.block_norms(),
        **naming.attention(bias=False, output_bias=False),
        **naming.experts(f"{_MOE}.experts.{{e}}", "w1", "w3", "w2", f"{_MOE}.gate"),
        **naming.shared_expert(f"{_MOE}.shared", "w1", "w3", "w2"),
        **naming.latent_experts(f"{_MOE}.latent_down", f"{_MOE}.latent_up"),
        "blk.{i}.exp_probs_b.bias": naming.Source(f"{_MOE}.gate.e_score_correction_bias"),
    },
)
