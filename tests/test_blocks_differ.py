"""Models whose blocks differ: what a file says of them, what is refused, and which tensors they have."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TOKENIZER, VOCAB_SIZE
from oracle import random_ids, relative
from safetensors.numpy import save_file

import runtime
from convert import convert, naming
from convert.arch import Arch, BlockKind, Field, Source
from convert.checkpoint import open_checkpoint
from convert.plan import Types, make_plan
from convert.rope import Rope
from convert.verify.reference import NumpyModel
from runtime.errors import UserError
from runtime.model_file.container import GgufPart
from runtime.model_file.structure import Attention, Structure
from runtime.model_file.structure_reading import read_structure
from runtime.model_file.tensor_shapes import block_tensors, required_tensors
from runtime.model_file.writer import write_gguf

EQUAL = Structure(
    source_architecture="test", vocab_size=64, context_length=32, embedding_length=32, block_count=4,
    feed_forward_length=64, head_count=4, head_count_kv=2, head_length=8, norm="layer", norm_epsilon=2.0**-17,
    position="rope_neox", ffn_gate="gated", ffn_activation="relu", ffn_bias=True, attention_bias=True,
    rope_dimension_count=8,
)  # fmt: skip
MIXED = replace(
    EQUAL,
    feed_forward_length=(64, 0, 96, 64),
    head_count=(4, 4, 0, 2),
    head_count_kv=(2, 4, 0, 1),
    rope_dimension_count=(8, 0, 0, 4),
    sliding_window=16,
    sliding_window_pattern=(False, True, False, True),
)


def read(metadata: dict[str, Any]) -> Structure:
    return read_structure({"general.architecture": "lazyneuron", **metadata}, "m.gguf")


def changed(structure: Structure = MIXED, **keys: Any) -> dict[str, Any]:
    """Its keys with some others, `__` standing for a dot."""
    return structure.to_metadata() | {f"lazyneuron.{k.replace('__', '.')}": v for k, v in keys.items()}


def test_each_block_has_sizes_of_its_own() -> None:
    mixers, ffns = [b.mixer for b in MIXED.blocks], [b.ffn for b in MIXED.blocks]
    assert mixers == [
        Attention(4, 2, 8, rope=8), Attention(4, 4, 8, window=16), None, Attention(2, 1, 8, rope=4, window=16)
    ]  # fmt: skip
    assert [ffn.n_ff if ffn else None for ffn in ffns] == [64, None, 96, 64]
    assert list(MIXED.ffns) == [0, 2, 3]
    assert list(MIXED.attentions) == [0, 1, 3]
    assert MIXED.attentions[3].query_length == 16
    assert MIXED.attentions[3].kv_length == 8


def test_blocks_that_differ_come_back_from_a_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", MIXED.to_metadata(), [])
    metadata = GgufPart(tmp_path / "m.gguf").metadata
    assert metadata["lazyneuron.schema_version"] == 3
    assert metadata["lazyneuron.feed_forward_length"].dtype == np.int32
    assert metadata["lazyneuron.attention.sliding_window_pattern"].dtype == np.bool_
    assert read_structure(metadata, "m.gguf") == MIXED


@pytest.mark.parametrize(
    ("fields", "version"),
    [
        ({}, 1), ({"embedding_norm": True}, 2), ({"feed_forward_length": (64, 64, 64, 0)}, 3), ({"sliding_window": 8}, 3),
        ({"rope_dimension_count": (8, 0, 8, 8)}, 3), ({"head_count_kv": (2, 2, 4, 2)}, 3),
    ],
)  # fmt: skip
def test_a_file_names_the_oldest_schema_that_knows_it(fields: dict[str, Any], version: int) -> None:
    assert replace(EQUAL, **fields).to_metadata()["lazyneuron.schema_version"] == version


def test_an_array_of_equal_values_means_the_one_value() -> None:
    arrays = {"feed_forward_length": [64] * 4, "attention__head_count": [4] * 4, "rope__dimension_count": [8] * 4}
    assert read(changed(EQUAL, **arrays)) == EQUAL
    windowed = replace(EQUAL, sliding_window=8)
    assert read(changed(windowed, attention__sliding_window_pattern=[True] * 4)) == windowed
    assert replace(EQUAL, feed_forward_length=(64,) * 4).to_metadata() == EQUAL.to_metadata()


def test_keys_of_blocks_that_differ_are_not_in_other_files() -> None:
    assert not any("sliding_window" in key for key in EQUAL.to_metadata())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"feed_forward_length": [64, 0, 96]}, "`lazyneuron.feed_forward_length` has 3 values, expected 4, one per block"),
        ({"feed_forward_length": []}, "`lazyneuron.feed_forward_length` has 0 values, expected 4, one per block"),
        ({"expert_count": []}, "`lazyneuron.expert_count` has 0 values, expected 4, one per block"),
        ({"expert_used_count": [0, 1, 0]}, "`lazyneuron.expert_used_count` has 3 values, expected 4, one per block"),
        ({"feed_forward_length": [64] * 3}, "`lazyneuron.feed_forward_length` has 3 values, expected 4, one per block"),
        ({"feed_forward_length": [64, 0, 96, -1]}, "feed_forward_length is (64, 0, 96, -1), expected 0 to 16777216"),
        ({"feed_forward_length": 0}, "feed_forward_length is 0, expected 1 to 16777216"),
        ({"feed_forward_length": [64, 0.5, 96, 64]}, "is [64, 0.5, 96, 64], expected int, or one int per block"),
        ({"feed_forward_length": [True] * 4}, "expected int, or one int per block"),
        ({"feed_forward_length": "64"}, "is '64', expected int, or one int per block"),
        ({"embedding_length": [32] * 4}, "`lazyneuron.embedding_length` is [32, 32, 32, 32], expected int"),
        ({"feed_forward_length": [64, 0, 0, 64]}, "block 2: neither attention nor Mamba nor FFN, expected at least one"),
        ({"feed_forward_length": [0] * 4, "attention__head_count_kv": 2, "attention__head_count": 4}, "is 0, expected 1 to"),
        ({"attention__head_count_kv": [2, 4, 0, 3]}, "block 3: 2 heads, expected a multiple of the 3 key-value heads"),
        ({"attention__head_count": [4, 4, 0, 0]}, "block 3: 0 heads, expected a multiple of the 1 key-value heads"),
        ({"attention__head_count_kv": [2, 4, 0, 1 << 20]}, "expected 0 to 16384"),
        ({"rope__dimension_count": [8, 0, 0, 3]}, "block 3: rope.dimension_count is 3, expected an even number"),
        ({"rope__dimension_count": [8, 0, 0, 10]}, "block 3: rope.dimension_count is 10, expected an even number up to"),
        ({"rope__dimension_count": 0}, "block 0: rope.dimension_count is 0, expected an even number"),
        ({"rope__freq_factors": True}, "rope.dimension_count is (8, 0, 0, 4), expected one number beside 0"),
        ({"attention__sliding_window": 1 << 30}, "attention.sliding_window is 1073741824, expected 0 to"),
        ({"attention__sliding_window": 0}, "attention.sliding_window_pattern without a window"),
        ({"attention__sliding_window_pattern": [True]}, "has 1 values, expected 4, one per block"),
        ({"attention__sliding_window_pattern": [1, 0, 1, 0]}, "is [1, 0, 1, 0], expected one bool per block"),
        ({"predictor__kind": "lowrank", "predictor__rank": [8] * 4, "predictor__error": [0.1] * 4},
         "block 1: a predictor of rank 8, expected 0 in a block without an FFN"),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(changed(**keys))
    assert message in caught.value.message
    assert caught.value.message.startswith("m.gguf: ")


def test_a_model_has_attention_and_an_ffn_somewhere() -> None:
    with pytest.raises(UserError, match="head_count_kv is 0, expected 1 to"):
        read(changed(EQUAL, attention__head_count_kv=[0] * 4))


def test_a_block_has_the_tensors_of_its_halves() -> None:
    both, attention, ffn = (set(block_tensors(MIXED, i)) for i in range(3))
    assert both == attention | ffn
    assert all(name.startswith("attn_") for name in attention)
    assert all(name.startswith("ffn_") for name in ffn)
    assert "attn_norm.weight" in attention
    assert "ffn_norm.weight" in ffn
    shapes = required_tensors(replace(MIXED, neuron_order="hot"))
    assert shapes["blk.2.ffn_up.weight"] == (32, 96)
    assert shapes["blk.2.ffn_down.weight"] == (96, 32)
    assert shapes["blk.3.attn_q.weight"] == (32, 16)
    assert shapes["blk.3.attn_k.bias"] == (8,)
    assert shapes["blk.1.attn_k.weight"] == (32, 32)
    assert {name for name in shapes if name.endswith("neuron_index")} == {
        f"blk.{i}.ffn_neuron_index" for i in (0, 2, 3)
    }


# --- a family that mixes kinds of blocks, one half in each ------------------------------------------------------------

_MIXER = "backbone.layers.{i}.mixer."
FAMILY = Arch(
    family="mixing",
    architectures=("MixingForCausalLM",),
    activation=Field("mlp_hidden_act"),
    activations={"relu2": "relu2"},
    keys={
        **naming.SIZES,
        **Rope().keys(),
        "sliding_window": Field("window"),
        "norm": "rms",
        "norm_epsilon": 2.0**-17,
        "ffn_gate": "none",
    },
    tensors={
        "token_embd.weight": Source("backbone.embeddings.weight"),
        **naming.pair("output_norm", "backbone.norm_f", bias=False),
        "output.weight": Source("lm_head.weight"),
        **naming.pair("blk.{i}.attn_norm", "backbone.layers.{i}.norm", bias=False),
        **naming.pair("blk.{i}.ffn_norm", "backbone.layers.{i}.norm", bias=False),
        **{f"blk.{{i}}.attn_{part}.weight": Source(f"{_MIXER}{part}_proj.weight") for part in "qkv"},
        "blk.{i}.attn_output.weight": Source(f"{_MIXER}o_proj.weight"),
        **naming.up(f"{_MIXER}up_proj", bias=False),
        **naming.down(f"{_MIXER}down_proj", bias=False),
    },
    kinds={
        "*": BlockKind({"feed_forward_length": 0}),
        "n": BlockKind({"feed_forward_length": 0, "rope_dimension_count": 0, "sliding_window_pattern": True}),
        "-": BlockKind({"head_count_kv": 0}),
        "+": BlockKind(
            {"feed_forward_length": Field("wide")},
            {
                **naming.pair("blk.{i}.ffn_norm", "backbone.layers.{i}.second_norm", bias=False),
                **naming.up("backbone.layers.{i}.mlp.up_proj", bias=False),
                **naming.down("backbone.layers.{i}.mlp.down_proj", bias=False),
            },
        ),
    },
    kind_of=lambda config: config.get("pattern", str),
)
CONFIG = {
    "architectures": ["MixingForCausalLM"], "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "wide": 96, "window": 4,
    "max_position_embeddings": 256, "mlp_hidden_act": "relu2", "pattern": "-*+n-",
}  # fmt: skip


@pytest.fixture
def mixing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of that family, which the converter knows."""
    monkeypatch.setattr("convert.arch.families", lambda: {"mixing": FAMILY})
    rng, at = np.random.default_rng(0), "backbone.layers."
    shapes = {"backbone.embeddings": (VOCAB_SIZE, 32), "backbone.norm_f": (32,), "lm_head": (VOCAB_SIZE, 32)}
    for i, kind in enumerate(CONFIG["pattern"]):
        shapes[f"{at}{i}.norm"] = (32,)
        if kind != "-":
            shapes |= {f"{at}{i}.mixer.{part}_proj": (16 if part in "kv" else 32, 32) for part in "qkvo"}
        if kind == "-":
            shapes |= {f"{at}{i}.mixer.up_proj": (64, 32), f"{at}{i}.mixer.down_proj": (32, 64)}
        if kind == "+":
            shapes |= {f"{at}{i}.second_norm": (32,)}
            shapes |= {f"{at}{i}.mlp.up_proj": (96, 32), f"{at}{i}.mlp.down_proj": (32, 96)}
    weights = {f"{name}.weight": rng.normal(len(shape) == 1, 0.2, shape) for name, shape in shapes.items()}
    folder = tmp_path / "mixing"
    folder.mkdir()
    save_file({name: weight.astype(np.float32) for name, weight in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    return folder


def test_a_family_says_in_data_which_kinds_it_mixes(mixing: Path) -> None:
    plan = make_plan(open_checkpoint(mixing), Types("f32"))
    blocks = plan.structure.blocks
    assert [b.mixer for b in blocks] == [
        None, Attention(4, 2, 8, rope=8), Attention(4, 2, 8, rope=8), Attention(4, 2, 8, window=4), None
    ]  # fmt: skip
    assert [b.ffn.n_ff if b.ffn else None for b in blocks] == [64, None, 96, None, 64]
    sources = {t.name: t.source.name for t in plan.tensors if isinstance(t.source, Source)}
    assert sources["blk.0.ffn_norm.weight"] == "backbone.layers.0.norm.weight"
    assert sources["blk.1.attn_norm.weight"] == "backbone.layers.1.norm.weight"
    assert sources["blk.2.ffn_norm.weight"] == "backbone.layers.2.second_norm.weight"
    assert sources["blk.2.ffn_up.weight"] == "backbone.layers.2.mlp.up_proj.weight"
    assert sources["blk.4.ffn_up.weight"] == "backbone.layers.4.mixer.up_proj.weight"


@pytest.mark.numeric
@pytest.mark.parametrize("ffn", ["dense", "exact"])
def test_its_file_computes_what_the_checkpoint_does(mixing: Path, tmp_path: Path, ffn: str) -> None:
    """Against the oracle of --verify, which reads the checkpoint; calibrated, so that neurons move."""
    convert(mixing, tmp_path / "m.gguf", type="f32", calibration_tokens=1024)
    ids = random_ids(24, 4000)
    checkpoint = open_checkpoint(mixing)
    expected = NumpyModel(checkpoint, make_plan(checkpoint, Types("f32"))).logits(ids)
    with runtime.load(tmp_path / "m.gguf", ffn=ffn, kv_type="f32", device="none") as model:
        assert relative(expected, model.logits(ids)) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "-*+n"}, "kinds of 4 blocks, expected 5"),
        ({"pattern": "-*+nM"}, 'block 4 is "M", expected one of *, n, -, +'),
        ({"pattern": None}, "no `pattern`"),
        ({"pattern": "-*+n*"}, "missing"),
        ({"wide": 0}, "unknown (backbone.layers.2.mlp.down_proj.weight"),
    ],
)
def test_kinds_that_do_not_fit_the_checkpoint_are_refused(mixing: Path, changes: dict[str, Any], message: str) -> None:
    (mixing / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(UserError) as caught:
        make_plan(open_checkpoint(mixing), Types("f32"))
    assert message in caught.value.message
