"""A file that was converted already as the plan of another conversion: everything stays as it is, but for its
predictors or its layout.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.file_tensors import KeptRows
from convert.plan import Plan, PlannedTensor, Types
from predictors.replace_predictors import REPLACED
from runtime.model_file.bundle_writer import LAYOUT_KEYS, laid_out
from runtime.model_file.reader import GgufFile
from runtime.model_file.tensor_shapes import required_tensors
from runtime.model_file.writer import copied_keys


def plan_again(file: GgufFile, layout: str | None = None, predictors: bool = False) -> Plan:
    """Plan the file's copy, with its predictors or without. layout: None: as it is. Raises UserError when it is
    damaged, none of ours, or cannot have the layout.
    """
    s = laid_out(file.structure, layout, f"`{file.path}`")
    if not predictors:
        s = replace(s, predictor="none", predictor_rank=(), predictor_error=())
    tensors = []
    for name, shape in required_tensors(s).items():
        info = file.tensors[name]
        kind = info.type.lower()
        tensors.append(PlannedTensor(name, KeptRows(file.path_of(info.name), info), shape, kind, kind))
    return Plan(None, s, Types("", ""), tuple(tensors))


def kept_keys(path: Path, plan: Plan, predictors: bool = False) -> dict[str, Any]:
    """The keys of the file's copy: all, but those of its predictors where it has none."""
    left, described = () if predictors else REPLACED, plan.structure.to_metadata()
    found = {key: value for key, value in copied_keys(path).items() if not key.startswith(left)}
    return found | {key: described[key] for key in LAYOUT_KEYS}


def in_stored_order(plan: Plan, file: GgufFile) -> Plan:
    """The plan with predictors' rows, made for the checkpoint's order of neurons, in the file's."""
    if plan.structure.neuron_order == "original":
        return plan
    return replace(plan, tensors=tuple(_ordered(t, file) for t in plan.tensors))


def _ordered(tensor: PlannedTensor, file: GgufFile) -> PlannedTensor:
    block, _, part = tensor.name.rpartition(".predictor_")
    if part != "out.weight":
        return tensor
    return replace(tensor, order=file.read(f"{block}.ffn_neuron_index").view(np.int32))
