"""Model files of true size for the report's tests: real neuron frequencies, and holes in the place of all weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import gguf
import numpy as np

from bench.make_model import tokenizer
from bench.shapes import shape
from runtime.model_file.structure import Structure
from runtime.model_file.tensor_shapes import required_tensors
from runtime.model_file.writer import NewTensor, write_gguf


class Hole(NewTensor):
    """A tensor of zeros that takes no room on a disk."""

    def tofile(self, file: IO[bytes]) -> None:
        file.seek(self.nbytes - 1, 1)
        file.write(b"\0")


def seven_billion() -> Structure:
    """32 layers of 14,336 neurons; two of them have no predictor."""
    return _fitted(shape("mistral-7b"), without=(0, 31))


def seventy_billion() -> Structure:
    """80 layers of 28,672 neurons, all with predictors."""
    s = replace(
        shape("mistral-7b", 80), embedding_length=8192, feed_forward_length=28672, head_count=64, head_count_kv=8
    )
    return _fitted(s, without=())


def _fitted(s: Structure, without: tuple[int, ...]) -> Structure:
    ranks = tuple(0 if i in without else 256 for i in range(s.block_count))
    return replace(
        s, neuron_order="hot", predictor="lowrank", predictor_rank=ranks, predictor_error=(0.2,) * s.block_count
    )


def write_hollow(
    path: Path,
    s: Structure,
    general: dict[str, Any] | None = None,
    type: str = "Q4_0",  # noqa: A002
    measured: dict[str, Any] | None = None,
) -> None:
    """Write the file: matrices of `type`, everything else F32, firing that differs from layer to layer.

    general: more keys. measured: figures of the predictors in the place of good ones; None leaves one out.
    """
    share = np.linspace(0.06, 0.18, s.block_count)
    tensors = [_tensor(name, ne, type, share) for name, ne in required_tensors(s).items()]
    figures = {
        "active_share": share,
        "predicted_share": np.minimum(1, 1.4 * share),
        "recall": np.linspace(0.97, 0.9, s.block_count),
        "precision": np.linspace(0.7, 0.6, s.block_count),
        "energy_kept": np.full(s.block_count, 0.996),
    }
    metadata = {
        "general.name": "hollow",
        **(general or {}),
        **s.to_metadata(),
        **(_predictor_keys(s, figures | (measured or {})) if s.predictor != "none" else {}),
        **tokenizer(s.vocab_size),
    }
    write_gguf(path, metadata, tensors)


def _predictor_keys(s: Structure, figures: dict[str, Any]) -> dict[str, Any]:
    keys = {
        f"lazyneuron.predictor.{name}": [float(value) for value in values]
        for name, values in figures.items()
        if values is not None
    }
    return keys | {"lazyneuron.predictor.type": ["q4_0"] * s.block_count}


def _tensor(name: str, ne: tuple[int, ...], type_name: str, share: np.ndarray[Any, np.dtype[np.float64]]) -> NewTensor:
    kind = gguf.GGMLQuantizationType.F32 if len(ne) == 1 else gguf.GGMLQuantizationType[type_name]
    if name.endswith("ffn_neuron_index"):
        kind, values = gguf.GGMLQuantizationType.I32, np.arange(ne[0], dtype=np.int32)
    elif name.endswith("ffn_neuron_freq"):
        left = 1 - np.arange(ne[0]) / ne[0]
        values = np.clip(3 * share[int(name.split(".")[1])] * left**2, 0, 1).astype(np.float32)
    else:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        return Hole(name, ne, int(kind), int(np.prod(ne)) // block * size, ())
    return NewTensor(name, ne, int(kind), values.nbytes, [values.view(np.uint8)])
