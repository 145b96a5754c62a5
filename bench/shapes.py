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


# What the blocks are, by NVIDIA's letters: M Mamba-2, * attention, - an FFN, E experts.
_NANO_9B_V2 = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
_NANO_3_30B = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


def _nemotron_h(
    pattern: str, d: int, ff: int, heads: int, heads_kv: int, mamba: tuple[int, int], head_length: int = 128,
    vocab: int = 131072, shared: int = 0, experts: tuple[int, int] = (0, 0),
) -> Structure:  # fmt: skip
    """RMSNorm, blocks of one half each, an ungated FFN of squared ReLU. mamba: heads, their length; experts: how many
    there are, and a token uses; shared: neurons that every token uses beside these.
    """

    def of(letter: str, value: int) -> tuple[int, ...]:
        return tuple(value * (c == letter) for c in pattern)

    neurons = "E" if experts[0] else "-"
    return Structure(
        source_architecture=_SOURCE,
        vocab_size=vocab,
        context_length=8192,
        embedding_length=d,
        block_count=len(pattern),
        head_count=heads,
        head_count_kv=of("*", heads_kv),
        head_length=head_length,
        norm="rms",
        norm_epsilon=1e-5,
        position="rope_neox",
        rope_dimension_count=0,
        ffn_gate="none",
        ffn_activation="relu2",
        feed_forward_length=of(neurons, ff),
        expert_count=of("E", experts[0]),
        expert_used_count=of("E", experts[1]),
        expert_shared_feed_forward_length=of("E", shared),
        expert_gating="sigmoid" if experts[0] else "softmax",
        expert_bias=experts[0] > 0,
        expert_weights_norm=experts[0] > 0,
        expert_weights_scale=2.5 if experts[0] else 1.0,
        ssm_conv_kernel=4,
        ssm_state_size=128,
        ssm_group_count=8,
        ssm_inner_size=mamba[0] * mamba[1],
        ssm_time_step_rank=of("M", mamba[0]),
    )


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
    "nemotron-nano-9b-v2": _nemotron_h(_NANO_9B_V2, 4480, 15680, 40, 8, (128, 80)),
    "nemotron-3-nano-30b-a3b": _nemotron_h(_NANO_3_30B, 2688, 1856, 32, 2, (64, 64), shared=3712, experts=(128, 6)),
    "tiny-nemotron-h": _nemotron_h("M-*M-", 256, 1024, 4, 2, (8, 32), 64, vocab=512),
    "tiny-nemotron-3": _nemotron_h("ME*EM", 256, 192, 4, 2, (8, 32), 64, vocab=512, shared=320, experts=(8, 2)),
    "tiny-mixtral": _mixtral(_gated(256, 256, 3, 4, 2, vocab=512)),
}
# Those that have an FFN in every block, and no experts.
WITHOUT_EXPERTS = [name for name, s in SHAPES.items() if len(s.ffns) == s.block_count and not s.ffns[0].experts]


def shape(name: str, layers: int | None = None, experts: int | None = None) -> Structure:
    """The structure of that name, with `layers` blocks, and `experts` in each that has any, instead of its own number.

    A token uses as many of them as before. Raises UserError for an unknown one, and for fewer than a token uses.
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
    found = replace(s, block_count=n, **repeated)
    return found if experts is None else _with_experts(found, name, experts)


def _with_experts(s: Structure, name: str, count: int) -> Structure:
    used = max(s.each("expert_used_count"))
    if not used or not used <= count <= max(s.each("expert_count")):
        most = f"{used} to {max(s.each('expert_count'))}" if used else "none: this shape has no experts"
        raise UserError(f"--experts: {count} in `{name}`, expected {most}")
    return replace(s, expert_count=tuple(count * (n > 0) for n in s.each("expert_count")))
