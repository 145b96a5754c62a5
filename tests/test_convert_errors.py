"""Bad input gets one `error:` line with a hint, exit status 1, no traceback, and nothing is written."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import copy_checkpoint, load_tensors, save_tensors
from in_process import command
from plain import PLAIN, convert

from runtime.errors import UserError

Folder = Callable[[str], Path]
ROOT = Path(__file__).parent.parent


def fails(source: object, out: Path, *options: str, env: dict[str, str] | None = None) -> list[str]:
    """Run the command line, expect it to fail as promised, and return the lines of its stderr."""
    before = sorted(out.parent.iterdir())
    words = ("convert", str(source), str(out), *options, *PLAIN)
    if env is None:
        done = command(*words)
    else:  # a new process: what it names is read when huggingface_hub is imported
        done = subprocess.run(
            [sys.executable, "-m", *words], capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | env
        )
    lines = done.stderr.splitlines()
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert lines[0].startswith("error: ")
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: "))
    assert sorted(out.parent.iterdir()) == before
    return lines


@pytest.fixture
def broken(checkpoint: Folder, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be broken."""
    return copy_checkpoint(checkpoint("llama-mha"), tmp_path / "checkpoint")


def test_silu_is_never_converted_silently(checkpoint: Folder, tmp_path: Path) -> None:
    folder = copy_checkpoint(checkpoint("llama-mha"), tmp_path / "silu", hidden_act="silu")
    error, hint = fails(folder, tmp_path / "x.gguf")
    assert "`hidden_act` is `silu`, expected `relu`" in error
    assert "python -m convert --list" in hint
    assert "--ffn-type" in hint


