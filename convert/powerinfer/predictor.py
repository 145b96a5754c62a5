"""PowerInfer's predictors and activation counts as published beside its models: `model_N.pt` and
`activation/activation_N.pt`, N the layer.

A repository on the Hub or a folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from convert import pytorch
from convert.checkpoint import FLOATS
from convert.config import read_json_if_any
from convert.fetch_checkpoint import fetch_files
from convert.file_tensors import PickledTensor
from convert.formats import fitting
from convert.plan import Plan, PlannedTensor
from convert.powerinfer.model_file import threshold_bias, with_mlp
from convert.rewrites import Shape
from predictors.matrices import Floats
from runtime.errors import UserError
from runtime.model_file.structure import Structure
from runtime.model_file.tensor_shapes import required_tensors

DEFAULT_TYPE = "q8_0"  # of the matrices, where `auto` is asked for
_KEYS = ("fc1.weight", "fc2.weight")
_PARTS = {"predictor_in.weight": "fc1.weight", "predictor_out.weight": "fc2.weight"}


@dataclass(frozen=True)
class Predictors:
    """What a folder holds. source: its Hub id or name; files, ranks: by layer."""

    source: str
    threshold: float
    files: tuple[Path, ...]
    ranks: tuple[int, ...]


def open_predictors(source: str, s: Structure) -> Predictors:
    """The predictors in `source` (a folder or a Hub id) for a model of structure `s`; reads shapes only.

    Raises UserError when one is missing, has other tensors or other shapes than the model's layers, or cannot be read.
    """
    _refuse_experts(source, s)
    folder, repo = fetch_files(source, ["config.json", "model_*.pt"], "a folder with model_0.pt, model_1.pt, ...")
    files = _by_layer(folder, "model", s.block_count)
    ranks = tuple(_rank(file, s) for file in files)
    threshold = read_json_if_any(folder / "config.json").get("sparse_threshold", float, 0.0)
    return Predictors(repo or folder.resolve().name, threshold, files, ranks)


def read_counts(source: str, s: Structure) -> tuple[list[Floats], str]:
    """Each layer's activation counts in `source` (a folder or a Hub id), float32 [n_ff], and the source's name.

    Raises UserError when one is missing or cannot be read, or has negative counts or another number of them.
    """
    _refuse_experts(source, s)
    patterns = ["activation/activation_*.pt", "activation_*.pt"]
    folder, repo = fetch_files(source, patterns, "a folder with activation_0.pt, activation_1.pt, ...")
    inner = folder / "activation" if (folder / "activation").is_dir() else folder
    files = _by_layer(inner, "activation", s.block_count)
    counts = [_counts(files[i], ffn.n_ff) for i, ffn in s.ffns.items()]
    return counts, repo or folder.resolve().name


def with_predictors(plan: Plan, found: Predictors, matrix_type: str = "auto") -> Plan:
    """The same conversion with predictors from elsewhere, their matrices in `matrix_type` where the rows allow."""
    wanted = DEFAULT_TYPE if matrix_type == "auto" else matrix_type
    structure = with_mlp(plan.structure, found.ranks)
    planned = {t.name: t for t in plan.tensors}
    for name, shape in required_tensors(structure).items():
        _, _, part = name.partition(".predictor_")
        if name not in planned and part:
            planned[name] = _planned(name, shape, found, wanted)
    tensors = tuple(planned[name] for name in required_tensors(structure))
    return replace(plan, structure=structure, tensors=tensors)


def _planned(name: str, shape: Shape, found: Predictors, wanted: str) -> PlannedTensor:
    _, block, part = name.split(".", 2)
    if part not in _PARTS:
        return PlannedTensor(name, threshold_bias(found.threshold, shape[0]), shape, "f32", "f32")
    source = PickledTensor(found.files[int(block)], _PARTS[part])
    return PlannedTensor(name, source, shape, fitting(wanted, shape[0]), wanted)


def _refuse_experts(source: str, s: Structure) -> None:
    if any(ffn.experts for ffn in s.ffns.values()):
        raise UserError(
            f"`{source}`: PowerInfer's predictors or counts for a mixture of experts, whose form is not known",
            "leave the option out: calibration orders neurons and fits predictors",
        )


def _by_layer(folder: Path, stem: str, n: int) -> tuple[Path, ...]:
    """`<stem>_0.pt` to `<stem>_<n - 1>.pt`, by number: as texts, 10 would come before 2."""
    found = {int(m[1]): path for path in folder.glob("*.pt") if (m := re.fullmatch(rf"{stem}_(\d+)\.pt", path.name))}
    missing, beyond = sorted(set(range(n)) - set(found)), sorted(set(found) - set(range(n)))
    if missing or beyond:
        what = f"no {stem}_{missing[0]}.pt" if missing else f"a {stem}_{beyond[0]}.pt"
        raise UserError(
            f"`{folder}`: {what}, expected {stem}_0.pt to {stem}_{n - 1}.pt for the model's {n} layers",
            "the files belong to another model" if found else "give the folder or repository that holds them",
        )
    return tuple(found[i] for i in range(n))


def _rank(file: Path, s: Structure) -> int:
    tensors = pytorch.inspect(file)
    if sorted(tensors) != list(_KEYS):
        raise UserError(
            f"`{file}`: holds {', '.join(sorted(tensors)) or 'no tensors'}, expected {' and '.join(_KEYS)}",
            "PowerInfer's predictors are two matrices without biases",
        )
    (inner, kind), (outer, other) = (tensors[key] for key in _KEYS)
    if not {kind, other} <= set(FLOATS):
        raise UserError(f"`{file}`: tensors of type {kind} and {other}, expected {', '.join(FLOATS)}")
    d, n_ff = s.embedding_length, s.feed_forward_length
    if len(inner) != 2 or not inner[0] or inner[1] != d or outer != (n_ff, inner[0]):
        raise UserError(
            f"`{file}`: {_KEYS[0]} is {list(inner)} and {_KEYS[1]} {list(outer)}, expected [rank, {d}] and "
            f"[{n_ff}, rank]",
            "the predictors belong to another model",
        )
    return inner[0]


def _counts(file: Path, n_ff: int) -> Floats:
    numbers = pytorch.read_bare(file)
    if numbers.shape != (n_ff,):
        raise UserError(f"`{file}`: shape {list(numbers.shape)}, expected [{n_ff}]", "the counts are of another model")
    counts: Floats = numbers.astype(np.float32)
    if not (np.isfinite(counts).all() and (counts >= 0).all()):
        raise UserError(f"`{file}`: counts below zero or not finite, expected how often each neuron fired")
    return counts
