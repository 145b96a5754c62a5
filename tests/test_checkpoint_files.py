"""What checkpoints hold besides their weights, how their files are called, and what only looks like one: read, or refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import copy_checkpoint
from families import CASES
from plain import convert
from safetensors.numpy import load_file, save_file

from convert.checkpoint import open_checkpoint
from convert.config import read_json
from convert.leftovers import is_buffer
from convert.plan import Plan, Types, make_plan
from convert.source import Given, open_job
from runtime.errors import UserError
from runtime.gguf_file import GgufFile

Folder = Callable[[str], Path]
Tensors = dict[str, np.ndarray[Any, Any]]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n"


@pytest.fixture
def folder(checkpoint: Folder, tmp_path: Path) -> Path:
    """A copy of a small checkpoint, in F32."""
    copy = copy_checkpoint(checkpoint("llama-mha"), tmp_path / "checkpoint")
    store(copy, stored(copy))
    return copy


def stored(folder: Path) -> Tensors:
    return {name: tensor.astype(np.float32) for name, tensor in load_file(folder / "model.safetensors").items()}


def store(folder: Path, tensors: Tensors, name: str = "model.safetensors") -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    save_file(tensors, folder / name)


def plan_of(folder: Path, ffn_type: str | None = None) -> Plan:
    return make_plan(open_checkpoint(folder), Types(), ffn_type=ffn_type)


def refusal(act: Callable[[], object]) -> str:
    """Error and hint."""
    with pytest.raises(UserError) as error:
        act()
    assert "\n" not in error.value.message + error.value.hint
    return f"{error.value.message} | {error.value.hint}"


# --- buffers ----------------------------------------------------------------------------------------------------------

BUFFERS: dict[str, tuple[int, ...]] = {
    "{layer}self_attn.rotary_emb.inv_freq": (8,),
    "{layer}self_attention.maskless_rotary.inv_freq": (8,),
    "{layer}self_attention.rotary.inv_freq": (8,),
    "model.rotary_emb.inv_freq": (8,),
    "rotary_emb.original_inv_freq": (8,),
    "{layer}self_attn.rotary_emb.cos_cached": (1, 1, 64, 16),
    "{layer}self_attn.masked_bias": (),
    "{layer}attn.bias": (1, 1, 64, 64),
    "{layer}self_attention.bias": (64, 64),
    "model.embeddings.position_ids": (1, 64),
    "position_ids": (1, 64),
    "{layer}self_attn.rope.inv_freq": (8,),
    "{layer}self_attn.rotary_emb._cos_cached": (64, 16),
    "model.freqs_cis": (64, 8),
    "rope.freqs": (8,),
    "model.decoder.version": (1,),
    "model.decoder.embed_positions._float_tensor": (1,),
    "{layer}norm.num_batches_tracked": (),
}


@pytest.mark.parametrize(
    "name", ["mistral-relu", "qwen2-relu-tied", "falcon-7b", "persimmon-plain-tied", "nemotron", "opt-tied"]
)
def test_buffers_are_no_weights_in_any_family(name: str, checkpoint: Folder, tmp_path: Path) -> None:
    usual = plan_of(checkpoint(name), CASES[name].ffn_type)
    copy = copy_checkpoint(checkpoint(name), tmp_path / "x")
    layers = [f"model.layers.{i}." for i in range(2)] + ["transformer.h.0."]
    kinds = {"position_ids": np.int64, "num_batches_tracked": np.int64, "bias": np.uint8}
    added = {
        pattern.format(layer=layer): np.ones(shape, kinds.get(pattern.rpartition(".")[2], np.float32))
        for pattern, shape in BUFFERS.items()
        for layer in layers
    }
    store(copy, {**load_file(copy / "model.safetensors"), **added})
    assert plan_of(copy, CASES[name].ffn_type).tensors == usual.tensors


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.attn.bias", (64,)),
        ("model.layers.0.attn.bias", (3, 64, 64)),
        ("model.layers.0.self_attn.masked_bias", (64,)),
        ("model.layers.0.self_attn.q_proj.bias", (64, 64)),
        ("model.layers.0.inv_freq.weight", (8,)),
        ("model.my_position_ids", (8,)),
        ("model.freqs", (8,)),
        ("model.version", (1,)),
    ],
)
def test_what_might_carry_weights_is_no_buffer(name: str, shape: tuple[int, ...]) -> None:
    assert not is_buffer(name, shape)


# --- quantised --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq, 4 bits"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}}, "awq, 4 bits"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes, 4 bits"),
        ({"quantization_config": {"load_in_4bit": False, "load_in_8bit": True}}, "bitsandbytes, 8 bits"),
        ({"quantization_config": {"_load_in_8bit": True}}, "bitsandbytes, 8 bits"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}, "compressed-tensors"),
        ({"compression_config": {"format": "int-quantized"}}, "compressed-tensors"),
        *(
            ({"quantization_config": {"quant_method": name}}, name)
            for name in ("fp8", "hqq", "eetq", "quanto", "torchao", "aqlm", "exl2", "mxfp4", "fbgemm_fp8", "bitnet", "of the future")
        ),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX, 4 bits"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "NVFP4"),
        ({"quantization_config": {"bits": 3}}, 'a method that is not named: {"bits": 3}'),
        ({"quantization_config": "int8"}, 'a method that is not named: {"": "int8"}'),
    ],
)  # fmt: skip
def test_a_config_names_the_method(said: dict[str, Any], method: str, folder: Path) -> None:
    """Before anything else: the activation is another, and there is not even a file with weights."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "silu"} | said))
    (folder / "model.safetensors").unlink()
    found = refusal(lambda: open_job(str(folder), Given()))
    assert f"the weights are quantised already ({method}" in found
    assert "convert the original checkpoint" in found


