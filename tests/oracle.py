"""Logits from transformers, and the distances by which ours are judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[Any]


def transformers_logits(checkpoint: Path, ids: list[int], **config: Any) -> Logits:
    """float32 [len(ids), n_vocab]; `config` overrides fields of the checkpoint's config.json."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager", **config)
    with torch.no_grad():
        logits: Logits = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def llama_logits(path: Path, ids: list[int]) -> Logits:
    """float32 [len(ids), n_vocab], keys and values in F32."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=len(ids), n_batch=512, logits_all=True, type_k=0, type_v=0, n_threads=2, verbose=True
    )
    try:
        model.eval(ids)
        return np.array(model.scores[: len(ids)])
    finally:
        model.close()


def mode_errors(path: Path, ids: list[int]) -> tuple[float, float]:
    """How far `exact` is from `dense`, and `predicted` from `exact`, relative."""
    import runtime

    logits = {}
    for ffn in ("dense", "exact", "predicted"):
        with runtime.load(path, ffn=ffn, threads=2, n_ctx=64) as model:
            logits[ffn] = model.logits(ids)
    return relative(logits["dense"], logits["exact"]), relative(logits["exact"], logits["predicted"])


def random_ids(n: int, n_vocab: int, seed: int = 0) -> list[int]:
    return [1, *np.random.default_rng(seed).integers(3, n_vocab, n - 1).tolist()]


def kl(reference: Logits, found: Logits) -> float:
    """Mean over positions of KL(reference || found), in nats per token."""
    p, q = (_log_softmax(x) for x in (reference, found))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(x: Logits) -> Logits:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def max_difference(reference: Logits, found: Logits) -> float:
    return float(np.abs(reference - found).max())


def same_argmax(reference: Logits, found: Logits) -> float:
    """Share of positions with the same most likely token."""
    return float((reference.argmax(-1) == found.argmax(-1)).mean())


def relative(reference: Logits, found: Logits) -> float:
    return float(np.linalg.norm(reference.astype(np.float64) - found) / np.linalg.norm(reference.astype(np.float64)))
