"""Nemotron-H, Nemotron Nano v2 and Nemotron 3: blocks of one half each, which are Mamba-2, attention without positions,
or an ungated FFN of squared ReLU, with experts or without, each after an RMS norm.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from convert import naming
from convert.arch import Arch, BlockKind, Field, Source
from convert.config import Config, shown
from runtime.errors import UserError

_BASES = ("backbone.", "model.")  # how names begin, on the Hub and in memory
_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_LISTED = {
    **{kind: kind for kind in _LETTERS.values()},
    "linear_attention": "mamba",
    "full_attention": "attention",
}


def _kinds(config: Config) -> list[str]:
    """The kind of each block, by a list or by a letter for each; a config with both has to say the same by both.

    Raises UserError for another letter or name, and for another number of blocks than `num_hidden_layers` says.
    """
    pattern, listed = config.get("hybrid_override_pattern", str, ""), config.list_of("layers_block_type", str, [])
    found = [_kind(config, i, name, _LISTED) for i, name in enumerate(listed)]
    lettered = [_kind(config, i, letter, _LETTERS) for i, letter in enumerate(pattern)]
    if not found and not lettered:
        raise UserError(f"{config.where}: neither `hybrid_override_pattern` nor `layers_block_type`, expected one")
    if found and lettered and found != lettered:
        raise UserError(f"{config.where}: `hybrid_override_pattern` and `layers_block_type` disagree")
    kinds, key = (found, "layers_block_type") if found else (lettered, "hybrid_override_pattern")
    if (count := config.get("num_hidden_layers", int, len(kinds))) != len(kinds):
        raise UserError(
            f"{config.where}: `{key}` has {len(kinds)} blocks, expected {count} as `num_hidden_layers` says"
        )
    return kinds


def _kind(config: Config, i: int, name: str, kinds: Mapping[str, str]) -> str:
    if name not in kinds:
        raise UserError(f"{config.where}: block {i} is {shown(name)}, expected one of {', '.join(kinds)}")
    return kinds[name]


def _by_either(table: naming.Table) -> naming.Table:
    """Tensors of the checkpoint's body, by either beginning of their names."""
    return {gguf: tuple(replace(one, name=base + one.name) for base in _BASES) for gguf, one in _plain(table)}


def _plain(table: naming.Table) -> Iterator[tuple[str, Source]]:
    for gguf, source in table.items():
        assert isinstance(source, Source)
        yield gguf, source


def _has_experts(config: Config) -> bool:
    return "moe" in _kinds(config)


def _latent(config: Config) -> int:
    """Elements that experts see in place of the block's own; 0 for these."""
    return config.get("moe_latent_size", int, 0) if _has_experts(config) else 0


def _scale(config: Config) -> float:
    return config.get("routed_scaling_factor", float, 1.0) if _has_experts(config) else 1.0


def _normalised(config: Config) -> bool:
    return _has_experts(config) and config.get("norm_topk_prob", bool, True)


_AT = "layers.{i}.mixer"
_NORM = "layers.{i}.norm"
_NO_ATTENTION, _NO_MAMBA, _NO_FFN = {"head_count_kv": 0}, {"ssm_time_step_rank": 0}, {"feed_forward_length": 0}
_MAMBA = {
    **naming.pair("blk.{i}.attn_norm", _NORM, bias=False),
    **naming.pair("blk.{i}.ssm_in", f"{_AT}.in_proj", bias=False),
    "blk.{i}.ssm_conv1d.weight": Source(f"{_AT}.conv1d.weight", "squeeze"),
    "blk.{i}.ssm_conv1d.bias": Source(f"{_AT}.conv1d.bias"),
    "blk.{i}.ssm_dt.bias": Source(f"{_AT}.dt_bias"),
    "blk.{i}.ssm_a": Source(f"{_AT}.A_log", "minus_exp"),
    "blk.{i}.ssm_d": Source(f"{_AT}.D", "column"),
    "blk.{i}.ssm_norm.weight": Source(f"{_AT}.norm.weight", "groups"),
    **naming.pair("blk.{i}.ssm_out", f"{_AT}.out_proj", bias=False),
}
_ATTENTION = {
    **naming.pair("blk.{i}.attn_norm", _NORM, bias=False),
    **naming.attention(bias=False, output_bias=False, at=_AT),
}
_MLP = {
    **naming.pair("blk.{i}.ffn_norm", _NORM, bias=False),
    **naming.up(f"{_AT}.up_proj", bias=False),
    **naming.down(f"{_AT}.down_proj", bias=False),
}
_MOE = {
    **naming.pair("blk.{i}.ffn_norm", _NORM, bias=False),
    **naming.experts(f"{_AT}.experts.{{e}}", "none", "up_proj", "down_proj", f"{_AT}.gate"),
    "blk.{i}.exp_probs_b.bias": Source(f"{_AT}.gate.e_score_correction_bias"),
    **naming.shared_expert(f"{_AT}.shared_experts", "none", "up_proj", "down_proj"),
    **naming.latent_experts(f"{_AT}.fc1_latent_proj", f"{_AT}.fc2_latent_proj"),
}

