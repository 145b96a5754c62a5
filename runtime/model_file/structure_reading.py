"""Reads a `Structure` back from a file's keys, and refuses what no model can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import numpy as np

from runtime.bindings.ffn_shape import FfnShape
from runtime.errors import UserError
from runtime.model_file.structure import ARCHITECTURE, PER_BLOCK, SCHEMA_VERSION, Block, Mamba2, Structure, item_type


def read_structure(metadata: Mapping[str, Any], where: str) -> Structure:
    """The structure that GGUF key-value pairs describe; `where` names the file in errors.

    Raises UserError for another architecture or schema version, a missing key, a value of the wrong type or out of its
    range.
    """
    _check_schema(metadata, where)
    structure = Structure(**{f.name: _value(f, metadata, where) for f in fields(Structure)})
    _check(structure, where)
    return structure


def _check_schema(metadata: Mapping[str, Any], where: str) -> None:
    """Refuse a GGUF file that is not ours, or of another schema version."""
    found = metadata.get("general.architecture")
    if found != ARCHITECTURE:
        raise UserError(
            f"{where}: general.architecture is `{found}`, expected `{ARCHITECTURE}`",
            "convert the original Hugging Face checkpoint: python -m convert REPO OUT.gguf",
        )
    version = metadata.get(f"{ARCHITECTURE}.schema_version")
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise UserError(
            f"{where}: schema version {version}, expected 1 to {SCHEMA_VERSION}",
            "convert the checkpoint again with this version of lazyneuron, or use the version that wrote the file",
        )


def _value(f: Any, metadata: Mapping[str, Any], where: str) -> Any:
    key = f"{ARCHITECTURE}.{f.metadata['key']}"
    if key not in metadata:
        if f.default is MISSING:
            raise UserError(f"{where}: no key `{key}`", "the file is incomplete: convert the checkpoint again")
        return f.default
    found, kind = metadata[key], item_type(f)
    if str(f.type).startswith("tuple"):
        return _values(found, key, kind, f"one {kind.__name__} per block", where)
    if f.name in PER_BLOCK and type(found) is not int:
        return _values(found, key, int, "int, or one int per block", where)
    if type(found) is not kind:
        raise UserError(f"{where}: `{key}` is {found!r}, expected {kind.__name__}")
    choices = f.metadata["choices"]
    if choices and found not in choices:
        raise UserError(f"{where}: `{key}` is `{found}`, expected one of {', '.join(choices)}")
    return found


def _values(found: Any, key: str, kind: type, wanted: str, where: str) -> tuple[Any, ...]:
    values = found.tolist() if isinstance(found, np.ndarray) else found
    fitting = (int, float) if kind is float else (kind,)
    if not isinstance(values, list) or not all(type(value) in fitting for value in values):
        raise UserError(f"{where}: `{key}` is {found!r}, expected {wanted}")
    return tuple(map(kind, values))


# Lengths beyond these are taken for damage before anything is allocated.
_LIMITS = {
    "vocab_size": 1 << 24,
    "context_length": 1 << 27,
    "embedding_length": 1 << 20,
    "block_count": 1 << 14,
    "feed_forward_length": 1 << 24,
    "head_count": 1 << 14,
    "head_count_kv": 1 << 14,
    "head_length": 1 << 16,
}
_SSM_LIMITS = {  # of blocks with Mamba; the memory of a sequence follows from these
    "ssm.conv_kernel": (2, 64),
    "ssm.state_size": (1, 1 << 12),
    "ssm.group_count": (1, 1 << 14),
    "ssm.inner_size": (1, 1 << 20),
}
_MOST_EXPERTS = 1 << 16
_MOST_NEURONS = (1 << 31) - 1  # of a block, all experts together: rows are counted in 32 bits
_MOST_USED = 64  # experts of one token: as many ranges of rows as the operators take


_LARGEST = 3.4e38  # of a number: what an F32 holds


def _check(s: Structure, where: str) -> None:
    _check_numbers(s, where)
    _check_lists(s, where)
    for name, limit in _LIMITS.items():
        value = getattr(s, name)
        # Of values per block, 0 means that a block has no such part.
        least = 0 if isinstance(value, tuple) else 1
        if any(not least <= v <= limit for v in (value if isinstance(value, tuple) else (value,))):
            raise UserError(f"{where}: {name} is {value}, expected {least} to {limit}")
    _check_mambas(s, where)
    _check_latent(s, where)
    for i, block in enumerate(s.blocks):
        _check_block(s, i, block, where)
    if not s.attentions or not s.ffns:
        raise UserError(f"{where}: no block has {'an FFN' if s.attentions else 'attention'}, expected at least one")
    if s.rope_freq_factors and len({a.rope for a in s.attentions.values()} - {0}) > 1:
        raise UserError(
            f"{where}: rope.dimension_count is {s.rope_dimension_count}, "
            "expected one number beside 0 where rope.freq_factors is set"
        )
    if s.residual == "parallel" and s.norm_placement != "pre":
        raise UserError(
            f"{where}: residual is `parallel`, expected norm_placement `pre` with it, found `{s.norm_placement}`"
        )
    if s.ffn_activation == "drelu" and s.ffn_gate != "gated":
        raise UserError(f"{where}: ffn.activation is `drelu`, expected ffn.gate `gated` with it, found `{s.ffn_gate}`")


def _check_numbers(s: Structure, where: str) -> None:
    for f in fields(s):
        value = getattr(s, f.name)
        if any(
            isinstance(v, float) and not abs(v) <= _LARGEST for v in (value if isinstance(value, tuple) else (value,))
        ):
            raise UserError(f"{where}: `{ARCHITECTURE}.{f.metadata['key']}` is {value}, expected finite numbers")
    if not (0 < s.norm_epsilon < 1 and s.rope_freq_base > 0 and s.rope_scaling_factor > 0):
        raise UserError(
            f"{where}: norm_epsilon, rope.freq_base and rope.scaling.factor must be positive (norm_epsilon below 1)"
        )
    scales = (s.embedding_scale, s.residual_scale, s.logit_scale, s.rope_attention_factor, s.expert_weights_scale)
    if min(scales) <= 0 or min(s.logit_softcap, s.activation_threshold) < 0:
        raise UserError(
            f"{where}: the scales of embeddings, residuals, logits, rotation and experts must be positive, "
            "logit_softcap and ffn.activation_threshold 0 or more"
        )
    if not 0 <= s.sliding_window <= _LIMITS["context_length"]:
        raise UserError(
            f"{where}: attention.sliding_window is {s.sliding_window}, expected 0 to {_LIMITS['context_length']}"
        )


def _check_lists(s: Structure, where: str) -> None:
    """That there is one value per block in each list."""
    for f in fields(s):
        value = getattr(s, f.name)
        if f.name.startswith("predictor") or not isinstance(value, tuple) or len(value) == s.block_count:
            continue
        if not value and f.name not in PER_BLOCK:
            continue
        raise UserError(
            f"{where}: `{ARCHITECTURE}.{f.metadata['key']}` has {len(value)} values, "
            f"expected {s.block_count}, one per block"
        )
    if s.sliding_window_pattern and not s.sliding_window:
        raise UserError(
            f"{where}: attention.sliding_window_pattern without a window, expected attention.sliding_window with it"
        )
    if s.predictor != "none" and not len(s.predictor_rank) == len(s.predictor_error) == s.block_count:
        raise UserError(
            f"{where}: predictor ranks and errors for {len(s.predictor_rank)} and {len(s.predictor_error)} blocks, "
            f"expected {s.block_count}"
        )
    if any(not 0 <= rank <= 1 << 20 for rank in s.predictor_rank):
        raise UserError(f"{where}: a predictor rank of {max(s.predictor_rank)}, expected 0 to {1 << 20}")


def _check_experts(s: Structure, i: int, ffn: FfnShape | None, at: str) -> None:
    count, used = s.each("expert_count")[i], s.each("expert_used_count")[i]
    if not (0 <= count <= _MOST_EXPERTS and count != 1):
        raise UserError(f"{at}: expert_count is {count}, expected 0, or 2 to {_MOST_EXPERTS}")
    if count and ffn is None:
        raise UserError(f"{at}: {count} experts without neurons, expected feed_forward_length with them")
    if not (1 <= used <= min(count, _MOST_USED) if count else used == 0):
        expected = f"1 to {min(count, _MOST_USED)}" if count else "0 without experts"
        raise UserError(f"{at}: expert_used_count is {used}, expected {expected}")
    if ffn is None or not ffn.experts:
        return
    if ffn.n_ff > _MOST_NEURONS:
        raise UserError(f"{at}: {ffn.n_ff} neurons of all experts, expected at most {_MOST_NEURONS}")
    for key, value in (("ffn.bias", ffn.bias), ("ffn.sub_norm", ffn.sub_norm)):
        if value:
            raise UserError(f"{at}: `{key}` with experts, expected false")


def _check_mambas(s: Structure, where: str) -> None:
    """Before any block is made of the values: heads divide them."""
    ranks = s.each("ssm_time_step_rank")
    if any(ranks):
        for key, (least, most) in _SSM_LIMITS.items():
            value = getattr(s, key.replace(".", "_"))
            if not least <= value <= most:
                raise UserError(f"{where}: {key} is {value}, expected {least} to {most} in a model with Mamba blocks")
    for i, (heads, attention) in enumerate(zip(ranks, s.each("head_count_kv"), strict=True)):
        if heads and attention:
            raise UserError(f"{where}: block {i}: attention and Mamba, expected one of them")
        if not 0 <= heads <= _LIMITS["head_count"] or (heads and s.ssm_inner_size % heads):
            raise UserError(
                f"{where}: block {i}: ssm.time_step_rank is {heads}, expected 0 (no Mamba), "
                f"or a number of heads that divides ssm.inner_size {s.ssm_inner_size}"
            )
        if heads and heads % s.ssm_group_count:
            raise UserError(
                f"{where}: block {i}: {heads} Mamba heads, expected a multiple of the {s.ssm_group_count} groups"
            )


def _check_shared(s: Structure, i: int, at: str) -> None:
    """Of what stands around a block's experts: the shared expert, and their own input."""
    shared, experts, most = s.each("expert_shared_feed_forward_length")[i], s.each("expert_count")[i], 1 << 24
    if not 0 <= shared <= most:
        raise UserError(f"{at}: expert_shared_feed_forward_length is {shared}, expected 0 to {most}")
    if shared and not experts:
        raise UserError(f"{at}: a shared expert of {shared} neurons without experts, expected expert_count with it")
    if (shared or (experts and s.expert_latent_length)) and s.norm_placement != "pre":
        what = "a shared expert" if shared else "latent experts"
        raise UserError(f"{at}: {what} with norm_placement `{s.norm_placement}`, expected `pre`")


