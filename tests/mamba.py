"""Tiny model files with Mamba-2 blocks, their twins for llama.cpp, and what they compute, in float64 numpy.

The reference shares no code with the runtime.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from fuzz.bases import sentencepiece

from runtime.model_file.structure import Structure
from runtime.model_file.tensor_shapes import required_tensors
from runtime.model_file.writer import NewTensor, write_gguf

Doubles = npt.NDArray[np.float64]
Weights = dict[str, npt.NDArray[np.float32]]

VOCAB, WIDTH, HEAD, FF, EPSILON = 320, 64, 16, 96, 2.0**-17
LETTERS = {"M": "Mamba", "*": "attention", "-": "an FFN"}
MISTAKES = ("gate after norm", "another group's B", "no bias of the convolution", "no D")


def structure(pattern: str, groups: int = 2, heads: int = 6, length: int = 16, state: int = 128) -> Structure:
    """A model with a block for each letter of LETTERS."""
    return Structure(
        source_architecture="test", vocab_size=VOCAB, context_length=512, embedding_length=WIDTH,
        block_count=len(pattern), feed_forward_length=tuple(FF * (c == "-") for c in pattern),
        head_count=4, head_count_kv=tuple(2 * (c == "*") for c in pattern), head_length=HEAD, norm="rms",
        norm_epsilon=EPSILON, position="rope_neox", ffn_gate="none", ffn_activation="relu2", rope_dimension_count=0,
        ssm_conv_kernel=4, ssm_state_size=state, ssm_group_count=groups, ssm_inner_size=heads * length,
        ssm_time_step_rank=tuple(heads * (c == "M") for c in pattern),
    )  # fmt: skip


def weights(s: Structure) -> Weights:
    """Random ones, by name, each [.., ne1, ne0]; the two layouts of a down projection hold the same."""
    rng = np.random.default_rng(zlib.crc32(str(s).encode()))
    made = {name: _random(rng, name, shape) for name, shape in required_tensors(s).items()}
    for name in [name for name in made if name.endswith("ffn_down_t.weight")]:
        made[name.replace("down_t", "down")] = np.ascontiguousarray(made[name].T)
    return made


def predicted(s: Structure, tensors: Weights, rank: int) -> tuple[Structure, Weights]:
    """The same with a predictor in each FFN: what is nearest to its up rows, of that rank; perfect with WIDTH."""
    ranks = tuple(rank * (n > 0) for n in s.each("feed_forward_length"))
    s = replace(s, predictor="lowrank", predictor_rank=ranks, predictor_error=(1.0,) * s.block_count)
    more: Weights = {}
    for i in s.ffns:
        u, sizes, v = np.linalg.svd(tensors[f"blk.{i}.ffn_up.weight"], full_matrices=False)
        more[f"blk.{i}.predictor_in.weight"] = np.ascontiguousarray(v[:rank])
        more[f"blk.{i}.predictor_out.weight"] = np.ascontiguousarray(u[:, :rank] * sizes[:rank])
        more[f"blk.{i}.predictor_out.bias"] = np.zeros(FF, np.float32)
    return s, tensors | more


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    x = rng.normal(size=shape[::-1])
    if "norm" in name:
        x = 1 + 0.3 * x
    elif name.endswith("ssm_a"):
        x = -np.exp(0.5 * x)
    elif name.endswith("ssm_d") or len(shape) == 1:
        x = 0.5 * x
    else:
        x *= 0.8 if "token_embd" in name else 1.4 / np.sqrt(shape[0])
    return x.astype(np.float32)


def write(path: Path, s: Structure, tensors: Weights) -> None:
    """Our own file."""
    write_gguf(path, s.to_metadata() | sentencepiece(VOCAB), _new(tensors, dict(required_tensors(s))))


def write_stock(path: Path, s: Structure, tensors: Weights) -> None:
    """The same for llama.cpp's `nemotron_h`."""
    arch = "nemotron_h"
    keys = {
        "vocab_size": s.vocab_size, "context_length": s.context_length, "embedding_length": s.embedding_length,
        "block_count": s.block_count, "feed_forward_length": list(s.each("feed_forward_length")),
        "attention.head_count": s.head_count, "attention.head_count_kv": list(s.each("head_count_kv")),
        "attention.key_length": HEAD, "attention.value_length": HEAD, "attention.layer_norm_rms_epsilon": EPSILON,
        "attention.layer_norm_epsilon": EPSILON, "ssm.conv_kernel": s.ssm_conv_kernel,
        "ssm.state_size": s.ssm_state_size, "ssm.group_count": s.ssm_group_count, "ssm.inner_size": s.ssm_inner_size,
        "ssm.time_step_rank": max(s.each("ssm_time_step_rank")), "rope.dimension_count": HEAD,
    }  # fmt: skip
    shapes = {
        name.replace("ffn_norm", "attn_norm"): shape
        for name, shape in required_tensors(s).items()
        if "ffn_down_t" not in name
    }
    stock = {name.replace("ffn_norm", "attn_norm"): tensor for name, tensor in tensors.items()}
    metadata = {f"{arch}.{key}": value for key, value in keys.items()} | sentencepiece(VOCAB)
    write_gguf(path, metadata, _new(stock, shapes), arch)


