"""Splits a model into shards as llama.cpp does: which tensor goes into which file, and the keys that hold them
together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from gguf import GGUFValueType

from runtime.base.atomic import place_of
from runtime.base.sizes import parse_size
from runtime.errors import UserError
from runtime.model_file import shards
from runtime.model_file.writer import Key, NewFile, NewTensor


def shard_size(text: str | None) -> int:
    """Bytes of "45G" or "500M" (see runtime/base/sizes.py), 0 for None. Raises UserError for anything else."""
    size = 0 if text is None else parse_size(text, "--split-max-size")
    if text is not None and not size:
        raise UserError(f"--split-max-size `{text}`, expected at least a byte")
    return size


def split_model(out: Path, metadata: Mapping[str, Any], tensors: Sequence[NewTensor], max_bytes: int) -> list[NewFile]:
    """The files to write: `out` alone where all tensors fit into `max_bytes` (or that is 0), else its shards in order.

    As in llama.cpp `max_bytes` counts tensors only; the keys of the model are all in the first shard.
    Raises UserError when one tensor alone is larger.
    """
    check_sizes(tensors, max_bytes)
    groups = _groups(tensors, max_bytes) if max_bytes else [tensors]
    if len(groups) == 1:
        return [NewFile(out, metadata, tensors)]
    common = {
        shards.COUNT: Key(len(groups), GGUFValueType.UINT16),
        shards.TENSORS: Key(len(tensors), GGUFValueType.INT32),
        shards.MODEL: _digest(metadata, tensors),
    }
    files = []
    for i, group in enumerate(groups):
        keys = {**(metadata if i == 0 else {}), shards.NUMBER: Key(i, GGUFValueType.UINT16), **common}
        files.append(NewFile(out.with_name(shards.shard_name(out.stem, i, len(groups))), keys, group))
    return files


class Sized(Protocol):
    """A tensor as far as splitting is concerned."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def nbytes(self) -> int: ...  # noqa: D102


def check_sizes(tensors: Sequence[Sized], max_bytes: int) -> None:
    """Raise UserError where a tensor does not fit into a shard of `max_bytes` (0: of any size)."""
    largest = max(tensors, key=lambda tensor: tensor.nbytes, default=None)
    if largest and 0 < max_bytes < largest.nbytes:
        raise UserError(
            f"--split-max-size {max_bytes:,} bytes, expected at least the {largest.nbytes:,} of `{largest.name}`",
            "a tensor is never divided",
        )


def check_shards(out: Path, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Raise UserError where no shards named after `out` can be written: some exist already (and not `force`), are no
    regular files or among `inputs`, or names would be too long.
    """
    place = place_of(out)
    for old in old_shards(place):
        if not old.is_file() or old.is_symlink():
            raise UserError(f"`{old}`: no regular file, expected a shard or nothing", "choose another name")
        if any(path.exists() and old.samefile(path) for path in inputs):
            raise UserError(f"`{old}`: is the source itself, expected another file", "write to a new name")
        if not force:
            raise UserError(f"`{old}`: exists already", "add --force to replace shards, or choose another name")
    try:
        place.with_name(shards.shard_name(place.stem, 0, 1)).exists()
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} for shards", str(out)) from None


def old_shards(place: Path) -> list[Path]:
    """What is called as shards of `place` are, in order: new ones could not be told from them."""
    names = (path.name for path in place.parent.iterdir() if path.name.endswith(".gguf"))
    return [place.with_name(name) for name in sorted(names) if (shards.parse_name(name) or ("",))[0] == place.stem]


def _groups(tensors: Sequence[NewTensor], max_bytes: int) -> list[list[NewTensor]]:
    """Tensors in their order, each shard filled before the next is begun."""
    groups: list[list[NewTensor]] = [[]]
    used = 0
    for tensor in tensors:
        if used + tensor.nbytes > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += tensor.nbytes
    return groups


def _digest(metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> str:
    """Tells this model from others: a sha256 of its keys and of its tensors' names, types and shapes."""
    digest = hashlib.sha256()
    with np.printoptions(threshold=10**9):
        for key, value in sorted(metadata.items()):
            digest.update(f"{key}={value!r}\n".encode("utf-8", "backslashreplace"))
    for tensor in tensors:
        digest.update(f"{tensor.name} {tensor.type} {tensor.shape}\n".encode())
    return digest.hexdigest()
