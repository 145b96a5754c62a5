"""Shapes of published models, as structures without weights."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from runtime.errors import UserError
from runtime.model_file.structure import Structure

_SOURCE = "SyntheticForBenchmarks"


def _gated(d: int, ff: int, layers: int, heads: int, heads_kv: int, vocab: int = 32000) -> Structure:
    """RMSNorm, rotary positions, a gated FFN, nothing tied, no biases."""
    return Structure(
        source_architecture=_SOURCE,
        vocab_size=vocab,
        context_length=4096,
        embedding_length=d,
        block_count=layers,
        feed_forward_length=ff,
        head_count=heads,
        head_count_kv=heads_kv,
        head_length=d // heads,
        norm="rms",
        norm_epsilon=1e-5,
        position="rope_norm",
        ffn_gate="gated",
        ffn_activation="relu",
        rope_dimension_count=d // heads,
    )


def _ungated(d: int, ff: int, layers: int, heads: int, vocab: int = 50272) -> Structure:
    """LayerNorm, learned positions, an ungated FFN, biases everywhere, a tied head."""
    return Structure(
        source_architecture=_SOURCE,
        vocab_size=vocab,
        context_length=2048,
        embedding_length=d,
        block_count=layers,
        feed_forward_length=ff,
        head_count=heads,
        head_count_kv=heads,
        head_length=d // heads,
        norm="layer",
        norm_epsilon=1e-5,
        position="learned",
        ffn_gate="none",
        ffn_activation="relu",
        ffn_bias=True,
        attention_bias=True,
        attention_output_bias=True,
        tied_output=True,
    )


def _smallthinker(d: int, layers: int, heads: int, heads_kv: int, experts: int, used: int, **others: Any) -> Structure:
    """RMSNorm, gated experts of 768 neurons, which a router chooses that sees the block's input."""
    return Structure(
        source_architecture=_SOURCE,
        vocab_size=151936,
        embedding_length=d,
        block_count=layers,
        head_count=heads,
        head_count_kv=heads_kv,
        head_length=128,
        norm="rms",
        norm_epsilon=1e-6,
        position="rope_neox",
        ffn_gate="gated",
        ffn_activation="relu",
        rope_freq_base=1.5e6,
        feed_forward_length=768,
        expert_count=experts,
        expert_used_count=used,
        expert_gating="sigmoid",
        expert_weights_norm=True,
        router_tap="block",
        **others,
    )


def _with_windows(layers: int, length: int = 128, window: int = 4096) -> dict[str, Any]:
    """Of four blocks, the first sees all positions and does not rotate, the others rotate and have a window."""
    windowed = tuple(i % 4 > 0 for i in range(layers))
    return {
        "rope_dimension_count": tuple(length * rotates for rotates in windowed),
        "sliding_window": window,
        "sliding_window_pattern": windowed,
    }


def _mixtral(dense: Structure) -> Structure:
    """The same with eight experts, of which a token uses two."""
    return replace(dense, expert_count=8, expert_used_count=2, expert_weights_norm=True, rope_freq_base=1e6)


SHAPES = {
    "mistral-7b": _gated(4096, 14336, 32, 32, 8),
    "llama-2-7b": _gated(4096, 11008, 32, 32, 32),
    "opt-6.7b": _ungated(4096, 16384, 32, 32),
    "tiny": _gated(256, 1024, 4, 4, 2, vocab=512),
    "tiny-opt": _ungated(256, 1024, 4, 4, vocab=512),
    "smallthinker-21b": _smallthinker(2560, 52, 28, 4, 64, 6, context_length=16384, **_with_windows(52)),
    "smallthinker-4b": _smallthinker(
        1536, 32, 12, 2, 32, 4, context_length=32768, tied_output=True, rope_dimension_count=128
    ),
    "mixtral-8x7b": _mixtral(_gated(4096, 14336, 32, 32, 8)),
    "tiny-smallthinker": replace(
        _smallthinker(256, 5, 4, 2, 8, 3, context_length=4096, **_with_windows(5, 64)),
        vocab_size=512,
        head_length=64,
        feed_forward_length=256,
    ),
    "tiny-mixtral": _mixtral(_gated(256, 256, 3, 4, 2, vocab=512)),
}
WITHOUT_EXPERTS = [name for name, s in SHAPES.items() if not s.expert_count]


def shape(name: str, layers: int | None = None) -> Structure:
    """The structure of that name, with `layers` blocks instead of its own number.

    Raises UserError for an unknown one.
    """
    if name not in SHAPES:
        raise UserError(f"--shape: `{name}`, expected one of {', '.join(SHAPES)}")
    if layers is not None and not 1 <= layers <= 1000:
        raise UserError(f"--layers: {layers}, expected 1 to 1000")
    s = SHAPES[name]
    n = layers or s.block_count
    # Values of single blocks begin anew behind the last one.
    lists = {f.name: value for f in fields(s) if isinstance(value := getattr(s, f.name), tuple) and value}
    repeated: dict[str, Any] = {name: tuple(value[i % len(value)] for i in range(n)) for name, value in lists.items()}
    return replace(s, block_count=n, **repeated)
