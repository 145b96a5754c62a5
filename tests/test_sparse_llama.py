"""The forms in which SakanaAI's SparseLM is stored: each gives the same file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import save_tensors
from gguf import GGUFReader
from safetensors.torch import load_file

from convert import convert

Tensors = dict[str, torch.Tensor]
# Name and whether it is turned, for the gate, up and down projections.
FORMS = {
    "as training saves it": {"gate": ("gate_weight", True), "up": ("up_weight", False), "down": ("down_weight", True)},
    "as the kernels read it": {"gate": ("GATE", False), "up": ("UP", False), "down": ("DOWN", True)},
    "trained with the kernels": {"down": ("down_proj.weight", True)},
}


def read_tensors(path: Path) -> dict[str, Any]:
    return {t.name: np.array(t.data) for t in GGUFReader(path).tensors}


def stored(tensors: Tensors, form: dict[str, tuple[str, bool]]) -> Tensors:
    found = dict(tensors)
    for part, (name, turned) in form.items():
        for key in [key for key in tensors if key.endswith(f"mlp.{part}_proj.weight")]:
            matrix = found.pop(key)
            found[key.replace(f"{part}_proj.weight", name)] = matrix.T.contiguous() if turned else matrix
    return found


@pytest.mark.parametrize("form", FORMS)
def test_each_stored_form_gives_the_same_file(form: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    usual = checkpoint("sparse-llama-tied")
    copy = tmp_path / usual.name
    shutil.copytree(usual, copy)
    tensors = stored(load_file(usual / "model.safetensors"), FORMS[form])
    tensors["tracker.last_activated"] = torch.zeros(5)
    tensors["model.layers.1.mlp.tracker.l0"] = torch.zeros(2)
    tensors["metrics_accumulator.count"] = torch.zeros(1)
    save_tensors(copy, tensors)
    for folder in (usual, copy):
        convert(folder, tmp_path / f"{folder is copy}.gguf", type="f32")
    expected, found = (read_tensors(tmp_path / f"{is_copy}.gguf") for is_copy in (False, True))
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert np.array_equal(found[name], values), name


@pytest.mark.parametrize("turned", [False, True])
def test_without_a_gate_the_up_projection_is_turned(
    turned: bool, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    usual = checkpoint("sparse-llama-tied")
    copy = tmp_path / "ungated"
    shutil.copytree(usual, copy)
    values = json.loads((usual / "config.json").read_text()) | {"sparsity_gated_mlp": False}
    (copy / "config.json").write_text(json.dumps(values))
    tensors = {k: v for k, v in load_file(usual / "model.safetensors").items() if ".gate_proj." not in k}
    form = {"up": ("up_weight", True), "down": ("down_weight", True)} if turned else {}
    save_tensors(copy, stored(tensors, form))
    convert(copy, tmp_path / "x.gguf", type="f32", calibration="none")
    found = read_tensors(tmp_path / "x.gguf")
    assert "blk.0.ffn_gate.weight" not in found
    for i in range(2):
        up, down = (tensors[f"model.layers.{i}.mlp.{part}_proj.weight"].float().numpy() for part in ("up", "down"))
        assert np.array_equal(found[f"blk.{i}.ffn_up.weight"], up)
        assert np.array_equal(found[f"blk.{i}.ffn_down.weight"], down)
        assert np.array_equal(found[f"blk.{i}.ffn_down_t.weight"], down.T)
