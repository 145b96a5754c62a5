"""The forms that a config.json may have, against transformers: which value counts, what it means, and what is refused."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import copy_checkpoint, load_tensors, save, save_tensors
from oracle import max_difference, random_ids
from plain import convert

import runtime
from convert.arch import describe, families, find_arch
from convert.checkpoint import open_checkpoint
from convert.config import Config
from convert.plan import Plan, Types, make_plan
from runtime.errors import UserError
from runtime.model_file.structure import Structure

Folder = Callable[[str], Path]
BODIES = {
    "Llama": {"hidden_act": "relu"},
    "Mistral": {"hidden_act": "relu", "num_key_value_heads": 2},
    "Qwen2": {"hidden_act": "relu", "num_key_value_heads": 2},
    "Nemotron": {"num_key_value_heads": 2},
    "Arcee": {},
    "Jais2": {},
    "NanoChat": {},
    "BitNet": {"num_key_value_heads": 2},
    "Falcon": {"activation": "relu"},
    "Persimmon": {},
}
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
LINEAR = {"type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config_of(body: str, **changes: Any) -> Config:
    return Config("config.json", {"architectures": [f"{body}ForCausalLM"], **SIZES, **BODIES[body], **changes})


def structure(body: str, **changes: Any) -> Structure:
    config = config_of(body, **changes)
    return describe(find_arch(config), config)


# --- rotation ---------------------------------------------------------------------------------------------------------

ROTATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "theta": {"rope_theta": 5e5},
    "theta in rope_parameters": {"rope_parameters": {"rope_theta": 5e5}},
    "two thetas": {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "linear, old": {"rope_theta": 5e5, "rope_scaling": LINEAR},
    "linear, new": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4}},
    "type and rope_type": {"rope_scaling": {**LINEAR, "rope_type": "default"}},
    "rope_scaling beside rope_parameters": {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LINEAR},
    "the usual share beside": {"rope_parameters": {"partial_rotary_factor": 0.5}, "rope_scaling": LINEAR},
    "another kind beside": {"rope_parameters": YARN, "rope_scaling": LINEAR, "rope_theta": 5e5},
    "empty rope_scaling": {"rope_parameters": {**YARN, "rope_theta": 5e5}, "rope_scaling": {}},
    "null rope_scaling": {"rope_parameters": {**YARN, "rope_theta": 5e5}, "rope_scaling": None},
    "stray factor": {"rope_scaling": {"factor": 4.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 5e5},
    "yarn": {"rope_parameters": YARN},
    "yarn, context beside": {"rope_scaling": YARN, "original_max_position_embeddings": 128},
    "yarn, no context": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn, null factor": {"rope_scaling": {**YARN, "factor": None}},
    "yarn, all options": {
        "rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2.0, "truncate": False, "mscale": 1.0, "mscale_all_dim": 0.5}
    },
    "yarn, zero options": {"rope_scaling": {**YARN, "beta_fast": 0, "mscale": 0, "mscale_all_dim": 1.0}},
    "yarn, attention": {"rope_scaling": {**YARN, "attention_factor": 1.5}},
    "yarn, betas the wrong way round": {"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 32}},
    "part of a head": {"partial_rotary_factor": 0.25},
    "part of a head, in rope_parameters": {"partial_rotary_factor": 0.25, "rope_parameters": {"partial_rotary_factor": 1.0}},
}  # fmt: skip
WHOLE_HEADS = {*BODIES} - {"Nemotron", "Persimmon"}  # whatever partial_rotary_factor says


@pytest.mark.parametrize("form", ROTATIONS)
@pytest.mark.parametrize("body", BODIES)
def test_frequencies_equal_transformers(body: str, form: str) -> None:
    # Copied: transformers completes the objects that it is given.
    config = getattr(transformers, f"{body}Config")(
        **json.loads(json.dumps({**SIZES, **BODIES[body], **ROTATIONS[form]}))
    )
    module = importlib.import_module(f"transformers.models.{body.lower()}.modeling_{body.lower()}")
    expected = getattr(module, f"{body}RotaryEmbedding")(config)
    s = structure(body, **ROTATIONS[form])
    assert s.rope_dimension_count == 2 * len(expected.inv_freq)
    frequencies = s.rope_freq_base ** (-np.arange(0, s.rope_dimension_count, 2) / s.rope_dimension_count)
    sign = -1 if body == "NanoChat" else 1
    if s.rope_freq_factors:
        ours = config_of(body, **ROTATIONS[form])
        frequencies = frequencies / (sign * find_arch(ours).tensors["rope_freqs.weight"].make(ours))  # type: ignore[union-attr]
    np.testing.assert_allclose(frequencies / s.rope_scaling_factor, expected.inv_freq.numpy(), rtol=2e-6)
    assert s.rope_attention_factor == pytest.approx(expected.attention_scaling)
    assert (s.rope_dimension_count == s.head_length) >= (body in WHOLE_HEADS)


@pytest.mark.parametrize("family", families())
def test_every_family_with_a_rotation_has_a_tensor_for_its_frequencies(family: str) -> None:
    arch = families()[family]
    assert ("rope_freqs.weight" in arch.tensors) == ("rope_dimension_count" in arch.keys)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope type `su`, expected default, linear, dynamic, llama3, yarn"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8}}, "rope type `longrope`"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "rope type `mrope`"),
        ({"rope_scaling": {"type": None, "factor": 2.0}}, "rope type `null`"),
        ({"rope_parameters": {"rope_type": 3}}, "rope type `3`"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope type `one per layer type`"),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 5e5}}, "`rope_parameters` says rope_theta 500000.0"),
        ({"rope_scaling": LINEAR, "partial_rotary_factor": 0.5}, "this architecture rotates whole heads"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: no `factor`"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "`factor` is 0.0, expected more than 0"),
        ({"rope_scaling": {"type": "linear", "factor": 1e300}}, "`factor` is 1e+300, expected 1e-9 to 1e15"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "expected low_freq_factor below high_freq_factor"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "is 0, expected more than 0"),
        ({"rope_scaling": {**YARN, "beta_slow": -1}}, "`beta_slow` is -1.0"),
        ({"rope_scaling": "yarn"}, '`rope_scaling` is "yarn", expected an object'),
        ({"rope_theta": float("nan")}, "`rope_theta` is NaN, expected a number"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0, expected more than 1"),
        ({"rope_theta": "10000"}, '`rope_theta` is "10000", expected a number'),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, expected at most 1"),
        ({"max_position_embeddings": -5}, "`max_position_embeddings` is -5, expected more than 0"),
    ],
)  # fmt: skip
def test_rotations_that_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError) as error:
        structure("Llama", **changes)
    assert complaint in error.value.message


# --- heads and sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "changes", "expected"),
    [
        ("Llama", {}, (16, 4)),
        ("Llama", {"head_dim": None, "num_key_value_heads": None}, (16, 4)),
        ("Llama", {"head_dim": 24}, (24, 4)),
        ("Nemotron", {"num_attention_heads": 6, "head_dim": 16}, (16, 2)),
        ("Qwen2", {"num_attention_heads": 6, "head_dim": 16}, (16, 2)),
        ("NanoChat", {"num_attention_heads": 6}, (10, 6)),  # 64 / 6, rounded down
        ("Mistral", {"num_key_value_heads": None}, (16, 4)),
        ("Falcon", {"num_kv_heads": 2}, (16, 1)),
        ("Persimmon", {"num_key_value_heads": 0, "head_dim": 0}, (16, 4)),  # it has neither key
    ],
)
def test_heads(body: str, changes: dict[str, Any], expected: tuple[int, int]) -> None:
    s = structure(body, **changes)
    assert (s.head_length, s.head_count_kv) == expected


DEFAULTS = {  # field of a structure -> config.json's keys
    "norm_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "tied_output": ("tie_word_embeddings",),
    "attention_output_bias": ("attention_bias", "enable_bias"),
    "ffn_bias": ("mlp_bias", "bias", "enable_bias"),
    "logit_softcap": ("final_logit_softcapping",),
    "context_length": ("max_position_embeddings",),
}


@pytest.mark.parametrize("body", [*BODIES, "OPT"])
def test_values_that_a_config_leaves_out(body: str) -> None:
    heads = {"BitNet": 20}.get(body, 32)
    sizes = {"vocab_size": 100, "hidden_size": 16 * heads, "num_hidden_layers": 2, "num_attention_heads": heads}
    acts = {"Falcon": {"activation": "relu"}, "OPT": {}, "Persimmon": {"hidden_act": "relu2"}}
    given = {**sizes, "intermediate_size": 96, "ffn_dim": 96, **acts.get(body, {"hidden_act": "relu"})}
    config = Config("config.json", {"architectures": [f"{body}ForCausalLM"], **given})
    s, expected = describe(find_arch(config), config), getattr(transformers, f"{body}Config")(**given)
    checked = 0
    for field, keys in DEFAULTS.items():
        for key in keys:
            if hasattr(expected, key):
                assert getattr(s, field) == getattr(expected, key), key
                checked += 1
    assert checked >= 2


@pytest.mark.parametrize(("body", "usual"), [("Mistral", 8), ("Qwen2", 32), ("BitNet", 5), ("Llama", 40)])
def test_key_value_heads_that_a_config_leaves_out(body: str, usual: int) -> None:
    heads = 2 * usual if body != "Llama" else usual
    config = config_of(body, hidden_size=16 * heads, num_attention_heads=heads)
    values = {key: value for key, value in config.values.items() if key != "num_key_value_heads"}
    found = describe(find_arch(config), Config("config.json", values)).head_count_kv
    expected = getattr(transformers, f"{body}Config")(**{k: v for k, v in values.items() if k != "architectures"})
    assert found == expected.num_key_value_heads == usual


@pytest.mark.parametrize(
    ("body", "changes", "complaint"),
    [
        ("Llama", {"head_dim": 0}, "`head_dim` is 0, expected more than 0"),
        ("Llama", {"head_dim": 16.0}, "`head_dim` is 16.0, expected an integer"),
        ("Llama", {"num_key_value_heads": 0}, "head_count_kv is 0, expected 1 to"),
        ("Llama", {"num_key_value_heads": 3}, "4 heads, expected a multiple of the 3 key-value heads"),
        ("Llama", {"num_attention_heads": 0}, "`num_attention_heads` is 0, expected more than 0"),
        ("Falcon", {"num_attention_heads": 6}, "hidden_size 64 is not a multiple of num_attention_heads 6"),
        ("Llama", {"vocab_size": 10**400}, "expected an integer"),
        ("Llama", {"vocab_size": 1e400}, "`vocab_size` is Infinity, expected an integer"),
        ("Llama", {"rms_norm_eps": 10**400}, "expected a number"),
        ("Llama", {"architectures": [["LlamaForCausalLM"]]}, '`architectures[0]` is ["LlamaForCausalLM"], expected a string'),
        ("Llama", {"architectures": "LlamaForCausalLM"}, '`architectures` is "LlamaForCausalLM", expected a list'),
        ("Llama", {"per_layer_config": {"0": {"head_dim": 8}}}, '`per_layer_config` is {"0": {"head_dim": 8}}, expected {}'),
        ("Qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, '"sliding_attention"], expected "full_attention"'),
        ("Qwen2", {"use_sliding_window": True}, "`use_sliding_window` is true, expected false"),
        ("Falcon", {"n_embed": 32}, "`n_embed` is 32, but `hidden_size`, which means the same, 64"),
        ("Falcon", {"alibi": True}, "`alibi` is true, expected false"),
        ("Llama", {"hidden_act": "fatrelu", "hidden_act_param": -0.5}, "logit_softcap and ffn.activation_threshold 0 or more"),
        ("Llama", {"model_type": "granite"}, '`model_type` is "granite", expected "llama", as architecture LlamaForCausalLM has it'),
        ("Nemotron", {"model_type": "jais2"}, '`model_type` is "jais2", expected "nemotron"'),
        ("Llama", {"transformers_weights": "other.safetensors"}, '`transformers_weights` is "other.safetensors", expected'),
        ("NanoChat", {"final_logit_softcapping": 0}, "`final_logit_softcapping` is 0.0, expected more than 0"),
    ],
)  # fmt: skip
def test_sizes_that_are_refused(body: str, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError) as error:
        structure(body, **changes)
    assert complaint in error.value.message


@pytest.mark.parametrize("family", families())
def test_a_model_type_is_the_one_of_transformers_class(family: str) -> None:
    arch = families()[family]
    oracle = getattr(transformers, arch.architectures[0], None)
    shared = [other for other in families().values() if arch.architectures[0] in other.architectures]
    if oracle is not None or len(shared) == 1:
        assert arch.model_type == ("" if oracle is None else oracle.config_class.model_type)
    else:  # without it, the two could not be told apart
        assert arch.model_type


@pytest.mark.parametrize(("model_type", "family"), [("llama_sparse_relu", "sparse_llama"), ("sparsellama", "llama")])
def test_the_model_type_decides_between_families_of_one_architecture(model_type: str, family: str) -> None:
    config = Config("config.json", {"architectures": ["SparseLlamaForCausalLM"], "model_type": model_type})
    assert find_arch(config).family == family


def test_a_checkpoint_with_code_of_its_own_calls_itself_as_it_likes() -> None:
    plain = structure("Llama")
    assert structure("Llama", model_type="custom", auto_map={"AutoModelForCausalLM": "modeling.Custom"}) == plain
    assert structure("Llama", model_type="llama", transformers_weights="model.safetensors") == plain


def test_nulls_mean_what_is_usual() -> None:
    plain = structure("Falcon")
    assert structure("Falcon", alibi=None, hidden_size=None, n_embed=64, bias=None, rope_theta=None) == plain
    assert structure("Qwen2", use_sliding_window=None, layer_types=None) == structure("Qwen2")
    assert structure("Qwen2", layer_types=["full_attention"]) == structure("Qwen2")


# --- the output head --------------------------------------------------------------------------------------------------


def plan_of(folder: Path) -> Plan:
    return make_plan(open_checkpoint(folder), Types("f32"))


def with_tensors(source: Path, folder: Path, change: Callable[[dict[str, Any]], None], **config: Any) -> Path:
    """A copy of a checkpoint with other tensors."""
    copy = copy_checkpoint(source, folder, **config)
    tensors = load_tensors(copy)
    change(tensors)
    save_tensors(copy, tensors)
    return copy


def of_head(plan: Plan) -> tuple[bool, list[str], int]:
    names = [t.source.name for t in plan.tensors if t.name in ("token_embd.weight", "output.weight")]  # type: ignore[union-attr]
    return plan.structure.tied_output, names, len(plan.notes)


EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.update({HEAD: t[EMBEDDINGS].clone()}), (True, [EMBEDDINGS], 0)),
        (lambda t: t.update({HEAD: t[EMBEDDINGS].float()}), (True, [EMBEDDINGS], 0)),
        (lambda t: t.update({HEAD: t.pop(EMBEDDINGS)}), (True, [HEAD], 0)),
        (lambda t: t.update({HEAD: t[EMBEDDINGS].flip(0)}), (False, [EMBEDDINGS, HEAD], 1)),
        (lambda t: t.update({HEAD: t[EMBEDDINGS].float() * (1 + 1e-6)}), (False, [EMBEDDINGS, HEAD], 1)),
    ],
    ids=["equal", "equal in another type", "alone", "another", "another by little"],
)
def test_a_stored_head_of_tied_embeddings(change: Any, expected: Any, checkpoint: Folder, tmp_path: Path) -> None:
    assert of_head(plan_of(with_tensors(checkpoint("llama-tied"), tmp_path / "x", change))) == expected


@pytest.mark.parametrize(
    ("name", "config", "change", "message", "hint"),
    [
        ("llama-mha", {}, lambda t: t.pop(HEAD), "1 tensors missing (lm_head.weight)", "set `tie_word_embeddings` to true"),
        ("llama-mha", {}, lambda t: t.pop(EMBEDDINGS), "1 tensors missing (model.embed_tokens.weight)", ""),
        ("llama-tied", {}, lambda t: t.pop(EMBEDDINGS), "1 tensors missing (model.embed_tokens.weight)", ""),
        ("llama-tied", {}, lambda t: t.update({HEAD: t[EMBEDDINGS][:9].clone()}), "lm_head.weight is [9, 32] instead of", ""),
        ("llama-tied", {}, lambda t: t.update({HEAD: t[EMBEDDINGS].to(torch.int8)}), "lm_head.weight is of type I8", "quantised"),
        ("llama-mha", {"tie_word_embeddings": "yes"}, lambda t: None, '`tie_word_embeddings` is "yes"', ""),
    ],
)  # fmt: skip
def test_heads_that_are_refused(
    name: str, config: Any, change: Any, message: str, hint: str, checkpoint: Folder, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        plan_of(with_tensors(checkpoint(name), tmp_path / "x", change, **config))
    assert message in error.value.message
    assert hint in error.value.hint


# --- logits -----------------------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # body, its config, what config.json gets besides
    "more heads than hidden_size holds": ("Nemotron", {"num_attention_heads": 6, "head_dim": 16}, {}),
    "rope_scaling beside rope_parameters": ("Llama", {}, {"rope_scaling": LINEAR}),
    "partial_rotary_factor that does not count": ("Mistral", {}, {"partial_rotary_factor": 0.5}),
    "another head": ("Llama", {"tie_word_embeddings": True}, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_with_the_same_config(name: str, tmp_path: Path) -> None:
    body, config, written = MODELS[name]
    model = getattr(transformers, f"{body}ForCausalLM")(
        getattr(transformers, f"{body}Config")(**{**SIZES, **BODIES[body], **config})
    )
    save(model, tmp_path / "made")
    folder = copy_checkpoint(tmp_path / "made", tmp_path / "x", **written)
    if name == "another head":
        tensors = load_tensors(folder)
        save_tensors(folder, tensors | {HEAD: tensors[EMBEDDINGS].flip(0)})
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = random_ids(100, 4000)
    with torch.no_grad():
        expected = oracle(torch.tensor([ids])).logits[0].numpy()
    convert(folder, tmp_path / "x.gguf", type="f32")
    with runtime.load(tmp_path / "x.gguf", kv_type="f32", ffn="dense", device="none") as converted:
        assert max_difference(expected, converted.logits(ids)) <= 2e-3
