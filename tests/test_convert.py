"""Converted files read back by an independent reader (gguf.GGUFReader): keys, tensors, bytes, alignment."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import copy_checkpoint, load_tensors, save_tensors
from in_process import command
from plain import PLAIN, convert

from convert.formats import TYPES

Folder = Callable[[str], Path]
Converted = Callable[..., Path]
Numbers = np.ndarray[Any, Any]

# Largest relative error (root mean square) of each format on Gaussian weights.
ERROR = {"f32": 0, "f16": 4e-4, "bf16": 4e-3, "q8_0": 8e-3, "q6_k": 0.025, "q5_k": 0.045, "q4_k": 0.085, "q4_0": 0.11}


def read(path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(path)


def value(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def tensor(reader: gguf.GGUFReader, name: str) -> gguf.ReaderTensor:
    return next(t for t in reader.tensors if t.name == name)


def numbers(reader: gguf.GGUFReader, name: str) -> Numbers:
    """A tensor dequantised by gguf's own code, rows first."""
    found = tensor(reader, name)
    return gguf.quants.dequantize(found.data, found.tensor_type).reshape(found.shape[::-1])


def bundled_weight(checkpoint: Folder, name: str) -> Numbers:
    return load_tensors(checkpoint("bundled"))[name].float().numpy()


def test_keys(converted: Converted) -> None:
    reader = read(converted("bundled", "f16"))
    expected = {
        "general.architecture": "lazyneuron",
        "general.name": "tiny-relu-llama",
        "general.license": "mit",
        "general.alignment": 64,
        "general.file_type": 1,
        "general.quantization_version": 2,
        "lazyneuron.schema_version": 1,
        "lazyneuron.source_architecture": "LlamaForCausalLM",
        "lazyneuron.block_count": 6,
        "lazyneuron.embedding_length": 256,
        "lazyneuron.feed_forward_length": 1024,
        "lazyneuron.attention.head_count_kv": 4,
        "lazyneuron.attention.key_length": 32,
        "lazyneuron.position": "rope_neox",
        "lazyneuron.ffn.activation": "relu",
        "lazyneuron.tied_output": True,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
    }
    assert {key: value(reader, key) for key in expected} == expected
    assert value(reader, "lazyneuron.norm_epsilon") == pytest.approx(1e-5)
    assert len(value(reader, "tokenizer.ggml.tokens")) == 4096


def test_tensors_start_at_multiples_of_64(converted: Converted) -> None:
    assert all(t.data_offset % 64 == 0 for t in read(converted("llama-odd-ff", "q4_0")).tensors)


def test_f32_holds_the_checkpoints_numbers(converted: Converted, checkpoint: Folder) -> None:
    reader, weights = read(converted("opt-post-norm")), load_tensors(checkpoint("opt-post-norm"))
    pairs = {
        "token_embd.weight": "embed_tokens.weight",
        "token_embd_proj.weight": "project_in.weight",
        "output_proj.weight": "project_out.weight",
        "blk.1.attn_q.bias": "layers.1.self_attn.q_proj.bias",
        "blk.1.ffn_norm.bias": "layers.1.final_layer_norm.bias",
        "blk.0.ffn_down.weight": "layers.0.fc2.weight",
    }
    for name, source in pairs.items():
        assert np.array_equal(numbers(reader, name), weights[f"model.decoder.{source}"].float().numpy()), name
    assert np.array_equal(
        numbers(reader, "position_embd.weight"), weights["model.decoder.embed_positions.weight"].float().numpy()[2:]
    )


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_against_an_independent_oracle(kind: str, converted: Converted, checkpoint: Folder) -> None:
    reader = read(converted("bundled", kind))
    down = bundled_weight(checkpoint, "model.layers.2.mlp.down_proj.weight")
    for name, expected in (("blk.2.ffn_down.weight", down), ("blk.2.ffn_down_t.weight", down.T)):
        found = tensor(reader, name)
        assert found.tensor_type.name.lower() == kind
        error = numbers(reader, name) - expected
        assert np.sqrt((error**2).mean() / (expected**2).mean()) <= ERROR[kind]
        if kind in ("f32", "f16", "bf16", "q8_0", "q4_0"):
            oracle = gguf.quants.quantize(np.ascontiguousarray(expected), found.tensor_type)
            assert np.array_equal(oracle.view(np.uint8).ravel(), found.data.view(np.uint8).ravel())


@pytest.mark.parametrize(("kind", "head"), [("q8_0", "q8_0"), ("q4_0", "q6_k"), ("q4_k", "q6_k"), ("f16", "f16")])
def test_head_and_norm_types(kind: str, head: str, converted: Converted) -> None:
    types = {t.name: t.tensor_type.name.lower() for t in read(converted("bundled", kind)).tensors}
    assert types["token_embd.weight"] == head  # tied: it is the head
    assert {types[name] for name in types if "norm" in name} == {"f32"}


def test_output_type_is_a_choice(checkpoint: Folder, tmp_path: Path) -> None:
    report = convert(checkpoint("llama-mha"), tmp_path / "x.gguf", type="q4_0", output_type="Q8_0")
    types = {t.name: t.tensor_type.name for t in read(tmp_path / "x.gguf").tensors}
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q8_0", "Q4_0")
    assert report.types == {"q4_0": 17, "q8_0": 1, "f32": 5}


