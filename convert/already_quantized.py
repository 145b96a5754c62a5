"""Checkpoints whose weights were quantised: told by config.json, or by names of their tensors.

Knows the traces that methods leave, not how any of them works: the original weights are what is converted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from convert.config import Config, shown
from runtime.errors import UserError

# Keys of config.json that describe a quantisation -> its method where the object does not name one.
_CONFIGS = {"quantization_config": "", "compression_config": "compressed-tensors", "quantization": "MLX"}
# Ends of tensors' names -> the method that stores such tensors. The first that fits any of them tells.
_TRACES = {
    r"\.g_idx": "GPTQ",
    r"\.qzeros": "AWQ",
    r"\.qweight": "GPTQ or AWQ",
    r"\.SCB|\.weight_format": "bitsandbytes, 8 bits",
    r"\.(nested_)?(absmax|quant_map)|\.quant_state\..+": "bitsandbytes, 4 bits",
    r"\.weight_(packed|shape|zero_point|g_idx)": "compressed-tensors",
    r"\.weight_scale_inv": "fp8",
    r"\.weight_scale_2": "ModelOpt",
    r"\.q_(weight|scale|scale_max|groups|invperm|perm)": "EXL2",
    r"\.(trellis|suh|svh|mcg|mul1)": "EXL3",
    r"\.(codebooks|codes)": "AQLM",
    r"\.W_q(_\w+)?|\.meta": "HQQ",
    r"\.weight\._(data|scale|shift)": "quanto",
    r"_blocks": "MXFP4",
    r"\.scales": "MLX or MXFP4",
    r"\.weight_scales?|\.weight_quantizer\..+": "fp8, int8 or packed",
}


def refuse_quantised(config: Config, understood: Collection[str] = ()) -> None:
    """Raise UserError where config.json says that the weights are quantised, by none of the methods that are
    `understood`.
    """
    for key, usual in _CONFIGS.items():
        found = config.values.get(key)
        said = found if isinstance(found, dict) else {"": found}
        if found and said.get("quant_method") not in understood:
            floats = f"if its weights are floats all the same, take `{key}` out of config.json"
            raise _error(config.where, _method(said, usual), floats)


def _method(found: Mapping[str, Any], usual: str) -> str:
    named = found.get("quant_method") or found.get("quant_algo") or usual
    for loaded in (4, 8):
        if found.get(f"load_in_{loaded}bit") is True or found.get(f"_load_in_{loaded}bit") is True:
            return f"bitsandbytes, {loaded} bits"
    bits = found.get("bits")
    method = named if isinstance(named, str) and named else f"a method that is not named: {shown(found)}"
    return f"{method}, {bits} bits" if type(bits) is int else method


def refuse_quantised_tensors(where: str, names: Collection[str]) -> None:
    """Raise UserError where names of tensors without a place show that the weights are quantised."""
    for pattern, method in _TRACES.items():
        if any(re.search(f"(?:{pattern})$", name) for name in names):
            raise _error(where, method)


def _error(where: str, how: str, otherwise: str = "") -> UserError:
    return UserError(
        f"{where}: the weights are quantised already ({how}), expected floats",
        "convert the original checkpoint, which this one was made from" + (f"; {otherwise}" if otherwise else ""),
    )