def _new(tensors: Weights, shapes: dict[str, tuple[int, ...]]) -> list[NewTensor]:
    flat = {name: np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8) for name in shapes}
    return [NewTensor(name, shape, 0, flat[name].nbytes, [flat[name]]) for name, shape in shapes.items()]


def logits(s: Structure, tensors: Weights, ids: list[int], mistake: str = "") -> Doubles:
    """After each of `ids`: [len(ids), VOCAB]. mistake: one of MISTAKES, to see that it would be found."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    x = w["token_embd.weight"][ids]
    for i in range(s.block_count):
        b = {name.removeprefix(f"blk.{i}."): tensor for name, tensor in w.items() if name.startswith(f"blk.{i}.")}
        if "ssm_a" in b:
            x = x + _mamba(_norm(x) * b["attn_norm.weight"], b, s, mistake)
        elif "attn_q.weight" in b:
            x = x + _attention(_norm(x) * b["attn_norm.weight"], b)
        else:
            h = np.maximum(_norm(x) * b["ffn_norm.weight"] @ b["ffn_up.weight"].T, 0) ** 2
            x = x + h @ b["ffn_down_t.weight"]
    return head(x, tensors)


def head(x: Doubles, tensors: Weights) -> Doubles:
    """Logits of hidden states."""
    return np.asarray(_norm(x) * tensors["output_norm.weight"] @ tensors["output.weight"].T)


def _norm(x: Doubles) -> Doubles:
    return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON))


def _silu(x: Doubles) -> Doubles:
    return np.asarray(x / (1 + np.exp(-x)))


def _attention(x: Doubles, b: dict[str, Doubles]) -> Doubles:
    n = len(x)
    q, k, v = ((x @ b[f"attn_{part}.weight"].T).reshape(n, -1, HEAD) for part in "qkv")
    k, v = (np.repeat(part, q.shape[1] // k.shape[1], axis=1) for part in (k, v))
    scores = np.einsum("qhe,khe->hqk", q, k) / np.sqrt(HEAD) + np.where(np.tri(n) > 0, 0, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return np.einsum("hqk,khe->qhe", shares, v).reshape(n, -1) @ b["attn_output.weight"].T


def _mamba(x: Doubles, b: dict[str, Doubles], s: Structure, mistake: str) -> Doubles:
    inner, groups, state = s.ssm_inner_size, s.ssm_group_count, s.ssm_state_size
    heads, n = b["ssm_dt.bias"].size, len(x)
    made = x @ b["ssm_in.weight"].T
    z, rest, steps = made[:, :inner], made[:, inner:-heads], made[:, -heads:]
    padded = np.vstack([np.zeros((s.ssm_conv_kernel - 1, rest.shape[1])), rest])
    seen = np.stack([(padded[t : t + s.ssm_conv_kernel] * b["ssm_conv1d.weight"].T).sum(0) for t in range(n)])
    seen = _silu(seen if mistake == MISTAKES[2] else seen + b["ssm_conv1d.bias"])
    values = seen[:, :inner].reshape(n, heads, -1)
    before, after = seen[:, inner:].reshape(n, 2, groups, state).swapaxes(0, 1)
    steps = np.log1p(np.exp(steps + b["ssm_dt.bias"]))
    y = np.zeros_like(values)
    for h in range(heads):
        g = h // (heads // groups)
        memory = np.zeros((values.shape[2], state))
        for t in range(n):
            key = before[t, (g + 1) % groups if mistake == MISTAKES[1] else g]
            memory = np.exp(steps[t, h] * b["ssm_a"].ravel()[h]) * memory + steps[t, h] * np.outer(values[t, h], key)
            y[t, h] = memory @ after[t, g]
    if mistake != MISTAKES[3]:
        y = y + b["ssm_d"].ravel()[:, None] * values
    y, weight = y.reshape(n, groups, -1), b["ssm_norm.weight"].reshape(groups, -1)
    gate = _silu(z).reshape(n, groups, -1)
    y = _norm(y) * weight * gate if mistake == MISTAKES[0] else _norm(y * gate) * weight
    return y.reshape(n, inner) @ b["ssm_out.weight"].T