@pytest.mark.parametrize("empty", [None, {}])
def test_an_empty_quantisation_is_none(empty: Any, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": empty}))
    assert plan_of(folder).tensors


@pytest.mark.parametrize(
    ("parts", "method"),
    [
        (("qweight", "qzeros", "scales", "g_idx"), "GPTQ"),
        (("qweight", "qzeros", "scales"), "AWQ"),
        (("qweight", "scales"), "GPTQ or AWQ"),
        (("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"), "bitsandbytes, 4 bits"),
        (("weight", "SCB"), "bitsandbytes, 8 bits"),
        (("weight_packed", "weight_scale", "weight_shape"), "compressed-tensors"),
        (("weight", "weight_scale_inv"), "fp8"),
        (("weight", "weight_scale", "input_scale"), "fp8, int8 or packed"),
        (("weight", "weight_scales"), "fp8, int8 or packed"),
        (("q_weight", "q_scale", "q_invperm", "q_groups"), "EXL2"),
        (("trellis", "suh", "svh"), "EXL3"),
        (("codes", "codebooks", "scales"), "AQLM"),
        (("W_q", "meta"), "HQQ"),
        (("weight._data", "weight._scale"), "quanto"),
        (("weight_blocks", "weight_scales"), "MXFP4"),
        (("weight", "scales", "biases"), "MLX"),
    ],
)  # fmt: skip
def test_names_of_tensors_tell_the_method(parts: tuple[str, ...], method: str, folder: Path) -> None:
    tensors: Tensors = {}
    for name, tensor in stored(folder).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        for part in parts:
            tensors[name.removesuffix("weight") + part] = np.zeros((4, 4), np.int32)
    store(folder, tensors)
    assert f"the weights are quantised already ({method}" in refusal(lambda: plan_of(folder))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_types_of_tensors_tell(kind: torch.dtype, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(kind)}, folder / "model.safetensors")
    found = refusal(lambda: plan_of(folder))
    assert f"{name} is of type" in found
    assert "quantised already" in found


