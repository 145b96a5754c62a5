"""A Hugging Face checkpoint in a local folder: config.json and weights, one file or several with an index.

Safetensors, or `pytorch_model.bin` where there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy, for safetensors
from safetensors import SafetensorError, safe_open

from convert import pytorch
from convert.config import Config, read_json
from convert.rewrites import Shape, Sliceable
from convert.unmapped import listed
from runtime.base.stand_ins import refuse_stand_in
from runtime.errors import UserError

_REFETCH = "fetch the file again from where the checkpoint came from"
_ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")
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
    present = [path.name for path in folder.iterdir()]
    weights, names = weight_files(f"`{folder}`", folder, present, lambda name: (folder / name).is_file())
    return Checkpoint(folder, config, weights, _inspect([folder / name for name in names], weights))


def refuse_adapter(where: str, present: Collection[str]) -> None:
    """Raise UserError where these are the files of an adapter, such as LoRA's, without the model that it changes."""
    whole = {name for weights in FORMATS for name in (weights.file_name, f"{weights.file_name}.index.json")}
    if "adapter_config.json" in present and not whole.intersection(present):
        raise UserError(
            f"{where}: an adapter (adapter_config.json), expected a whole model",
            "merge it into its base model first: load both with PEFT, then merge_and_unload() and "
            "save_pretrained(FOLDER)",
        )


def weight_files(
    where: str, folder: Path, present: Collection[str], has: Callable[[str], bool]
) -> tuple[Format, list[str]]:
    """Which files have the weights, and in which format: safetensors where there are any.

    An index tells the names of its shards.

    folder: where an index can be read; present: names of files there; has: whether a name, perhaps in a sub-folder, is
    there.
    Raises UserError where there are none, or an index names some that are not there.
    """
    for weights in FORMATS:
        index = f"{weights.file_name}.index.json"
        if weights.file_name in present:
            return weights, [weights.file_name]
        if index in present:
            return weights, _shards(where, read_json(folder / index), has)
    alike = sorted(name for name in present if name.endswith(_ENDINGS))
    expected = " or ".join(weights.file_name for weights in FORMATS)
    raise UserError(
        f"{where}: no weights in it" + (f", but {listed(alike)}" if alike else ""),
        f"expected {expected}, or one of their index files with its shards",
    )


def _shards(where: str, index: Config, has: Callable[[str], bool]) -> list[str]:
    weight_map = index.inside("weight_map")
    names = sorted({weight_map.get(name, str) for name in weight_map.values})
    if not names:
        raise UserError(f"{index.where}: no `weight_map` that names files", _REFETCH)
    outside = [name for name in names if not _inside(name)]
    if outside:
        raise UserError(f"{index.where}: names {listed(outside)}, expected files in the same folder", _REFETCH)
    missing = [name for name in names if not has(name)]
    if missing:
        raise UserError(
            f"{where}: {len(missing)} of {len(names)} shards missing: {listed(missing)}", "fetch the missing files"
        )
    return names


def _inside(name: str) -> bool:
    """Whether a name stays in its folder, or in one within, on every system."""
    parts = name.split("/")
    return not any(
        part in ("", ".", "..") or len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts
    ) and not set(name) & set("\\:\0")


def _inspect(files: list[Path], weights: Format) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"`{file}`: no file with weights, but a folder or a link to nothing", _REFETCH)
        refuse_stand_in(file)
        for name, (shape, dtype) in weights.inspect(file).items():
            if name in tensors:
                raise UserError(
                    f"`{file}`: tensor {name} is also in `{tensors[name].file.name}`",
                    "which of the two counts is not said: files of two checkpoints are mixed, so fetch all of "
                    "one again",
                )
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
