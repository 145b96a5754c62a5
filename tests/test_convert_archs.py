"""From config.json to the structure, and the total mapping of tensors, for every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CHECKPOINTS, copy_checkpoint, load_tensors, save_tensors
from families import CASES

from convert.arch import Source, describe, families, find_arch
from convert.checkpoint import open_checkpoint
from convert.config import Config
from convert.plan import Plan, Types, make_plan
from convert.rewrites import NAMES
from runtime.errors import UserError
from runtime.model_file.structure import Structure
from runtime.model_file.tensor_shapes import required_tensors

Folder = Callable[[str], Path]

MINIMAL_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "relu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}
MINIMAL_OPT = {
    "architectures": ["OPTForCausalLM"],
    "activation_function": "relu",
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 50,
    "vocab_size": 100,
}


def structure(values: dict[str, Any], **changes: Any) -> Structure:
    config = Config("config.json", {**values, **changes})
    return describe(find_arch(config), config)


def plan_of(folder: Path) -> Plan:
    return make_plan(open_checkpoint(folder), Types())


def test_old_llama_configs_get_hugging_faces_defaults() -> None:
    s = structure(MINIMAL_LLAMA)
    assert (s.head_count_kv, s.head_length, s.context_length) == (4, 16, 2048)
    assert (s.norm_epsilon, s.rope_freq_base, s.rope_dimension_count) == (1e-6, 10000.0, 16)
    assert (s.tied_output, s.attention_bias, s.ffn_bias, s.rope_scaling) == (False, False, False, "none")


def test_null_counts_as_missing_and_integers_as_floats() -> None:
    s = structure(MINIMAL_LLAMA, head_dim=None, num_key_value_heads=None, rope_scaling=None, rope_theta=5000)
    assert (s.head_length, s.head_count_kv, s.rope_freq_base) == (16, 4, 5000.0)


def test_opt_defaults() -> None:
    s = structure(MINIMAL_OPT)
    assert (s.norm_placement, s.output_norm, s.tied_output, s.ffn_bias, s.attention_bias) == ("pre", *[True] * 4)
    assert (s.token_embedding_length, s.projected, s.context_length, s.norm_epsilon) == (64, False, 50, 1e-5)


def test_opt_variants() -> None:
    post = structure(MINIMAL_OPT, do_layer_norm_before=False, word_embed_proj_dim=32)
    assert (post.norm_placement, post.output_norm, post.projected) == ("post", False, True)
    assert structure(MINIMAL_OPT, _remove_final_layer_norm=True).output_norm is False
    assert structure(MINIMAL_OPT, enable_bias=False).ffn_bias is False


def case_plan(name: str, checkpoint: Folder) -> Plan:
    ffn_type = CASES[name].ffn_type if name in CASES else None
    return make_plan(open_checkpoint(checkpoint(name)), Types(), ffn_type=ffn_type)


@pytest.mark.parametrize("name", [*CHECKPOINTS, *CASES])
def test_every_tensor_has_its_place(name: str, checkpoint: Folder) -> None:
    plan = case_plan(name, checkpoint)
    weights = load_tensors(checkpoint(name))
    assert [t.name for t in plan.tensors] == list(required_tensors(plan.structure))
    parts = [part for tensor in plan.tensors for part in tensor.parts]
    sources = [part.source for part in parts if isinstance(part.source, Source)]
    used = {source.name for source in sources} | {source.columns for source in sources if source.columns}
    assert used | {"lm_head.weight"} >= set(weights) >= used


def test_every_mapping_and_rewrite_is_used_by_a_test_checkpoint(checkpoint: Folder) -> None:
    plans = [case_plan(name, checkpoint) for name in [*CHECKPOINTS, *CASES]]
    for arch in families().values():
        patterns = {t.name.replace("blk.0.", "blk.{i}.") for plan in plans if plan.arch == arch for t in plan.tensors}
        assert set(arch.tensors) <= patterns
    used = {t.source.rewrite for plan in plans for t in plan.tensors if isinstance(t.source, Source)}
    assert used == NAMES


def test_missing_and_unknown_tensors_are_reported_together(checkpoint: Folder, tmp_path: Path) -> None:
    folder = copy_checkpoint(checkpoint("llama-mha"), tmp_path / "x")
    weights = load_tensors(folder)
    weights["model.layers.1.mlp.gate.weight"] = weights.pop("model.layers.1.mlp.gate_proj.weight")
    save_tensors(folder, weights)
    with pytest.raises(UserError) as error:
        plan_of(folder)
    assert "1 tensors missing (model.layers.1.mlp.gate_proj.weight)" in error.value.message
    assert "1 tensors unknown (model.layers.1.mlp.gate.weight)" in error.value.message


def test_biases_without_the_option_are_unknown(checkpoint: Folder, tmp_path: Path) -> None:
    folder = copy_checkpoint(checkpoint("llama-biases"), tmp_path / "x", mlp_bias=False)
    with pytest.raises(UserError, match="6 tensors unknown"):
        plan_of(folder)


@pytest.mark.parametrize("name", ["llama-tied", "opt-pre-norm"])
def test_names_without_the_base_prefix(name: str, checkpoint: Folder, tmp_path: Path) -> None:
    folder = copy_checkpoint(checkpoint(name), tmp_path / "x")
    weights = {tensor.removeprefix("model."): weight for tensor, weight in load_tensors(folder).items()}
    save_tensors(folder, weights)
    assert [t.name for t in plan_of(folder).tensors] == [t.name for t in plan_of(checkpoint(name)).tensors]


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("llama-mha", {"vocab_size": 4000}, r"model.embed_tokens.weight is \[4096, \d+\] instead of \[4000, "),
        ("llama-mha", {"intermediate_size": 128}, r"down_proj.weight is \[\d+, 256\] instead of \[\d+, 128\]"),
        (
            "llama-gqa",
            {"num_key_value_heads": 4},
            "4 shapes disagree with config.json: model.layers.0.self_attn.k_proj",
        ),
        ("opt-pre-norm", {"max_position_embeddings": 1026}, r"is \[1026, \d+\] instead of \[1028, "),
    ],
)
def test_shapes_that_disagree_with_the_config(
    name: str, changes: dict[str, Any], complaint: str, checkpoint: Folder, tmp_path: Path
) -> None:
    folder = copy_checkpoint(checkpoint(name), tmp_path / "x", **changes)
    with pytest.raises(UserError, match=complaint):
        plan_of(folder)


@pytest.mark.parametrize(
    ("values", "changes", "complaint"),
    [
        (MINIMAL_LLAMA, {"hidden_act": "silu"}, "`hidden_act` is `silu`, expected `relu`"),
        (MINIMAL_OPT, {"activation_function": "gelu"}, "`activation_function` is `gelu`, expected `relu`"),
        (MINIMAL_LLAMA, {"hidden_act": None}, "no `hidden_act`"),
        (MINIMAL_LLAMA, {"architectures": ["MambaForCausalLM"]}, "architecture MambaForCausalLM, expected Arcee"),
        (MINIMAL_LLAMA, {"architectures": None}, "no `architectures`"),
        (MINIMAL_LLAMA, {"hidden_size": None}, "no `hidden_size`"),
        (MINIMAL_LLAMA, {"hidden_size": "64"}, '`hidden_size` is "64", expected an integer'),
        (MINIMAL_LLAMA, {"attention_bias": 1}, "`attention_bias` is 1, expected true or false"),
        (MINIMAL_LLAMA, {"num_attention_heads": 0}, "`num_attention_heads` is 0, expected more than 0"),
        (MINIMAL_LLAMA, {"num_key_value_heads": 3}, "4 heads, expected a multiple of the 3 key-value heads"),
        (MINIMAL_LLAMA, {"rms_norm_eps": 0.0}, "must be positive"),
        (MINIMAL_LLAMA, {"num_hidden_layers": -1}, "block_count is -1"),
        (MINIMAL_OPT, {"layer_norm_elementwise_affine": False}, "is false, expected true"),
    ],
)
def test_configs_that_are_refused(values: dict[str, Any], changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError) as error:
        structure(values, **changes)
    assert complaint in error.value.message


def test_fatrelu_takes_its_threshold_from_the_config() -> None:
    s = structure(MINIMAL_LLAMA, hidden_act="fatrelu", hidden_act_param=0.01)
    assert (s.ffn_activation, s.activation_threshold) == ("fatrelu", 0.01)
    with pytest.raises(UserError, match="no `hidden_act_param`"):
        structure(MINIMAL_LLAMA, hidden_act="fatrelu")


@pytest.mark.parametrize("wrong", ["fatrelu", "relu:0.1", "fatrelu:", "fatrelu:x", "fatrelu:nan", "fatrelu:-1", "gelu"])
def test_ffn_types_that_are_none(wrong: str) -> None:
    config = Config("config.json", MINIMAL_LLAMA)
    with pytest.raises(
        UserError, match=f"--ffn-type: `{wrong}`, expected one of relu, relu2, fatrelu:THRESHOLD, drelu"
    ):
        describe(find_arch(config), config, ffn_type=wrong)


def test_drelu_needs_a_gate() -> None:
    config = Config("config.json", MINIMAL_OPT)
    with pytest.raises(UserError, match="is `drelu`, expected ffn"):
        describe(find_arch(config), config, ffn_type="drelu")


def test_a_window() -> None:
    values = {
        **MINIMAL_LLAMA,
        "architectures": ["MistralForCausalLM"],
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
    }
    assert structure(values, sliding_window=1024).sliding_window == 1024
    assert structure(values, sliding_window=None).sliding_window == 0
    assert structure(values, sliding_window=32768).sliding_window == 0  # it holds the whole context
    assert structure(values).sliding_window == 4096  # as transformers takes it
    assert structure(values).context_length == 32768


def test_a_file_names_the_oldest_schema_that_describes_it() -> None:
    plain = structure(MINIMAL_LLAMA)
    assert plain.to_metadata()["lazyneuron.schema_version"] == 1
    for change in (
        {"logit_softcap": 15.0},
        {"qk_norm": "before_rope"},
        {"ffn_sub_norm": True},
        {"residual_scale": 0.5},
    ):
        assert replace(plain, **change).to_metadata()["lazyneuron.schema_version"] == 2


def test_ffn_type_overrides_the_config() -> None:
    config = Config("config.json", {**MINIMAL_LLAMA, "hidden_act": "silu"})
    assert describe(find_arch(config), config, ffn_type="relu").ffn_activation == "relu"
    with pytest.raises(UserError, match="--ffn-type: `silu`, expected one of relu, relu2, fatrelu:THRESHOLD, drelu"):
        describe(find_arch(config), config, ffn_type="silu")
