"""Synthetic models beside their twins for llama.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from oracle import llama_logits

import runtime
from bench import stock
from bench.make_model import Recipe, random_ids, write_model


def difference_from_its_twin(name: str, folder: Path) -> float:
    """The largest difference between the logits of a shape in F32, in `exact` mode, and those that llama.cpp's own graph
    has of the same weights; relative to the largest logit.
    """
    path, twin, ids = folder / "m.gguf", folder / "stock.gguf", random_ids(512, 40)
    write_model(Recipe(name, 0.2, "f32"), path)
    stock.write(path, twin)
    with runtime.load(path, ffn="exact", threads=2, n_ctx=64, kv_type="f32") as model:
        ours = model.logits(ids)
    theirs = llama_logits(twin, ids)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