# --- wrappers, adapters, parts of other models ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("renamed", "said"),
    [
        (lambda name: f"_orig_mod.{name}", "`_orig_mod.` in them, which torch.compile puts there"),
        (lambda name: name.replace("layers.1.", "layers.1._orig_mod."), "`_orig_mod.` in them"),
        (lambda name: f"module.{name}", "`module.` in them"),
        (lambda name: f"base_model.model.{name}", "`base_model.model.` in them, which PEFT puts there"),
        (lambda name: name.replace("_proj.weight", "_proj.base_layer.weight"), "merge it first"),
        (lambda name: f"policy.{name}", "config.json and the weights belong to different models"),
    ],
)
def test_names_that_a_wrapper_has_changed(renamed: Callable[[str], str], said: str, folder: Path) -> None:
    store(folder, {renamed(name): tensor for name, tensor in stored(folder).items()})
    assert said in refusal(lambda: plan_of(folder))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "a LoRA adapter is among the weights: merge it first"),
        ("v_head.summary.weight", "the value head of a trainer"),
        ("step", "the state of a training run"),
        ("model.layers.0.mlp.experts.0.up_proj.weight", "mixtures of experts"),
        ("layers.0.attention.wq.weight", "weights as Meta or Mistral store them"),
        ("score.weight", "a classifier"),
        ("vision_tower.patch.weight", "a model that sees images"),
        ("something.else", "config.json and the weights belong to different models"),
    ],
)
def test_tensors_too_many_are_explained(name: str, said: str, folder: Path) -> None:
    store(folder, {**stored(folder), name: np.ones(4, np.float32)})
    found = refusal(lambda: plan_of(folder))
    assert f"1 tensors unknown ({name})" in found
    assert said in found


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_alone(with_config: bool, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "user/base"}')
    if not with_config:
        (folder / "config.json").unlink()
    found = refusal(lambda: open_job(str(folder), Given()))
    assert "an adapter (adapter_config.json), expected a whole model | merge it into its base model first" in found


