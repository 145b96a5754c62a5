"""`pytorch_model.bin` and other files that torch saved, read through torch (an optional dependency) without running
anything they contain.
"""

from __future__ import annotations

import functools
import importlib
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.rewrites import Array, Shape, Sliceable
from runtime.errors import UserError

_DTYPES = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
_NUMBERS = {*_DTYPES, *(f"torch.{name}" for name in ("int64", "int32", "int16", "int8", "uint8"))}  # counts are whole
_DEEPEST = 3  # of dicts in dicts in which trainers put tensors


class _SliceableTensor:
    """A torch tensor that gives numpy arrays when sliced."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __getitem__(self, key: Any) -> Array:
        part = self.tensor[key].detach().contiguous()
        if str(part.dtype) == "torch.bfloat16":  # numpy has none of its own
            return np.asarray(part.view(_torch().int16).numpy().view(ml_dtypes.bfloat16))
        return np.asarray(part.numpy())


def inspect(file: Path) -> dict[str, tuple[Shape, str]]:
    """Shape (row-major) and type of every tensor in `file`.

    Raises UserError when it cannot be read or torch is absent.
    """
    return {name: (tuple(t.shape), _DTYPES.get(str(t.dtype), str(t.dtype))) for name, t in _load(file).items()}


@contextmanager
def open_tensor(file: Path, name: str) -> Iterator[Sliceable]:
    """The tensor `name` of `file` for slicing."""
    yield _SliceableTensor(_load(file)[name])


def read_bare(file: Path) -> Array:
    """The numbers of a file that holds one tensor and nothing else.

    Raises UserError when it holds something else, cannot be read, or torch is absent.
    """
    value = _read(file)
    if not isinstance(value, _torch().Tensor) or str(value.dtype) not in _NUMBERS or not _is_plain(value):
        raise _unreadable(file, ValueError(f"a {type(value).__name__}, expected a dense tensor of numbers"))
    return _SliceableTensor(value)[:]


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor is dense and all there: one of strides 0 says more numbers than a file holds."""
    if tensor.layout != _torch().strided or tensor.is_nested or tensor.device.type != "cpu" or tensor.is_neg():
        return False
    return bool(tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes())


def _torch() -> Any:
    """The module torch. Raises UserError when it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise UserError(
            "reading files that torch saved (.bin, .pt) needs torch, which is not installed",
            "pip install 'lazyneuron[torch]', or fetch the checkpoint's safetensors if it has any",
        ) from None


def _load(file: Path) -> dict[str, Any]:
    values = _read(file)
    if not isinstance(values, dict):
        raise _unreadable(file, ValueError(f"a {type(values).__name__}, expected a dict of tensors"))
    tensors = {name: value for name, value in values.items() if isinstance(value, _torch().Tensor)}
    if inside := _fullest(values)[1]:
        keys = "".join(f"[{key!r}]" for key in inside)
        raise UserError(
            f"`{file}`: the tensors are inside `{'.'.join(map(str, inside))}`, expected a dict of tensors alone",
            f"save that part alone: torch.save(torch.load(FILE, weights_only=True){keys}, FILE)",
        )
    odd = [name for name, value in tensors.items() if not isinstance(name, str) or not _is_plain(value)]
    if odd:
        raise _unreadable(file, ValueError(f"{odd[0]!r} is no name of a dense tensor that is stored whole"))
    return tensors


def _fullest(values: dict[Any, Any], path: tuple[Any, ...] = ()) -> tuple[int, tuple[Any, ...]]:
    """Of a dict and those in it the one with the most tensors: how many it has, and the keys that lead to it."""
    own = sum(isinstance(value, _torch().Tensor) for value in values.values())
    inner = [
        _fullest(value, (*path, key))
        for key, value in values.items()
        if isinstance(value, dict) and len(path) < _DEEPEST
    ]
    return max([(own, path), *inner], key=lambda found: found[0])


def _read(file: Path) -> Any:
    try:
        return _opened(file, mmap=True)
    except RuntimeError:  # written before torch 1.6
        state = file.stat()
        return _load_unmapped(file, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _load_unmapped(file: Path, _size: int, _changed: int) -> Any:
    """The whole file in memory; kept, because reading it again for every tensor would take hours."""
    try:
        return _opened(file)
    except RuntimeError as error:
        raise _unreadable(file, error) from None


def _opened(file: Path, **options: Any) -> Any:
    """What torch finds in a file.

    Raises RuntimeError as torch does, and UserError for all else: on damage its reader raises whatever comes.
    """
    load = _torch().load
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickles
            return load(file, map_location="cpu", weights_only=True, **options)
    except RuntimeError:
        raise
    except OSError as error:
        if error.filename:
            raise
        raise _unreadable(file, error) from None  # torch read beyond its end
    except pickle.UnpicklingError:  # with a long text for those who write programs
        raise _unreadable(file, ValueError("other things than tensors are in it, or torch never saved it")) from None
    except Exception as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
    return UserError(f"`{file}`: damaged, cut off or not just weights ({reason})", "fetch the file again")