ARCH = Arch(
    family="nemotron_h",
    architectures=("NemotronHForCausalLM",),
    model_type="nemotron_h",
    activation=Field("mlp_hidden_act", "relu2"),
    activations={"relu2": "relu2", "relu": "relu"},
    base_prefix=_BASES[0],
    renamed={
        "layer_types": "layers_block_type",
        "attention_head_dim": "head_dim",
        "norm_eps": "layer_norm_epsilon",
        "mamba_n_groups": "n_groups",
        "mamba_d_conv": "conv_kernel",
        "mamba_conv_bias": "use_conv_bias",
    },
    keys={
        **naming.SIZES,
        "block_count": lambda config: len(_kinds(config)),
        "context_length": Field("max_position_embeddings", 4096),
        "feed_forward_length": Field("intermediate_size", 21504),
        "head_count": Field("num_attention_heads", 32),
        "head_count_kv": Field("num_key_value_heads", Field("num_attention_heads", 32)),
        "head_length": Field("head_dim", 128),
        "norm": "rms",
        "norm_epsilon": Field("layer_norm_epsilon", 1e-5),
        "position": "rope_neox",
        "ffn_gate": "none",
        "ssm_conv_kernel": Field("conv_kernel", 4),
        "ssm_state_size": Field("ssm_state_size", 128),
        "ssm_group_count": Field("n_groups", 8),
        "ssm_inner_size": lambda config: (
            config.get("mamba_num_heads", int, 128) * config.get("mamba_head_dim", int, 64)
        ),
        "ssm_time_step_rank": Field("mamba_num_heads", 128),
        "expert_gating": lambda config: "sigmoid" if _has_experts(config) else "softmax",
        "expert_bias": _has_experts,
        "expert_weights_norm": _normalised,
        "expert_weights_scale": _scale,
        "expert_latent_length": _latent,
    },
    kind_of=_kinds,
    kinds={
        "mamba": BlockKind(_NO_ATTENTION | _NO_FFN, _by_either(_MAMBA)),
        "attention": BlockKind(_NO_MAMBA | _NO_FFN, _by_either(_ATTENTION)),
        "mlp": BlockKind(_NO_ATTENTION | _NO_MAMBA, _by_either(_MLP)),
        "moe": BlockKind(
            {
                **_NO_ATTENTION,
                **_NO_MAMBA,
                "feed_forward_length": Field("moe_intermediate_size", 7688),
                "expert_count": Field("n_routed_experts", 8),
                "expert_used_count": Field("num_experts_per_tok", 2),
                "expert_shared_feed_forward_length": Field("moe_shared_expert_intermediate_size", 7688),
            },
            _by_either(_MOE),
        ),
    },
    tensors={
        **_by_either(
            {
                "token_embd.weight": Source("embeddings.weight"),
                **naming.pair("output_norm", "norm_f", bias=False),
            }
        ),
        "output.weight": Source("lm_head.weight"),
    },
    expect={
        "use_bias": False,
        "mlp_bias": False,
        "attention_bias": False,
        "mamba_proj_bias": False,
        "use_conv_bias": True,
        "mamba_hidden_act": "silu",
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
    },
    skip=("mtp.*",),  # blocks that draft the tokens after the next one
)