@pytest.mark.parametrize("key", ["model", "state_dict", "module"])
def test_a_pickle_with_everything_inside_one_key(key: str, folder: Path) -> None:
    tensors = {name: torch.from_numpy(tensor) for name, tensor in stored(folder).items()}
    torch.save({key: tensors, "step": 3}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert f"the tensors are inside `{key}`, expected a dict of tensors alone" in refusal(lambda: plan_of(folder))


def test_a_pickle_of_parameters_and_other_values(folder: Path) -> None:
    tensors: dict[str, Any] = {name: torch.nn.Parameter(torch.from_numpy(t)) for name, t in stored(folder).items()}
    usual = folder.parent / "usual.gguf"
    convert(folder, usual, type="f32")
    torch.save(tensors | {"step": 3}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    convert(folder, folder.parent / "x.gguf", type="f32")
    assert (folder.parent / "x.gguf").read_bytes() == usual.read_bytes()


ODD: list[dict[Any, torch.Tensor]] = [
    {3: torch.ones(2)},
    {"x": torch.eye(3).to_sparse()},
    {"x": torch.empty(3, device="meta")},
    {"x": torch.ones(1).expand(1 << 20, 1 << 20)},
]


@pytest.mark.parametrize("odd", ODD, ids=["number", "sparse", "meta", "expanded"])
def test_pickles_with_odd_tensors(odd: dict[Any, torch.Tensor], folder: Path) -> None:
    torch.save(odd, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "is no name of a dense tensor" in refusal(lambda: plan_of(folder))


# --- names of files ---------------------------------------------------------------------------------------------------


def split(folder: Path, *names: str, index: str = "model.safetensors") -> None:
    tensors = stored(folder)
    (folder / "model.safetensors").unlink()
    place = {name: names[i % len(names)] for i, name in enumerate(tensors)}
    for file in names:
        store(folder, {name: tensor for name, tensor in tensors.items() if place[name] == file}, file)
    (folder / f"{index}.index.json").write_text(json.dumps({"weight_map": place}))


@pytest.mark.parametrize(
    "names",
    [
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ("model.safetensors-00001-of-00002.safetensors", "model.safetensors-00002-of-00002.safetensors"),
        ("weights/a.safetensors", "weights/b.safetensors"),
        ("a b.sf", "\u00e9.bin", "c"),
    ],
)
def test_shards_have_the_names_that_the_index_says(names: tuple[str, ...], folder: Path) -> None:
    usual = plan_of(folder)
    split(folder, *names)
    (folder / "model-00009-of-00009.safetensors").write_text("no index names it")
    assert plan_of(folder).tensors == usual.tensors


def test_one_file_counts_before_an_index(folder: Path) -> None:
    usual = plan_of(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "nowhere.safetensors"}}')
    (folder / "pytorch_model.bin").write_text("never looked at")
    assert plan_of(folder).tensors == usual.tensors


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({}, "no `weight_map` that names files"),
        ({"weight_map": {}}, "no `weight_map` that names files"),
        ({"weight_map": ["a"]}, '`weight_map` is ["a"], expected an object'),
        ({"weight_map": {"x": 3}}, "`x` is 3, expected a string"),
        ({"weight_map": {"x": "../a.safetensors"}}, "names ../a.safetensors, expected files in the same folder"),
        ({"weight_map": {"x": "sub/../../a"}}, "names sub/../../a, expected files in the same folder"),
        ({"weight_map": {"x": "/etc/passwd"}}, "names /etc/passwd, expected"),
        ({"weight_map": {"x": "..\\a"}}, "names ..\\a, expected"),
        ({"weight_map": {"x": ""}}, "expected files in the same folder"),
        ({"weight_map": {"x": "a\0b"}}, "expected files in the same folder"),
        ({"weight_map": {"x": "n" * 300}}, "expected files in the same folder"),
        ({"weight_map": {"x": "\ud800"}}, "1 of 1 shards missing"),
        ({"weight_map": {"x": "nowhere"}}, "1 of 1 shards missing: nowhere"),
    ],
)
def test_indexes_that_are_refused(index: Any, said: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert said in refusal(lambda: open_checkpoint(folder))


def test_a_tensor_in_two_shards(folder: Path) -> None:
    split(folder, "a.safetensors", "b.safetensors")
    for file in ("a.safetensors", "b.safetensors"):
        store(folder, load_file(folder / file) | {"model.norm.weight": np.ones(32, np.float32)}, file)
    found = refusal(lambda: open_checkpoint(folder))
    assert "tensor model.norm.weight is also in `a.safetensors` | which of the two counts is not said" in found


@pytest.mark.parametrize("name", ["other.safetensors", "model-00001-of-00002.safetensors", "model.gguf"])
def test_weights_under_another_name_are_named(name: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / name)
    assert f"no weights in it, but {name} | expected model.safetensors or" in refusal(lambda: open_checkpoint(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_checkpoint_as_source(name: str, folder: Path) -> None:
    found = refusal(lambda: open_job(str(folder / name), Given()))
    assert f"{name}`: a file of a checkpoint, expected its folder | python -m convert {folder} OUT.gguf" in found


# --- files that are something else ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"]
)
def test_pointers_of_git_lfs_are_named(name: str, folder: Path) -> None:
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    assert f"{name}`: a pointer of git-lfs, not the file itself | run `git lfs pull`" in refusal(
        lambda: open_checkpoint(folder)
    )


def test_a_tokenizer_that_is_a_pointer_is_named_and_a_card_is_no_obstacle(folder: Path) -> None:
    (folder / "README.md").write_text(POINTER)
    assert open_job(str(folder), Given()).plan.tensors
    (folder / "tokenizer.model").write_text(POINTER)
    assert "tokenizer.model`: a pointer of git-lfs" in refusal(lambda: open_job(str(folder), Given()))


def test_a_gguf_file_that_is_a_pointer_or_of_the_other_byte_order(tmp_path: Path) -> None:
    (tmp_path / "pointer.gguf").write_text(POINTER)
    (tmp_path / "big.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "big") + bytes(16))
    assert "a pointer of git-lfs, not the file itself" in refusal(lambda: GgufFile(tmp_path / "pointer.gguf"))
    assert "a big-endian GGUF file, expected little-endian" in refusal(lambda: GgufFile(tmp_path / "big.gguf"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_config_in_any_encoding_of_unicode(encoding: str, folder: Path) -> None:
    usual = plan_of(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_bytes(text.encode(encoding))
    assert plan_of(folder) == usual


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', 'the key "a" is there twice in one object'),
        ('{"a": {"b": 1, "c": 2, "b": 1}}', 'the key "b" is there twice'),
        ('{"a": ' + "1" * 5000 + "}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("", "not valid JSON"),
        ("\x00", "not valid JSON"),
        ("[1]", "list, expected a JSON object"),
        ("null", "NoneType, expected a JSON object"),
    ],
)
def test_json_that_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert said in refusal(lambda: read_json(tmp_path / "config.json"))
