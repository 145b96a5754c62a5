"""Nemotron-H checkpoints: the forms of their configs and names, and what is refused; its arithmetic is proved in test_families.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import copy_checkpoint, load_tensors, save_tensors
from families import unclamped
from oracle import max_difference, random_ids

from convert.checkpoint import open_checkpoint
from convert.config import Config
from convert.plan import Plan, Types, make_plan, outline
from convert.verify.reference import NumpyModel
from runtime.errors import UserError
from runtime.model_file.structure import Attention, Mamba2, Structure

Folder = Callable[[str], Path]
# As in the 8B's config.json, with fewer blocks.
PUBLISHED = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-",
    "num_hidden_layers": 5, "hidden_size": 4096, "vocab_size": 131072, "tie_word_embeddings": False,
    "intermediate_size": 21504, "mlp_hidden_act": "relu2", "mlp_bias": False, "use_bias": False,
    "num_attention_heads": 32, "num_key_value_heads": 8, "attention_head_dim": 128, "attention_bias": False,
    "rope_theta": 10000, "partial_rotary_factor": 1.0, "sliding_window": None, "max_position_embeddings": 8192,
    "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "expand": 2,
    "use_conv_bias": True, "mamba_proj_bias": False, "mamba_hidden_act": "silu", "chunk_size": 128,
    "time_step_min": 0.001, "time_step_limit": [0.0, float("inf")], "layer_norm_epsilon": 1e-5,
    "rms_norm_eps": 1e-5, "residual_in_fp32": False, "auto_map": {"AutoConfig": "code"},
}  # fmt: skip


def described(**changes: Any) -> Structure:
    values = {key: value for key, value in (PUBLISHED | changes).items() if value != "gone"}
    return outline(Config("`config.json`", values))[1]


def plan_of(folder: Path) -> Plan:
    return make_plan(open_checkpoint(folder), Types("f32"))


def test_each_block_is_what_its_letter_says() -> None:
    s = described()
    mixers = [block.mixer for block in s.blocks]
    assert mixers[0] == mixers[2] == Mamba2(128, 64, 128, 8, 4)
    assert mixers[3] == Attention(32, 8, 128)  # rope_theta and partial_rotary_factor mean nothing
    assert mixers[1] is mixers[4] is None
    assert [block.ffn.n_ff if block.ffn else 0 for block in s.blocks] == [0, 21504, 0, 0, 21504]
    assert all(not ffn.gated and ffn.activation == "relu2" for ffn in s.ffns.values())
    assert (s.norm_epsilon, s.context_length, s.tied_output) == (1e-5, 8192, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_block_type": ["mamba", "mlp", "mamba", "attention", "mlp"]},
        {"layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"]},
        {
            "layers_block_type": ["mamba", "mlp", "linear_attention", "attention", "mlp"],
            "hybrid_override_pattern": "gone",
            "num_hidden_layers": "gone",
        },
        {"attention_head_dim": "gone", "head_dim": 128},
        {"layer_norm_epsilon": "gone", "norm_eps": 1e-5},
        {"mamba_n_groups": 8, "n_groups": "gone", "mamba_d_conv": 4, "conv_kernel": "gone"},
        {"mtp_hybrid_override_pattern": "*E", "num_nextn_predict_layers": 1},
        {"n_group": 1, "topk_group": 1, "norm_topk_prob": True},
        {"time_step_min": 0},
        {"expand": 7},
    ],
)
def test_the_same_model_said_otherwise(changes: dict[str, Any]) -> None:
    assert described(**changes) == described()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hybrid_override_pattern": "M-X*-"}, 'block 2 is "X", expected one of M, *, -, E'),
        ({"layers_block_type": ["mamba", "rnn"]}, 'block 1 is "rnn", expected one of mamba, attention, mlp, moe'),
        ({"hybrid_override_pattern": "M-M*"}, "`hybrid_override_pattern` has 4 blocks, expected 5 as `num_hidden"),
        ({"layers_block_type": ["mamba"] * 5}, "`hybrid_override_pattern` and `layers_block_type` disagree"),
        ({"hybrid_override_pattern": "gone"}, "neither `hybrid_override_pattern` nor `layers_block_type`"),
        ({"hybrid_override_pattern": 7}, "`hybrid_override_pattern` is 7, expected a string"),
        ({"n_group": 4}, "`n_group` is 4, expected 1"),
        ({"topk_group": 2}, "`topk_group` is 2, expected 1"),
        ({"n_shared_experts": 2}, "`n_shared_experts` is 2, expected 1"),
        ({"use_conv_bias": False}, "`use_conv_bias` is false, expected true"),
        ({"mamba_proj_bias": True}, "`mamba_proj_bias` is true, expected false"),
        ({"use_bias": True}, "`use_bias` is true, expected false"),
        ({"mamba_hidden_act": "relu"}, '`mamba_hidden_act` is "relu", expected "silu"'),
        ({"mlp_hidden_act": "silu"}, "`mlp_hidden_act` is `silu`, expected `relu2`"),
        ({"norm_eps": 1e-6}, "`norm_eps` is 1e-06, but `layer_norm_epsilon`, which means the same, 1e-05"),
        ({"architectures": ["NemotronHPuzzleForCausalLM"]}, "architecture NemotronHPuzzleForCausalLM, expected"),
    ],
)
def test_what_is_refused_in_one_line(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError) as error:
        described(**changes)
    assert complaint in error.value.message
    assert "\n" not in error.value.message


def renamed(folder: Path, change: Callable[[str], str], **more: Any) -> None:
    save_tensors(folder, {change(name): weights for name, weights in load_tensors(folder).items()} | more)


@pytest.mark.parametrize("base", ["model.", ""])
def test_either_beginning_of_names(base: str, checkpoint: Folder, tmp_path: Path) -> None:
    folder = copy_checkpoint(checkpoint("nemotron_h"), tmp_path / "x")
    renamed(folder, lambda name: name.replace("backbone.", base))
    found, usual = plan_of(folder), plan_of(checkpoint("nemotron_h"))
    assert [t.name for t in found.tensors] == [t.name for t in usual.tensors]
    assert not any(t.source.name.startswith("backbone.") for t in found.tensors)  # type: ignore[union-attr]


def test_a_tensor_of_another_shape_is_named_as_the_checkpoint_does(checkpoint: Folder, tmp_path: Path) -> None:
    folder = copy_checkpoint(checkpoint("nemotron_h"), tmp_path / "x", intermediate_size=192)
    renamed(folder, lambda name: name.replace("backbone.", "model."))
    with pytest.raises(
        UserError, match=r"model\.layers\.1\.mixer\.up_proj\.weight is \[224, 96\] instead of \[192, 96\]"
    ):
        plan_of(folder)


def test_steps_below_transformers_bound_are_those_of_single_tokens(checkpoint: Folder, tmp_path: Path) -> None:
    """`time_step_min` bounds the steps of its prompts, and of a first token; after that it does not, and neither do we."""
    folder = copy_checkpoint(checkpoint("nemotron_h"), tmp_path / "x")
    weights = load_tensors(folder)
    for name in weights:
        if name.endswith("dt_bias"):
            weights[name] = weights[name] - 8
        if name.endswith("A_log"):
            weights[name] = weights[name] + 6  # so that what is kept still depends on the step
    save_tensors(folder, weights)
    model = transformers.NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = random_ids(24, 4000)
    with torch.no_grad():
        prompt = model(torch.tensor([ids])).logits[0].numpy()
        single, past = [], None
        bounds = [layer.mixer.__dict__.get("time_step_limit") for layer in model.model.layers]
        unclamped(model)
        for i, token in enumerate(ids):
            if i == 1:
                for layer, bound in zip(model.model.layers, bounds, strict=True):
                    layer.mixer.time_step_limit = bound
            out = model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
            single.append(out.logits[0, 0].numpy())
            past = out.past_key_values
    opened = open_checkpoint(folder)
    found = NumpyModel(opened, plan_of(folder)).logits(ids)
    assert max_difference(np.array(single), found) <= 2e-4
    assert max_difference(prompt, found) > 1e-2


def test_blocks_that_draft_are_left_aside_and_said(checkpoint: Folder, tmp_path: Path) -> None:
    folder = copy_checkpoint(checkpoint("nemotron_h"), tmp_path / "x")
    weights = load_tensors(folder)
    extra = weights["backbone.layers.1.mixer.up_proj.weight"].clone()
    renamed(folder, str, **{"mtp.layers.0.mixer.up_proj.weight": extra, "mtp.layers.0.norm.weight": extra[0].clone()})
    notes = plan_of(folder).notes
    assert notes == ("2 tensors of the checkpoint are left aside (mtp.layers.0.mixer.up_proj.weight, ...)",)
