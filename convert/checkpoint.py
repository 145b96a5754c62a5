"""A Hugging Face checkpoint in a local folder: config.json and weights, one file or several with an index.

Safetensors, or `pytorch_model.bin` where there are none. Knows what a file holds, not what it means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy, for safetensors
from safetensors import SafetensorError, safe_open

from convert import pytorch
from convert.config import Config, read_json
from convert.rewrites import Shape, Sliceable
from runtime.errors import UserError

_REFETCH = "fetch the file again from where the checkpoint came from"
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the types that can be converted


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape, row-major, and safetensors' name of its type."""

    file: Path
    shape: Shape
    dtype: str


@dataclass(frozen=True)
class Format:
    """A kind of weights file: what it is called, what is in one, and how to open one tensor of it."""

    file_name: str
    inspect: Callable[[Path], dict[str, tuple[Shape, str]]]
    open: Callable[[Path, str], AbstractContextManager[Sliceable]]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder. Nothing of the weights is read, or kept mapped, before a tensor is opened."""

    folder: Path
    config: Config
    format: Format
    tensors: dict[str, Stored]

    def open(self, name: str) -> AbstractContextManager[Sliceable]:
        """The tensor `name` for slicing. Its file is opened anew: pages read for one tensor are given back after it."""
        return self.format.open(self.tensors[name].file, name)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find out what the checkpoint in `folder` holds.

    Raises UserError when it is incomplete, damaged, or holds tensors of an unsupported type.
    """
    config = read_json(folder / "config.json")
    for weights in FORMATS:
        files = _files(folder, weights.file_name)
        if files:
            tensors = _inspect(files, weights)
            return Checkpoint(folder, config, weights, tensors)
    expected = " or ".join(weights.file_name for weights in FORMATS)
    raise UserError(
        f"`{folder}`: no weights in it", f"expected {expected}, or one of their index files with its shards"
    )


def _files(folder: Path, file_name: str) -> list[Path]:
    index = folder / f"{file_name}.index.json"
    if (folder / file_name).exists() or not index.exists():
        return [folder / file_name] if (folder / file_name).exists() else []
    weight_map = read_json(index).get("weight_map", dict)
    names = sorted({str(name) for name in weight_map.values()})
    missing = [name for name in names if not (folder / name).is_file() or Path(name).name != name]
    if missing:
        listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f"`{folder}`: {len(missing)} of {len(names)} shards missing: {listed}", "fetch the missing files"
        )
    return [folder / name for name in names]


def _inspect(files: list[Path], weights: Format) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, (shape, dtype) in weights.inspect(file).items():
            if name in tensors:
                raise UserError(f"`{file}`: tensor {name} is also in `{tensors[name].file.name}`", _REFETCH)
            tensors[name] = Stored(file, shape, dtype)
    return tensors


@contextmanager
def _safetensors(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="np") as opened:
            yield opened
    except SafetensorError as error:
        raise UserError(f"`{file}`: damaged or cut off ({error})", _REFETCH) from None


def _inspect_safetensors(file: Path) -> dict[str, tuple[Shape, str]]:
    with _safetensors(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


@contextmanager
def _open_safetensors(file: Path, name: str) -> Iterator[Sliceable]:
    with _safetensors(file) as opened:
        yield opened.get_slice(name)


FORMATS = (
    Format("model.safetensors", _inspect_safetensors, _open_safetensors),
    Format("pytorch_model.bin", pytorch.inspect, pytorch.open_tensor),
)
