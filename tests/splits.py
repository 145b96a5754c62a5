"""Ways to split an FFN's neurons between a device and the CPU."""

from __future__ import annotations

from pathlib import Path

from runtime.bindings import ggml
from runtime.hybrid.costs import cuts_of
from runtime.model_file.reader import GgufFile
from runtime.model_file.tensor_names import stems, weight_of

SPLITS = ("none", "one block", "half", "all but one", "all")


def hot(path: Path, split: str) -> int:
    """How many neurons of a file's blocks, or of each of their experts, are on the device."""
    with GgufFile(path) as file:
        i, ffn = next(iter(file.structure.ffns.items()))
        block = ggml.ggml_blck_size(file.tensors[weight_of(i, stems(ffn).down)].type_id)
        at = cuts_of(ffn.expert_length, block)
    return {"none": 0, "one block": at[1], "half": at[len(at) // 2], "all but one": at[-2], "all": at[-1]}[split]
