"""Copies of a small checkpoint to be changed, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import copy_checkpoint
from safetensors.numpy import load_file, save_file

from convert.checkpoint import open_checkpoint
from convert.plan import Plan, Types, make_plan
from runtime.errors import UserError

Tensors = dict[str, np.ndarray[Any, Any]]


def copy_in_f32(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint with its weights in F32, to be changed."""
    copy = copy_checkpoint(source, folder)
    store(copy, stored(copy))
    return copy


def stored(folder: Path) -> Tensors:
    """All tensors by name, in F32."""
    return {name: tensor.astype(np.float32) for name, tensor in load_file(folder / "model.safetensors").items()}


def store(folder: Path, tensors: Tensors, name: str = "model.safetensors") -> None:
    """Write tensors as a safetensors file."""
    (folder / name).parent.mkdir(exist_ok=True)
    save_file(tensors, folder / name)


def plan_of(folder: Path, ffn_type: str | None = None) -> Plan:
    """The plan of a conversion to F16."""
    return make_plan(open_checkpoint(folder), Types(), ffn_type=ffn_type)


def refusal(act: Callable[[], object]) -> str:
    """Error and hint of what must be refused, in one line."""
    with pytest.raises(UserError) as error:
        act()
    assert "\n" not in error.value.message + error.value.hint
    return f"{error.value.message} | {error.value.hint}"
