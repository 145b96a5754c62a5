"""Number formats of a GGUF file: which one a tensor gets, how many bytes that takes, and rows of floats turned into it.

Quantised formats are made by ggml's own functions, so they are bit for bit what llama.cpp makes.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from runtime.bindings import ggml
from runtime.bindings.rows import pack
from runtime.errors import UserError

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k", "q5_k", "q6_k")
NUMBERS = {name.lower(): number for name, number in ggml.TYPES.items()}  # of enum ggml_type

# Where a row is no whole number of blocks: the next format up with smaller blocks, as in llama.cpp.
_FALLBACKS = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_LAST_FALLBACK = "f16"

# The output head decides between tokens: below 6 bits its errors show first (llama.cpp does the same).
_OUTPUT_TYPES = {"q4_0": "q6_k", "q4_k": "q6_k", "q5_k": "q6_k"}

_PLAIN: dict[str, npt.DTypeLike] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


def check_type(name: str, option: str) -> str:
    """`name` in lower case. Raises UserError when it is none of `TYPES`."""
    if name.lower() not in TYPES:
        raise UserError(f"{option}: `{name}`, expected one of {', '.join(TYPES)}")
    return name.lower()


def output_type(main: str) -> str:
    """The format of the output head in a file of format `main`."""
    return _OUTPUT_TYPES.get(main, main)


def fitting(wanted: str, row_length: int) -> str:
    """`wanted`, or what replaces it for rows of `row_length` elements."""
    name = wanted
    while row_length % _block(name)[0]:
        name = _FALLBACKS.get(name, _LAST_FALLBACK)
    return name


def row_bytes(name: str, row_length: int) -> int:
    """Bytes of one row of `row_length` elements."""
    elements, size = _block(name)
    return row_length // elements * size


def _block(name: str) -> tuple[int, int]:
    """Elements and bytes of one block."""
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType(NUMBERS[name])]
    return int(elements), int(size)


def encode(rows: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint8]:
    """`rows` ([n, row_length], or [n]) in format `name`, as bytes. Every row is encoded on its own.

    Raises UserError (without saying where) for values that are not finite, or too large for F16.
    """
    numbers = np.ascontiguousarray(rows, dtype=np.float32)
    if not np.isfinite(numbers).all():
        raise UserError("values that are not finite", "the checkpoint is damaged, or its training diverged")
    if name not in _PLAIN:
        return pack(numbers, NUMBERS[name])
    with np.errstate(over="ignore"):
        plain = numbers.astype(_PLAIN[name])
    if name == "f16" and not np.isfinite(plain).all():
        raise UserError("values beyond the range of f16", "use --type bf16 or f32")
    return plain.reshape(-1).view(np.uint8)
