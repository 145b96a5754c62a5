"""A file that was converted already as the plan of another conversion: everything stays as it is, but for its
predictors.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.file_tensors import KeptRows
from convert.plan import Plan, PlannedTensor, Types
from predictors.replace_predictors import REPLACED
from runtime.model_file.reader import GgufFile
from runtime.model_file.tensor_shapes import required_tensors
from runtime.model_file.writer import copied_keys


def plan_again(file: GgufFile) -> Plan:
    """Plan the file's copy without predictors. Raises UserError when it is damaged, or none of ours."""
    s = replace(file.structure, predictor="none", predictor_rank=(), predictor_error=())
    tensors = []
    for name, shape in required_tensors(s).items():
        info = file.tensors[name]
        kind = info.type.lower()
        tensors.append(PlannedTensor(name, KeptRows(file.path_of(info.name), info), shape, kind, kind))
    return Plan(None, s, Types("", ""), tuple(tensors))


def kept_keys(path: Path) -> dict[str, Any]:
    """All keys of the file but those of its predictors."""
    return {key: value for key, value in copied_keys(path).items() if not key.startswith(REPLACED)}


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