def _check_latent(s: Structure, where: str) -> None:
    latent = s.expert_latent_length
    if not 0 <= latent <= _LIMITS["embedding_length"]:
        raise UserError(f"{where}: expert_latent_length is {latent}, expected 0 to {_LIMITS['embedding_length']}")
    if latent and not any(s.each("expert_count")):
        raise UserError(f"{where}: expert_latent_length is {latent} without experts, expected 0")
    if latent and s.predictor != "none" and s.predictor_tap != "ffn_norm":
        raise UserError(f"{where}: predictor.tap is `{s.predictor_tap}` with latent experts, expected `ffn_norm`")


def _check_block(s: Structure, i: int, block: Block, where: str) -> None:
    attention, ffn, at = block.mixer, block.ffn, f"{where}: block {i}"
    if attention is None and ffn is None:
        raise UserError(f"{at}: neither attention nor Mamba nor FFN, expected at least one")
    if ffn is None and s.rank(i):
        raise UserError(f"{at}: a predictor of rank {s.rank(i)}, expected 0 in a block without an FFN")
    _check_experts(s, i, ffn, at)
    _check_shared(s, i, at)
    if attention is None or isinstance(attention, Mamba2):
        return
    if attention.head_count < 1 or attention.head_count % attention.head_count_kv:
        raise UserError(
            f"{at}: {attention.head_count} heads, expected a multiple of the {attention.head_count_kv} key-value heads"
        )
    if s.position.startswith("rope") and not (
        (attention.rope or isinstance(s.rope_dimension_count, tuple) or s.mambas)  # a state knows the order, too
        and 0 <= attention.rope <= attention.head_length
        and attention.rope % 2 == 0
    ):
        raise UserError(
            f"{at}: rope.dimension_count is {attention.rope}, "
            f"expected an even number up to the head length {attention.head_length}"
        )
