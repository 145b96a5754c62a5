"""How the files of checkpoints are called, and what only looks like one: read, or refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed import copy_in_f32, plan_of, refusal, store, stored
from safetensors.numpy import load_file

from convert.checkpoint import open_checkpoint
from convert.config import read_json
from convert.planned_job import ConvertOptions, open_job
from runtime.model_file.reader import GgufFile

Folder = Callable[[str], Path]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n"


@pytest.fixture
def folder(checkpoint: Folder, tmp_path: Path) -> Path:
    """A copy of a small checkpoint, in F32."""
    return copy_in_f32(checkpoint("llama-mha"), tmp_path / "checkpoint")


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


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", ["folder", "link to nothing"])
def test_weights_that_are_no_file(kind: str, name: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).mkdir() if kind == "folder" else (folder / name).symlink_to("../blobs/gone")
    found = refusal(lambda: open_checkpoint(folder))
    assert f"{name}`: no file with weights, but a folder or a link to nothing | fetch the file again" in found


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
    found = refusal(lambda: open_job(str(folder / name), ConvertOptions()))
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


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.model"])
def test_web_pages_are_named(name: str, folder: Path) -> None:
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text("\n<!DOCTYPE html>\n<html><title>Log in</title></html>")
    assert f"{name}`: a web page, not the file itself" in refusal(lambda: open_job(str(folder), ConvertOptions()))


@pytest.mark.parametrize("within", ["checkpoint-500", "snapshots/0123"])
def test_a_checkpoint_within_the_folder_is_named(within: str, folder: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    (outer / within).parent.mkdir(parents=True)
    folder.rename(outer / within)
    found = refusal(lambda: open_job(str(outer), ConvertOptions()))
    assert f"outer`: no config.json in it | there is one in `{outer / within}`" in found


def test_a_tokenizer_that_is_a_pointer_is_named_and_a_card_is_no_obstacle(folder: Path) -> None:
    (folder / "README.md").write_text(POINTER)
    assert open_job(str(folder), ConvertOptions()).plan.tensors
    (folder / "tokenizer.model").write_text(POINTER)
    assert "tokenizer.model`: a pointer of git-lfs" in refusal(lambda: open_job(str(folder), ConvertOptions()))


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
