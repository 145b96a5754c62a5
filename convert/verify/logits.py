"""A written file against its checkpoint: logits on a short text, from the runtime and from an oracle that shares
nothing with it.

The oracle is transformers where it is installed, computes just this architecture with just this activation, and has the
memory; else `convert.verify.reference`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import runtime
from convert.arch import Source, adapted, config_activation
from convert.checkpoint import Checkpoint
from convert.plan import Plan
from convert.verify.reference import NumpyModel
from runtime.analysis.likelihood import divergence as summed_divergence
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile
from runtime.model_file.structure import Mamba2

TEXT = (
    "The harbour was quiet when the last boat came in. Two men tied it to the old stone wall, counted 14 crates "
    "of fish, "
    "and said nothing; in 1953 the price had fallen again, and everyone in town knew what that meant for the winter."
)
_MOST_TOKENS = 64

# Most nats per token by which a file may diverge from its checkpoint. What rounding costs, measured: on the bundled
# model 7e-13 (f32), 2e-7
# (f16), 1e-5 (bf16), 3e-4 (q8_0), 2e-3 (q6_k), 6e-3 (q5_k), 2e-2 (q4_k, q4_0); on 44 small random models
# (tests/families.py), whose neurons
# forgive less than any trained model's, at most 3e-11, 2e-3, 1e-2 and 4e-2 for the first four. Stock 7B models lose
# 0.03 to 0.07 to 4 bits.
# Mistakes cost the bundled model more: squared ReLU for ReLU 0.23, a rotation of the other layout 0.26, a second ReLU
# 1.2, an un-transposed
# matrix 5.8 (tests/test_verify.py plants them). A model that 4 bits really hurt as much should be verified in another
# type.
LIMITS = {"f32": 1e-6, "f16": 5e-3, "bf16": 3e-2, "q8_0": 5e-2, "q6_k": 5e-2, "q5_k": 1e-1, "q4_k": 2e-1, "q4_0": 2e-1}

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Verdict:
    """How far a file is from its checkpoint, the worse of its FFN modes. kl: nats per token, mean over positions."""

    reference: str
    modes: tuple[str, ...]
    tokens: int
    max_difference: float
    kl: float


def verify(file: Path, out: Path, checkpoint: Checkpoint, plan: Plan) -> Verdict:
    """Compare the model in `file` with its checkpoint. plan: of its conversion, before neurons are reordered.

    out: what to call the file. Raises UserError when the logits differ by more than rounding explains.
    """
    with GgufFile(file) as opened:
        modes = ("exact", "dense") if opened.structure.layout == "both" else ("exact",)
    n = min(_MOST_TOKENS, plan.structure.context_length)
    with runtime.load(file, ffn="exact", kv_type="f32", n_ctx=n) as model:
        ids = model.tokenize(TEXT)[:n]
    name, oracle = _oracle(checkpoint, plan)
    expected = oracle(ids)
    verdicts = [_judge(file, mode, ids, name, expected) for mode in modes]
    limit = max(LIMITS[kind] for kind in (plan.types.main, plan.types.output or plan.types.main))
    for verdict in verdicts:
        if not verdict.kl <= limit:  # a divergence that is no number is no pass
            raise UserError(
                f"`{out}`: not written, its logits differ from {name}'s: KL {verdict.kl:.2g} nats per token in "
                f"{verdict.modes[0]} mode, expected at most {limit:g} for {plan.types.main}",
                "the activation may be another one (--ffn-type), the checkpoint damaged, or a small model hurt "
                "by few bits: "
                "--type f16 tells",
            )
    return Verdict(name, modes, len(ids), max(v.max_difference for v in verdicts), max(v.kl for v in verdicts))


def _judge(file: Path, mode: str, ids: list[int], name: str, expected: Floats) -> Verdict:
    with runtime.load(file, ffn=mode, kv_type="f32", n_ctx=len(ids)) as model:
        found = model.logits(ids)
    return Verdict(name, (mode,), len(ids), float(np.abs(found - expected).max()), divergence(expected, found))


def divergence(expected: Floats, found: Floats) -> float:
    """Mean over positions of KL(expected || found), in nats per token."""
    return summed_divergence(expected, found) / len(expected)


def _oracle(checkpoint: Checkpoint, plan: Plan) -> tuple[str, Callable[[list[int]], Floats]]:
    if _fits_transformers(checkpoint, plan):
        return "transformers", lambda ids: _transformers_logits(checkpoint.folder, ids)
    return "the checkpoint (float32 numpy)", NumpyModel(checkpoint, plan).logits


def _fits_transformers(checkpoint: Checkpoint, plan: Plan) -> bool:
    """Whether transformers computes what the plan does.

    Its classes take their activation from config.json, round ternary weights' inputs too, and bound the steps of
    Mamba-2 from below in prompts alone.
    """
    assert plan.arch
    config = adapted(plan.arch, checkpoint.config)
    told = config_activation(plan.arch, config) == plan.structure.ffn_activation
    rounded = any(isinstance(tensor.source, Source) and tensor.source.ternary for tensor in plan.tensors)
    mamba = any(isinstance(block.mixer, Mamba2) for block in plan.structure.blocks)
    if not told or rounded or mamba or not _memory_for(plan) or not _installed("transformers", "torch"):
        return False
    model = getattr(importlib.import_module("transformers"), plan.structure.source_architecture, None)
    activations = importlib.import_module("transformers.activations").ACT2FN
    named = config.values.get(plan.arch.activation.name)
    return model is not None and (named is None or named in activations) and _reads(model, checkpoint.folder)


def _reads(model: Any, folder: Path) -> bool:
    """Whether transformers takes the config: it refuses some that mean one thing only, and files with a byte order
    mark.
    """
    try:
        model.config_class.from_pretrained(folder)
    except Exception:
        return False
    return True


def _installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


def _memory_for(plan: Plan) -> bool:
    elements = sum(tensor.rows * (tensor.shape[0] if len(tensor.shape) > 1 else 1) for tensor in plan.tensors)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return False
    return 2 * 4 * elements < free


def _transformers_logits(folder: Path, ids: list[int]) -> Floats:
    transformers: Any = importlib.import_module("transformers")
    torch: Any = importlib.import_module("torch")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0].numpy())
