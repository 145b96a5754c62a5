"""What checkpoints hold besides their weights, or in place of them: left out, or refused by its name."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from changed import Tensors, copy_in_f32, plan_of, refusal, store, stored
from checkpoints import copy_checkpoint
from families import CASES
from plain import convert
from safetensors.numpy import load_file

from convert.planned_job import ConvertOptions, open_job
from convert.unmapped import is_buffer

Folder = Callable[[str], Path]


@pytest.fixture
def folder(checkpoint: Folder, tmp_path: Path) -> Path:
    """A copy of a small checkpoint, in F32."""
    return copy_in_f32(checkpoint("llama-mha"), tmp_path / "checkpoint")


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
    found = refusal(lambda: open_job(str(folder), ConvertOptions()))
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


@pytest.mark.parametrize("end", ["", ":qdata", "_packed_by_nobody"])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_types_of_tensors_tell(kind: torch.dtype, end: str, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights = tensors.pop(name).to(kind)
    save_file(tensors | {name + end: weights, f"{name}_scales_of_nobody": torch.ones(3)}, folder / "model.safetensors")
    found = refusal(lambda: plan_of(folder))
    assert f"{name}{end} is of type" in found
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
        (lambda name: f"policy.{name}", "names begin with `policy.`: save the model itself"),
        (lambda name: f"a.b.{name}", "names begin with `a.b.`: save the model itself"),
        (lambda name: name.replace("model.", "model.model."), "names begin with `model.`: save the model itself"),
        (lambda name: name.replace("layers", "blocks"), "config.json and the weights belong to different models"),
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
        ("model.layers.0.mlp.experts.0.up_proj.weight", "experts, or parts of them, that the architecture"),
        ("model.layers.0.mlp.experts.gate_up_proj", "all experts are in one tensor"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "experts that every token uses are not supported"),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", "experts that every token uses are not supported"),
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
    found = refusal(lambda: open_job(str(folder), ConvertOptions()))
    assert "an adapter (adapter_config.json), expected a whole model | merge it into its base model first" in found


@pytest.mark.parametrize("keys", [("model",), ("module",), ("state", "ema"), (0, "net", "weights")])
def test_a_pickle_with_everything_inside_one_key(keys: tuple[Any, ...], folder: Path) -> None:
    value: dict[Any, Any] = {name: torch.from_numpy(tensor) for name, tensor in stored(folder).items()}
    optimizer = {"state": {i: {"exp_avg": torch.ones(2)} for i in range(99)}, "groups": [{"lr": torch.ones(1)}]}
    for key in keys[::-1]:
        value = {key: value, "optimizer": optimizer, "step": torch.tensor(3)}
    torch.save(value, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = refusal(lambda: plan_of(folder))
    assert f"the tensors are inside `{'.'.join(map(str, keys))}`, expected a dict of tensors alone" in found
    assert f"weights_only=True){''.join(f'[{key!r}]' for key in keys)}, FILE)" in found


@pytest.mark.parametrize(
    "content", [b"Entry not found", b'{"error": "Access is restricted"}', pickle.dumps({"x": set()})]
)
def test_what_torch_never_saved(content: bytes, folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(content)
    (folder / "model.safetensors").unlink()
    assert "other things than tensors are in it, or torch never saved it" in refusal(lambda: plan_of(folder))


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
