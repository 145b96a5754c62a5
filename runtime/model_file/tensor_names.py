"""The names of a file's tensors: spelt here, and nowhere else. docs/format.md says what each of them is.

A block's tensor is `blk.N.` and its short name: a stem such as `ffn_up`, with `.weight` or `.bias` behind it where
there are both.
"""

from __future__ import annotations

import re

from runtime.bindings.ffn_shape import FfnShape

TOKEN_EMBD, TOKEN_EMBD_PROJ, TOKEN_EMBD_NORM = "token_embd", "token_embd_proj", "token_embd_norm"
POSITION_EMBD, ROPE_FREQS = "position_embd", "rope_freqs"
OUTPUT_NORM, OUTPUT_PROJ, OUTPUT = "output_norm", "output_proj", "output"

ATTN_NORM, ATTN_Q, ATTN_K, ATTN_V, ATTN_OUTPUT = "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"
ATTN_Q_NORM, ATTN_K_NORM, ATTN_SUB_NORM = "attn_q_norm", "attn_k_norm", "attn_sub_norm"
FFN_NORM, FFN_GATE, FFN_UP, FFN_DOWN, FFN_DOWN_T = "ffn_norm", "ffn_gate", "ffn_up", "ffn_down", "ffn_down_t"
NEURON_INDEX, NEURON_FREQ = "ffn_neuron_index", "ffn_neuron_freq"
PREDICTOR_IN, PREDICTOR_OUT, PREDICTOR_SIGN = "predictor_in", "predictor_out", "predictor_sign"

_BLOCK = re.compile(r"blk\.(\d+)\.(.*)")


def weight(stem: str) -> str:
    """A matrix, or the factors of a norm."""
    return f"{stem}.weight"


def bias(stem: str) -> str:
    """What is added behind the matrix or norm of that stem."""
    return f"{stem}.bias"


def in_block(i: int | str, short: str) -> str:
    """The full name of a tensor of block `i`; "{i}" in the converter's tables."""
    return f"blk.{i}.{short}"


def weight_of(i: int, stem: str) -> str:
    """A matrix of block `i`, or the factors of its norm."""
    return in_block(i, weight(stem))


def bias_of(i: int, stem: str) -> str:
    """A bias of block `i`."""
    return in_block(i, bias(stem))


def parsed(name: str) -> tuple[int, str] | None:
    """Block and short name of a block's tensor; None for one of no block."""
    found = _BLOCK.fullmatch(name)
    return (int(found[1]), found[2]) if found else None


def row_matrices(ffn: FfnShape) -> tuple[str, ...]:
    """Stems of the matrices that have a row for each neuron: first the one that decides which fire, then those read of
    these.
    """
    return (FFN_GATE, FFN_UP, FFN_DOWN_T) if ffn.gated else (FFN_UP, FFN_DOWN_T)


ATTENTION_MATRICES = (ATTN_Q, ATTN_K, ATTN_V, ATTN_OUTPUT)
FFN_MATRICES = (FFN_GATE, FFN_UP, FFN_DOWN)  # what ggml multiplies with

# Of an FFN, what has neurons as its rows (vectors: as its elements), in the matrices that every file has.
NEURON_ROWS = (weight(FFN_GATE), bias(FFN_GATE), weight(FFN_UP), bias(FFN_UP), weight(FFN_DOWN_T))
# And what has them as its columns.
NEURON_COLUMNS = (weight(FFN_DOWN),)
# Of a predictor, what has neurons as its rows or elements.
PREDICTOR_ROWS = (weight(PREDICTOR_OUT), bias(PREDICTOR_OUT), PREDICTOR_SIGN)
