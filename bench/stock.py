"""A stock GGUF with the shapes and weights of one of our files, so that llama.cpp can be measured on the same bytes.

llama.cpp computes SiLU where a gated model has ReLU (arch `llama`, which has experts, too), and ReLU squared in the
arch that stands in for ungated ones (`nemotron`: LayerNorm and biases as OPT has them, rotary positions instead of
learned ones): the text it writes means nothing, the work is the same. A `smallthinker` is the very same model, and so
are `nemotron_h` and `nemotron_h_moe`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.bindings.ffn_shape import Experts
from runtime.errors import UserError
from runtime.model_file import tensor_names as names
from runtime.model_file.reader import GgufFile
from runtime.model_file.structure import Structure
from runtime.model_file.writer import NewTensor, copied, copied_keys, write_gguf

_OURS = (*names.TRANSPOSED, *names.NEURON_NOTES, *names.PREDICTOR_ROWS, names.weight(names.PREDICTOR_IN))
_GATINGS = {"softmax": 1, "sigmoid": 2, "softmax_weight": 3}  # llama.cpp's numbers


def write(source: Path, target: Path) -> None:
    """Write the stock twin of a model; UserError for a structure that llama.cpp has no counterpart of."""
    with GgufFile(source) as file:
        s = file.structure
        arch = architecture(s, f"`{file.path}`")
        name = f"{file.metadata.get('general.name', '')} (twin for llama.cpp, its text means nothing)"
        tokenizer = {key: value for key, value in copied_keys(source).items() if key.startswith("tokenizer.")}
        keys = {f"{arch}.{key}": value for key, value in _keys(s).items()}
        write_gguf(target, {"general.name": name, **keys, **tokenizer}, list(_streams(file, s)), arch)


def architecture(s: Structure, where: str) -> str:
    """llama.cpp's architecture with the same matrices."""
    gated = s.ffn_gate == "gated"
    experts = [ffn.experts for ffn in s.ffns.values() if ffn.experts]
    alike = len(set(s.blocks)) == 1
    same = s.layout == "both" and s.norm_placement == "pre" and s.output_norm and not s.projected
    if same and gated and s.norm == "rms" and s.position.startswith("rope"):
        if experts and experts[0].tap == "block" and _smallthinker(s):
            return "smallthinker"
        if alike and (not experts or experts[0] == Experts(experts[0].count, experts[0].used)):
            return "llama"
    if same and alike and not gated and s.norm == "layer":
        return "nemotron"
    if same and s.norm == "rms" and _nemotron_h(s):
        return "nemotron_h_moe" if experts else "nemotron_h"
    raise UserError(
        f"{where}: no stock counterpart in llama.cpp for this structure",
        "measure a gated RMSNorm model, an ungated LayerNorm one, or a Nemotron-H, of layout `both`",
    )


def _smallthinker(s: Structure) -> bool:
    """Whether blocks differ as llama.cpp's graph of that name has it: all rotate and none has a window, or of four the
    first does not rotate and the others have windows of 4,096 positions.
    """
    windowed = tuple(i % 4 > 0 for i in range(s.block_count)) if s.sliding_window else ()
    rotated = tuple(s.head_length * w for w in windowed) or (s.head_length,) * s.block_count
    same = s.position == "rope_neox" and len(set(s.ffns.values())) == 1 and s.ffn_activation == "relu"
    shown = s.each("rope_dimension_count") == rotated and s.sliding_window_pattern == windowed
    return same and shown and s.sliding_window in (0, 4096)


def _nemotron_h(s: Structure) -> bool:
    """Whether blocks have one half each, as llama.cpp's graphs of that name have it: Mamba-2, attention that does not
    rotate, or an FFN of squared ReLU; or in place of these experts with a shared one.
    """
    alone = all((block.mixer is None) != (block.ffn is None) for block in s.blocks)
    plain = not s.ffn_bias and not s.attention_bias and s.ffn_gate == "none" and s.ffn_activation == "relu2"
    resting = not s.sliding_window and not any(a.rope for a in s.attentions.values())
    kinds = {ffn.experts for ffn in s.ffns.values()}
    usual = Experts(0, 0, "sigmoid", True, s.expert_weights_norm, s.expert_weights_scale)
    experts = all(e and replace(e, count=0, used=0) == usual for e in kinds) and s.shared.keys() == s.ffns.keys()
    return bool(s.mambas) and alone and plain and resting and len(kinds) == 1 and (kinds == {None} or experts)


def _streams(file: GgufFile, s: Structure) -> Iterator[NewTensor]:
    for name in file.tensors:
        i, short = names.parsed(name) or (0, name)
        if s.mambas and short == names.weight(names.FFN_NORM):
            yield copied(file, name, names.weight_of(i, names.ATTN_NORM))
        elif short not in _OURS and short != names.weight(names.POSITION_EMBD):
            yield copied(file, name)
    if s.tied_output and s.ffn_gate == "none":  # nemotron has a head of its own
        yield copied(file, "token_embd.weight", "output.weight")


def _keys(s: Structure) -> dict[str, Any]:
    a, ffn = next(iter(s.attentions.values())), next(iter(s.ffns.values()))
    epsilon = "rms_epsilon" if s.norm == "rms" else "epsilon"
    return {
        "vocab_size": s.vocab_size,
        "context_length": s.context_length,
        "embedding_length": s.embedding_length,
        "block_count": s.block_count,
        "feed_forward_length": ffn.expert_length,
        "attention.head_count": a.head_count,
        "attention.head_count_kv": a.head_count_kv,
        "attention.key_length": a.head_length,
        "attention.value_length": a.head_length,
        f"attention.layer_norm_{epsilon}": s.norm_epsilon,
        "rope.dimension_count": a.rope or a.head_length,
        "rope.freq_base": s.rope_freq_base,
        **(_expert_keys(ffn.experts, ffn.expert_length) if ffn.experts else {}),
        **({"attention.sliding_window": s.sliding_window} if s.sliding_window else {}),
        **(_mamba_keys(s) if s.mambas else {}),
    }


def _mamba_keys(s: Structure) -> dict[str, Any]:
    """Of blocks of one half each: which they are follows from lengths that are zero."""
    shared, sizes = next(iter(s.shared.values()), None), ("conv_kernel", "state_size", "group_count", "inner_size")
    of_experts = {
        "expert_weights_norm": s.expert_weights_norm,
        "expert_weights_scale": s.expert_weights_scale,
        "expert_shared_count": 1,
        "expert_shared_feed_forward_length": shared.n_ff if shared else 0,
    }
    return {
        **{f"ssm.{key}": getattr(s, f"ssm_{key}") for key in sizes},
        "ssm.time_step_rank": max(s.each("ssm_time_step_rank")),
        "feed_forward_length": list(s.each("feed_forward_length")),
        "attention.head_count_kv": list(s.each("head_count_kv")),
        "attention.layer_norm_epsilon": s.norm_epsilon,
        **(of_experts if shared else {}),
    }


def _expert_keys(experts: Experts, length: int) -> dict[str, Any]:
    return {
        "expert_count": experts.count,
        "expert_used_count": experts.used,
        "expert_feed_forward_length": length,
        "expert_gating_func": _GATINGS[experts.gating],
    }
