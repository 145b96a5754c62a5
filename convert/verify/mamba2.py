"""What a Mamba-2 mixer computes between its two projections, token by token in plain numpy.

Shares no arithmetic with the runtime, and takes the tensors as a checkpoint has them.
Source: Dao and Gu, "Transformers are SSMs" (arXiv:2405.21060); the gate comes before the norm, as in Nemotron-H.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Mamba2Weights:
    """One mixer's own. conv: [channels, length], the last column for the present token; conv_bias: [channels]; dt_bias,
    a_log, d: [heads]; norm: [heads * head_length].
    """

    conv: Floats
    conv_bias: Floats
    dt_bias: Floats
    a_log: Floats
    d: Floats
    norm: Floats


def mix(projected: Floats, w: Mamba2Weights, groups: int, state: int, epsilon: float) -> Floats:
    """What the output projection is given, [n_tokens, heads * head_length], of one sequence from its first token on.

    projected: of the input projection, [n_tokens, z + x + B + C + dt] (channels of the convolution: x, B and C; dt: one
    for each head). groups: heads beside each other with one B and C, and elements with one norm; state: elements of
    B and C in each.
    """
    n, inner, heads = len(projected), len(w.norm), len(w.d)
    z, convolved, dt = np.split(projected, [inner, inner + len(w.conv)], axis=1)
    x, b, c = np.split(_convolution(convolved, w), [inner, inner + groups * state], axis=1)
    x = x.reshape(n, heads, -1)
    b, c = (np.repeat(part.reshape(n, groups, state), heads // groups, axis=1) for part in (b, c))
    step = np.logaddexp(np.float32(0), dt + w.dt_bias)
    kept = np.exp(-np.exp(w.a_log) * step)
    memory, y = np.zeros((*x.shape[1:], state), np.float32), np.empty_like(x)
    for t in range(n):
        memory = kept[t, :, None, None] * memory + (step[t, :, None] * x[t])[:, :, None] * b[t, :, None, :]
        y[t] = (memory * c[t, :, None, :]).sum(-1) + w.d[:, None] * x[t]
    gated = (y.reshape(n, inner) * _silu(z)).reshape(n, groups, -1)
    scale = np.sqrt((gated**2).mean(-1, keepdims=True) + np.float32(epsilon))
    return np.asarray((gated / scale).reshape(n, inner) * w.norm, np.float32)


def _convolution(x: Floats, w: Mamba2Weights) -> Floats:
    """Each channel with its own few weights, over the present token and those before it."""
    length = w.conv.shape[1]
    before = np.concatenate([np.zeros((length - 1, x.shape[1]), np.float32), x])
    return _silu(sum((before[k : k + len(x)] * w.conv[:, k] for k in range(length)), w.conv_bias[None]))


def _silu(x: Floats) -> Floats:
    return np.asarray(x / (1 + np.exp(-x)), np.float32)
