"""Checkpoints by their name on the Hub: only the needed files are fetched, and what the card says goes into the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from checkpoints import copy_checkpoint, load_tensors
from hub_client import Client
from hub_server import Hub
from plain import PLAIN, convert
from powerinfer_files import predictor_arrays, save_predictors
from safetensors.torch import save

from runtime.model_file.reader import GgufFile


@pytest.fixture
def folder(hub: Hub, checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint with weights in two formats, which is on the Hub as user/model."""
    folder = copy_checkpoint(checkpoint("llama-mha"), tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\nA card.\n")
    torch.save(load_tensors(folder), folder / "pytorch_model.bin")
    (folder / "flax_model.msgpack").write_text("large and useless")
    upload(hub, folder)
    return folder


def upload(hub: Hub, folder: Path, repo: str = "user/model") -> None:
    hub.add(repo, {file.name: file.read_bytes() for file in folder.iterdir()})


def resolved(hub: Hub) -> set[str]:
    return {request.path.rsplit("/", 1)[-1] for request in hub.requests if "/resolve/" in request.path}


def test_only_the_needed_files_are_fetched(hub: Hub, run: Client, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    assert run("convert", "user/model", out, *PLAIN).out == ""
    assert resolved(hub) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
        "README.md",
    }
    data = out.read_bytes()
    for text in (b"https://huggingface.co/user/model", b"apache-2.0"):
        assert text in data
    convert(folder, tmp_path / "local.gguf")
    assert data.endswith((tmp_path / "local.gguf").read_bytes()[-400_000:])  # the same tensors

    hub.requests.clear()
    again = tmp_path / "again.gguf"
    assert run("convert", "hf://user/model@main", again, *PLAIN, HF_HUB_OFFLINE="1").out == ""
    assert again.read_bytes() == data
    assert not hub.requests


@pytest.mark.parametrize("pattern", ["model.safetensors-0000{}-of-00002.safetensors", "weights/part {}.st"])
def test_the_shards_that_the_index_names_are_fetched(
    pattern: str, hub: Hub, run: Client, folder: Path, tmp_path: Path
) -> None:
    tensors = load_tensors(folder)
    names = [pattern.format(i) for i in (1, 2)]
    place = {name: names[i % 2] for i, name in enumerate(tensors)}
    shards = {file: save({name: t for name, t in tensors.items() if place[name] == file}) for file in names}
    (folder / "model.safetensors").unlink()
    upload(hub, folder, "user/split")
    index = {"model.safetensors.index.json": json.dumps({"weight_map": place}).encode()}
    hub.add("user/split", {**shards, **index, "model-00001-of-00009.safetensors": b"no index names it"})
    assert run("convert", "user/split", tmp_path / "x.gguf", *PLAIN).out == ""
    fetched = {unquote(name) for name in resolved(hub)}
    assert {name.rpartition("/")[2] for name in names} <= fetched
    assert not fetched & {"model-00001-of-00009.safetensors", "pytorch_model.bin"}

    hub.add("user/split", {"model.safetensors.index.json": json.dumps({"weight_map": {"x": "gone.st"}}).encode()})
    found = run("convert", "https://huggingface.co/user/split/tree/main", tmp_path / "y.gguf", *PLAIN).complaint
    assert found.startswith("error: `user/split`: 1 of 1 shards missing: gone.st")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "the weights are quantised already (awq)"),
        ({"hidden_act": "silu"}, "`hidden_act` is `silu`"),
        ({"rope_scaling": {"type": "su"}}, "rope type `su`"),
    ],
)
def test_no_weights_are_fetched_of_what_cannot_be_converted(
    change: dict[str, object], complaint: str, hub: Hub, run: Client, folder: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text()) | change
    hub.add("user/model", {"config.json": json.dumps(config).encode()})
    assert complaint in run("convert", "user/model", tmp_path / "x.gguf", *PLAIN).complaint
    assert "model.safetensors" not in resolved(hub)


def test_an_adapter_is_refused_by_its_name(hub: Hub, run: Client, tmp_path: Path) -> None:
    hub.add("user/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"", "README.md": b""})
    found = run("convert", "user/lora", tmp_path / "x.gguf", *PLAIN).complaint
    assert found.startswith("error: `user/lora`: an adapter (adapter_config.json), expected a whole model")
    assert not resolved(hub)


def test_pickles_where_there_are_no_safetensors(hub: Hub, run: Client, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    upload(hub, folder, "user/pickles")
    assert run("convert", "user/pickles", tmp_path / "x.gguf", *PLAIN).out == ""
    assert "pytorch_model.bin" in resolved(hub)
    assert "flax_model.msgpack" not in resolved(hub)


def test_only_predictors_are_fetched_of_their_repository(
    hub: Hub, run: Client, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    save_predictors(tmp_path / "p", predictor_arrays(2, 32, 256, 32), 0.5)
    upload(hub, tmp_path / "p", "user/predictor")
    hub.add("user/predictor", {"README.md": b"A card."})
    command = ("convert", checkpoint("llama-mha"), tmp_path / "x.gguf", "--import-predictor", "user/predictor", *PLAIN)
    assert run(*command).out == ""
    assert resolved(hub) == {"config.json", "model_0.pt", "model_1.pt"}
    with GgufFile(tmp_path / "x.gguf") as file:
        assert file.metadata["lazyneuron.predictor.source"] == "user/predictor"
        assert file.metadata["lazyneuron.predictor.threshold"] == 0.5


def test_refusals(hub: Hub, run: Client, tmp_path: Path) -> None:
    hub.refused["user/gated"] = (403, "GatedRepo")
    hub.add("user/other", {"m.gguf": b"GGUF"})
    expected = {
        "user/gated": "access to it must be granted first",
        "user/missing": "no such file or folder here, and no such repository on the Hub",
        "user/other": "no config.json in it, expected a checkpoint",
        "user/model:q4_0": "no such folder, expected a checkpoint folder or a Hub id",
    }
    found = run.many(*(("convert", source, tmp_path / "x.gguf", *PLAIN) for source in expected))
    for done, (source, complaint) in zip(found, expected.items(), strict=True):
        assert done.complaint.startswith(f"error: `{source}`: {complaint}")
    assert not (tmp_path / "x.gguf").exists()