def test_an_existing_output_is_kept(broken: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    out.write_text("precious")
    error, hint = fails(broken, out)
    assert "exists already" in error
    assert "--force" in hint
    assert out.read_text() == "precious"
    convert(broken, out, force=True)
    assert out.read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("source", ["/no/such/folder", "not-a-repo", "user/repo/more"])
def test_a_source_that_does_not_exist(source: str, tmp_path: Path) -> None:
    assert "expected a checkpoint folder or a Hub id" in fails(source, tmp_path / "x.gguf")[0]


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_the_hub_out_of_reach(env: dict[str, str], tmp_path: Path) -> None:
    lines = fails("user/repo", tmp_path / "x.gguf", env={"HF_HOME": str(tmp_path / "hub"), **env})
    why = "HF_HUB_OFFLINE is set" if "HF_HUB_OFFLINE" in env else "the Hub cannot be reached"
    assert lines[0] == f"error: `user/repo`: no such file or folder here, nothing of it in the cache, and {why}"


def refused(source: Path, complaint: str, **options: Any) -> None:
    """What `fails` checks, without the price of a process: convert raises UserError and writes nothing."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(UserError) as error:
        convert(source, source.parent / "x.gguf", **options)
    assert complaint in error.value.message
    assert "\n" not in error.value.message
    assert sorted(source.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("missing", "complaint"),
    [
        ("config.json", "no config.json in it"),
        ("model.safetensors", "no weights in it"),
        ("tokenizer.model", "no tokenizer in it"),
    ],
)
def test_missing_files(missing: str, complaint: str, broken: Path) -> None:
    (broken / missing).unlink()
    refused(broken, complaint)


def test_missing_shards_are_listed(broken: Path) -> None:
    save_tensors(broken, load_tensors(broken), shards=3)
    for i in (1, 3):
        (broken / f"model-{i:05}-of-00003.safetensors").unlink()
    refused(broken, "2 of 3 shards missing: model-00001-of-00003.safetensors, model-00003-of-00003.safetensors")


def test_an_index_cannot_point_outside_the_folder(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken.parent / "elsewhere.safetensors")
    (broken / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../elsewhere.safetensors"}}')
    refused(broken, "names ../elsewhere.safetensors, expected files in the same folder")


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, 0.999])
def test_truncated_safetensors(keep: float, broken: Path) -> None:
    path = broken / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    refused(broken, "model.safetensors`: damaged or cut off")


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_truncated_pickles(keep: float, broken: Path) -> None:
    torch.save(load_tensors(broken), broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    data = (broken / "pytorch_model.bin").read_bytes()
    (broken / "pytorch_model.bin").write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    refused(broken, "pytorch_model.bin`: damaged, cut off or not just weights")


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_with_code_is_not_run(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    torch.save({"x": Malicious(broken / "was-here")}, broken / "pytorch_model.bin")
    refused(broken, "not just weights")
    assert not (broken / "was-here").exists()


def test_pickles_without_torch(broken: Path, tmp_path: Path) -> None:
    torch.save(load_tensors(broken), broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    (tmp_path / "no-torch").mkdir()
    (tmp_path / "no-torch" / "torch.py").write_text("raise ImportError")
    error, hint = fails(broken, tmp_path / "x.gguf", env={"PYTHONPATH": str(tmp_path / "no-torch")})
    assert "needs torch" in error
    assert "lazyneuron[torch]" in hint


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_config_that_is_not_json(text: str, broken: Path) -> None:
    (broken / "config.json").write_text(text, encoding="latin-1")
    refused(broken, "config.json`: ")


def test_integer_weights(broken: Path) -> None:
    tensors = load_tensors(broken)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_tensors(broken, tensors)
    refused(broken, "model.norm.weight is of type I8, expected F64, F32, F16, BF16")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, broken: Path) -> None:
    tensors = load_tensors(broken)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_tensors(broken, tensors)
    for kind in ("f32", "q4_k"):
        refused(broken, "model.layers.1.mlp.down_proj.weight: values that are not finite", type=kind)


def test_weights_beyond_f16(broken: Path) -> None:
    tensors = load_tensors(broken)
    tensors["lm_head.weight"][0, 0] = 1e5
    save_tensors(broken, tensors)
    refused(broken, "lm_head.weight: values beyond the range of f16")
    convert(broken, broken.parent / "x.gguf", type="bf16")


def test_unknown_types(broken: Path) -> None:
    refused(broken, "--type: `q3_k`, expected one of f32, f16", type="q3_k")
    refused(broken, "--output-type: `x`, expected one of f32, f16", output_type="x")


def test_targets_that_cannot_be_written(broken: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        convert(broken, tmp_path / "nowhere" / "x.gguf")
    with pytest.raises(UserError, match="a folder, expected a file name"):
        convert(broken, tmp_path, force=True)
    with pytest.raises(UserError, match="no output file given"):
        convert(broken)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SOURCE"], "OUT.gguf is missing"),
        (["--dry-run"], "SOURCE is missing"),
        (["SOURCE", "x.gguf", "--layout", "dense"], "--layout: invalid choice: 'dense'"),
        (["SOURCE", "x.gguf", "--threads", "0"], "--threads: 0, expected 1 or more"),
        (["SOURCE", "x.gguf", "--tipe", "f16"], "unrecognized arguments: --tipe f16"),
        (["push", "x.gguf"], "arguments are required: USER/REPO"),
        (["card"], "arguments are required: OUT.gguf"),
    ],
)
def test_wrong_options_are_one_line(broken: Path, arguments: list[str], message: str) -> None:
    done = command("convert", *(broken if a == "SOURCE" else a for a in arguments))
    error, hint = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: ")
    assert hint.endswith(" --help lists the options")


def test_a_target_larger_than_the_disk(tmp_path: Path, checkpoint: Folder) -> None:
    width = 1 << 16
    neurons = shutil.disk_usage(tmp_path).free // (4 * 4 * width) + 1000  # four matrices in F32
    grown = {"hidden_size": width, "intermediate_size": neurons, "num_hidden_layers": 1, "head_dim": 32}
    folder = copy_checkpoint(checkpoint("llama-mha"), tmp_path / "hollow", **grown)
    block = "model.layers.0."
    names = {
        "model.embed_tokens": (4096, width),
        "lm_head": (4096, width),
        "model.norm": (width,),
        **{f"{block}{name}": (width,) for name in ("input_layernorm", "post_attention_layernorm")},
        **{f"{block}self_attn.{name}_proj": (128, width) for name in "qkv"},
        f"{block}self_attn.o_proj": (width, 128),
        **{f"{block}mlp.{name}_proj": (neurons, width) for name in ("gate", "up")},
        f"{block}mlp.down_proj": (width, neurons),
    }
    write_hollow(folder / "model.safetensors", {f"{name}.weight": shape for name, shape in names.items()})
    refused(folder, "GB free, expected at least", type="f32")


def write_hollow(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A valid safetensors file of zeros that takes no space on the disk."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    path.unlink()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
