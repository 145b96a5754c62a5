"""Ways to split an FFN's neurons between a device and the CPU."""

from __future__ import annotations

from pathlib import Path

from runtime.bindings import ggml
from runtime.hybrid.costs import cuts_of
from runtime.model_file.reader import GgufFile

SPLITS = ("none", "one block", "half", "all but one", "all")


def hot(path: Path, split: str) -> int:
    """How many neurons of a file's blocks are on the device; none of experts."""
    with GgufFile(path) as file:
        if any(ffn.experts for ffn in file.structure.ffns.values()):
            return 0
        block = ggml.ggml_blck_size(file.tensors["blk.0.ffn_down.weight"].type_id)
        at = cuts_of(file.structure.feed_forward_length, block)
    return {"none": 0, "one block": at[1], "half": at[len(at) // 2], "all but one": at[-2], "all": at[-1]}[split]
