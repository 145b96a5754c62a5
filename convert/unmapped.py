"""Tensors that an architecture has no place for: buffers, which carry no weights, and traces of how a checkpoint was
made.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from convert.rewrites import Shape

# Buffers that models were once saved with, and that are computed anew from config.json.
_ROTATION = re.compile(
    r"(^|\.)(\w+_)?inv_freq$|(^|\.)\w*rotary\w*\.\w*(cos|sin)_cached$|(^|\.)freqs_cis$|(^|\.)rope\.freqs$"
)
_COUNTERS = re.compile(r"(^|\.)(position_ids|num_batches_tracked|decoder\.version|_float_tensor)$")
_MASK = re.compile(r"(^|\.)\w*attn\w*\.bias$|(^|\.)\w*attention\w*\.bias$|(^|\.)(causal|attention)_mask$")
_MASKED = re.compile(r"(^|\.)masked_bias$")

# In a name, as parts of their own -> who puts them there.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel or DeepSpeed",
    "base_model.model.": "PEFT",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "_forward_module.": "Lightning Fabric",
}
# In a name -> what it means.
_TRACES = {
    r"lora_[AB]|lora_embedding|lora_magnitude|\.base_layer\.|\.modules_to_save\.": (
        "a LoRA adapter is among the weights: merge it first (merge_and_unload of PEFT), and convert the result"
    ),
    r"(^|\.)v_head\.|(^|\.)value_head\.|(^|\.)reward_head\.": (
        "the value head of a trainer is among the weights: save the language model alone"
    ),
    r"^(step|epoch|iteration|global_step|lr|loss)$|(^|\.)(exp_avg|exp_avg_sq|momentum_buffer)$": (
        "the state of a training run is among the weights: save the model alone"
    ),
    r"^(model\.)?layers\.\d+\.attention\.w[qkvo]\.": (
        "weights as Meta or Mistral store them: use the repository's version for transformers"
    ),
    r"\.experts\.(gate_up_proj|down_proj)(\.|$)": (
        "all experts are in one tensor: load the model with transformers and save it with save_pretrained, "
        "which stores each by itself"
    ),
    r"shared_experts?(\.|_gate)": "experts that every token uses are not supported",
    r"\.experts\.|block_sparse_moe": (
        "experts, or parts of them, that the architecture and config.json do not have: is this the model's own config?"
    ),
    r"^(score|classifier)\.": "a classifier, expected a language model",
    r"vision_|visual\.|multi_modal_projector|(^|\.)language_model\.": (
        "a model that sees images, expected a language model alone"
    ),
}


def is_buffer(name: str, shape: Shape) -> bool:
    """Whether a tensor without a place is a buffer: the same for every architecture."""
    if _ROTATION.search(name) or _COUNTERS.search(name):
        return True
    if _MASKED.search(name):
        return shape in ((), (1,))
    # A mask is a square, perhaps of several dimensions; a bias of that name is a vector, and carries weights.
    square = len(shape) >= 2 and shape[-1] == shape[-2] and all(n == 1 for n in shape[:-2])
    return bool(_MASK.search(name)) and square


def explanation(names: Collection[str]) -> str:
    """What the names of all a checkpoint's tensors say of how it was made, "" where they say nothing."""
    for pattern, meaning in _TRACES.items():
        if any(re.search(pattern, name) for name in names):
            return meaning
    for part, who in _WRAPPERS.items():
        if any(f".{part}" in f".{name}" for name in names):
            return f"names have `{part}` in them, which {who} puts there: save the model itself, without the wrapper"
    return ""


def common_prefix(missing: Collection[str], unknown: Collection[str]) -> str:
    """What to say where each tensor that is missing is there with something before its name, else ""."""
    before = {name[i + 1 :]: name[: i + 1] for name in unknown for i, letter in enumerate(name) if letter == "."}
    prefixes = [before.get(name, "") for name in missing]
    if not prefixes or not all(prefixes):
        return ""
    return f"names begin with `{min(prefixes, key=len)}`: save the model itself, without what is around it"


def without_head(missing: Collection[str], head: str) -> str:
    """What to say where nothing but the output head that config.json promises is missing, else ""."""
    if set(missing) != {head}:
        return ""
    return (
        "config.json does not tie the output head to the embeddings, and there is none: fetch what is missing; "
        "if it is tied, set `tie_word_embeddings` to true"
    )


def disagreement(missing: Collection[str], unknown: Collection[str]) -> str:
    """Which tensors a file lacks, and which it has without a place for them; "" where there are none of either."""
    both = {"missing": missing, "unknown": unknown}
    return " and ".join(f"{len(names)} tensors {what} ({listed(names)})" for what, names in both.items() if names)


def listed(names: Collection[str], most: int = 5) -> str:
    """The first of some names."""
    return ", ".join(list(names)[:most]) + (", ..." if len(names) > most else "")
