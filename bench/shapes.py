"""Shapes of published models, as structures without weights."""

from __future__ import annotations

from dataclasses import replace

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


SHAPES = {
    "mistral-7b": _gated(4096, 14336, 32, 32, 8),
    "llama-2-7b": _gated(4096, 11008, 32, 32, 32),
    "opt-6.7b": _ungated(4096, 16384, 32, 32),
    "tiny": _gated(256, 1024, 4, 4, 2, vocab=512),
    "tiny-opt": _ungated(256, 1024, 4, 4, vocab=512),
}


def shape(name: str, layers: int | None = None) -> Structure:
    """The structure of that name, with `layers` blocks instead of its own number.

    Raises UserError for an unknown one.
    """
    if name not in SHAPES:
        raise UserError(f"--shape: `{name}`, expected one of {', '.join(SHAPES)}")
    if layers is not None and not 1 <= layers <= 1000:
        raise UserError(f"--layers: {layers}, expected 1 to 1000")
    s = SHAPES[name]
    return replace(s, block_count=layers or s.block_count)
