"""The names of a file's tensors: spelt here, and nowhere else. docs/format.md says what each of them is.

A block's tensor is `blk.N.` and its short name: a stem such as `ffn_up`, with `.weight` or `.bias` behind it where
there are both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from runtime.bindings.ffn_shape import FfnShape

TOKEN_EMBD, TOKEN_EMBD_PROJ, TOKEN_EMBD_NORM = "token_embd", "token_embd_proj", "token_embd_norm"
POSITION_EMBD, ROPE_FREQS = "position_embd", "rope_freqs"
OUTPUT_NORM, OUTPUT_PROJ, OUTPUT = "output_norm", "output_proj", "output"

ATTN_NORM, ATTN_Q, ATTN_K, ATTN_V, ATTN_OUTPUT = "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"
ATTN_Q_NORM, ATTN_K_NORM, ATTN_SUB_NORM = "attn_q_norm", "attn_k_norm", "attn_sub_norm"
SSM_IN, SSM_CONV, SSM_DT, SSM_A, SSM_D = "ssm_in", "ssm_conv1d", "ssm_dt", "ssm_a", "ssm_d"
SSM_NORM, SSM_OUT = "ssm_norm", "ssm_out"
FFN_NORM, FFN_GATE, FFN_UP, FFN_DOWN, FFN_DOWN_T = "ffn_norm", "ffn_gate", "ffn_up", "ffn_down", "ffn_down_t"
FFN_BUNDLE = "ffn_neurons"
NEURON_INDEX, NEURON_FREQ = "ffn_neuron_index", "ffn_neuron_freq"
PREDICTOR_IN, PREDICTOR_OUT, PREDICTOR_SIGN = "predictor_in", "predictor_out", "predictor_sign"
LATENT_DOWN, LATENT_UP = "ffn_latent_down", "ffn_latent_up"
ROUTER, ROUTER_BIAS, EXPERT_FREQ = "ffn_gate_inp", "exp_probs_b", "expert_freq"


@dataclass(frozen=True)
class Stems:
    """The stems of the tensors over an FFN's neurons; where these are divided into experts, with one more dimension."""

    gate: str = FFN_GATE
    up: str = FFN_UP
    down: str = FFN_DOWN
    down_t: str = FFN_DOWN_T
    bundle: str = FFN_BUNDLE  # its bare name is the tensor's: rows of several matrices side by side
    index: str = NEURON_INDEX
    freq: str = NEURON_FREQ
    predictor_out: str = PREDICTOR_OUT
    predictor_sign: str = PREDICTOR_SIGN

    @property
    def matrices(self) -> tuple[str, ...]:
        """What ggml multiplies with."""
        return self.gate, self.up, self.down


def of_experts(short: str) -> str:
    """The name of a tensor over an FFN's neurons where these are divided into experts, from its usual name."""
    stem, dot, part = short.partition(".")
    return f"{stem}_exps{dot}{part}"


_WHOLE = Stems()
_EXPERTS = Stems(**{f: of_experts(stem) for f, stem in vars(_WHOLE).items()})
_SHARED = Stems(**{f: f"{stem}_shexp" for f, stem in vars(_WHOLE).items()})


def stems(ffn: FfnShape) -> Stems:
    """The stems of an FFN's tensors."""
    if ffn.shared:
        return _SHARED
    return _EXPERTS if ffn.experts else _WHOLE


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
    s = stems(ffn)
    return (s.gate, s.up, s.down_t) if ffn.gated else (s.up, s.down_t)


ATTENTION_MATRICES = (ATTN_Q, ATTN_K, ATTN_V, ATTN_OUTPUT)
MAMBA_MATRICES = (SSM_IN, SSM_OUT)
# Of a Mamba mixer, what is no matrix to multiply tokens with, although it has two dimensions.
MAMBA_NUMBERS = (weight(SSM_CONV), SSM_A, SSM_D, weight(SSM_NORM))
_BOTH = (_WHOLE, _EXPERTS)

# Of an FFN, what has neurons as its rows (vectors: as its elements), in the matrices that every file has.
NEURON_ROWS = tuple(
    name for s in _BOTH for name in (weight(s.gate), bias(s.gate), weight(s.up), bias(s.up), weight(s.down_t))
)
# And what has them as its columns.
NEURON_COLUMNS = tuple(weight(s.down) for s in _BOTH)
# Of a predictor, what has neurons as its rows or elements.
PREDICTOR_BIASES = tuple(bias(s.predictor_out) for s in _BOTH)
SIGNS = tuple(s.predictor_sign for s in _BOTH)
PREDICTOR_ROWS = (*(weight(s.predictor_out) for s in _BOTH), *PREDICTOR_BIASES, *SIGNS)
MULTIPLIED = tuple(f"{stem}." for s in _BOTH for stem in s.matrices)  # beginnings: matrices for ggml, and their biases
# What says how often neurons fire, and what they were.
INDICES = tuple(s.index for s in _BOTH)
NEURON_NOTES = (*(name for s in _BOTH for name in (s.index, s.freq)), EXPERT_FREQ)
TRANSPOSED = tuple(weight(s.down_t) for s in (*_BOTH, _SHARED))  # down projections with a row for each neuron
SHARED_MATRICES = tuple(weight(stem) for stem in _SHARED.matrices)  # of a shared expert, what ggml multiplies with
LATENTS = (weight(LATENT_DOWN), weight(LATENT_UP))  # what makes experts' input of the FFN's, and the reverse
ROUTERS = (weight(ROUTER), bias(ROUTER_BIAS))  # what chooses experts