@pytest.mark.parametrize(
    ("kind", "fallback", "last"), [("q4_k", "q5_0", "f16"), ("q5_k", "q5_1", "f16"), ("q6_k", "q8_0", "f16")]
)
def test_fallbacks(kind: str, fallback: str, last: str, tmp_path: Path, checkpoint: Folder) -> None:
    folder = copy_checkpoint(checkpoint("llama-mha"), tmp_path / "odd", intermediate_size=264)
    weights = load_tensors(folder)
    for name, weight in weights.items():
        grown = [264 if n == 256 else n for n in weight.shape]
        weights[name] = torch.full(grown, 0.5) if ".mlp." in name else weight
    save_tensors(folder, weights)
    report = convert(folder, tmp_path / "x.gguf", type=kind)
    types = {t.name: t.tensor_type.name.lower() for t in read(tmp_path / "x.gguf").tensors}
    assert types["blk.0.ffn_up.weight"] == types["blk.0.ffn_down_t.weight"] == fallback
    assert types["blk.0.ffn_down.weight"] == last
    assert report.fallbacks["blk.0.ffn_up.weight"] == fallback
    assert report.fallbacks["blk.0.ffn_down.weight"] == last
    assert np.all(numbers(read(tmp_path / "x.gguf"), "blk.0.ffn_up.weight") == pytest.approx(0.5, rel=0.05))


def test_sparse_layout_leaves_out_the_second_copy(checkpoint: Folder, tmp_path: Path) -> None:
    convert(checkpoint("llama-mha"), tmp_path / "x.gguf", layout="sparse")
    reader = read(tmp_path / "x.gguf")
    assert not any(t.name.endswith("ffn_down.weight") for t in reader.tensors)
    assert value(reader, "lazyneuron.layout") == "sparse"


def test_threads_do_not_change_a_byte(checkpoint: Folder, tmp_path: Path) -> None:
    files = [tmp_path / f"{threads}.gguf" for threads in (1, 2, 5)]
    for threads, file in zip((1, 2, 5), files, strict=True):
        convert(checkpoint("bundled"), file, type="q4_k", threads=threads)
    assert len({file.read_bytes() for file in files}) == 1


def test_pieces_do_not_change_a_byte(checkpoint: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(checkpoint("bundled"), tmp_path / "whole.gguf", type="q8_0")
    monkeypatch.setattr("convert.encode.PIECE", 5000)
    convert(checkpoint("bundled"), tmp_path / "pieces.gguf", type="q8_0")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_ways_of_storing_a_checkpoint_give_the_same_file(
    dtype: torch.dtype, checkpoint: Folder, tmp_path: Path
) -> None:
    single = copy_checkpoint(checkpoint("llama-biases"), tmp_path / "same-name")
    weights = {name: weight.to(dtype) for name, weight in load_tensors(single).items()}
    save_tensors(single, weights)
    convert(single, tmp_path / "single.gguf", type="f32")
    expected = (tmp_path / "single.gguf").read_bytes()

    save_tensors(single, weights, shards=3)
    convert(single, tmp_path / "sharded.gguf", type="f32")
    assert (tmp_path / "sharded.gguf").read_bytes() == expected

    for file in single.glob("model*"):
        file.unlink()
    for zipped in (True, False):  # the other one is torch's format before 1.6
        torch.save(weights, single / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        convert(single, tmp_path / "pickled.gguf", type="f32", force=True)
        assert (tmp_path / "pickled.gguf").read_bytes() == expected


def test_sharded_pickles(checkpoint: Folder, tmp_path: Path) -> None:
    folder = copy_checkpoint(checkpoint("opt-pre-norm"), tmp_path / "opt-pre-norm")
    weights = load_tensors(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"pytorch_model-{i % 2 + 1:05}-of-00002.bin" for i, name in enumerate(weights)}
    for file in set(weight_map.values()):
        torch.save({name: weights[name] for name in weights if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(folder, tmp_path / "pickled.gguf")
    convert(checkpoint("opt-pre-norm"), tmp_path / "safe.gguf")
    assert (tmp_path / "pickled.gguf").read_bytes() == (tmp_path / "safe.gguf").read_bytes()


def test_command_line_json(checkpoint: Folder, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    done = command("convert", checkpoint("llama-mha"), out, "--type", "Q4_K", "--json", *PLAIN)
    result = json.loads(done.stdout)  # nothing else is on stdout
    assert done.returncode == 0
    assert result["path"] == str(out)
    assert result["bytes"] == out.stat().st_size
    assert result["types"] == {"q5_0": 15, "q4_k": 2, "f32": 5, "q8_0": 1}  # only ffn_down has rows of 256
    assert result["structure"]["ffn_gate"] == "gated"
    assert "are q5_0 because" in done.stderr
    assert sorted(tmp_path.iterdir()) == [out]
    assert out.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    code = "import os; print(os.umask(0))"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


def test_dry_run_prints_the_plan_and_writes_nothing(checkpoint: Folder, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    done = command("convert", checkpoint("llama-mha"), out, "--dry-run", "--json", *PLAIN)
    *table, last = done.stdout.splitlines()
    assert done.returncode == 0
    assert json.loads(last)["dry_run"] is True
    assert any("model.layers.1.mlp.down_proj.weight" in line and "transpose" in line for line in table)
    assert len(table) == 1 + json.loads(last)["tensors"]
    assert not any(tmp_path.iterdir())


def test_the_bare_command_says_what_to_type() -> None:
    done = command("convert")
    assert (done.returncode, done.stderr) == (0, "")
    assert "python -m convert SparseLLM/ReluLLaMA-7B relullama-7b.gguf" in done.stdout


def test_progress_adds_up(checkpoint: Folder, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = convert(checkpoint("llama-mha"), tmp_path / "x.gguf", progress=lambda *args: seen.append(args))
    assert seen[-1][1] == seen[-1][2] == report.plan.nbytes
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert {name for name, _, _ in seen} == {t.name for t in report.plan.tensors}
