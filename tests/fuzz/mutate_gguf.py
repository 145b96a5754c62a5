"""Damage to GGUF files that knows their structure: keys, types, counts, texts, tensors' shapes, places and numbers."""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random

from fuzz import mutate
from fuzz.gguf_parts import BLOCKS, SCALARS, STRING, Entry, Parts, Tensor, build, header
from runtime.bindings.ffn_shape import GATINGS, ROUTER_TAPS
from runtime.model_file import structure

WORDS = tuple(
    dict.fromkeys([
        *structure.NORMS, *structure.NORM_PLACEMENTS, *structure.POSITIONS, *structure.ROPE_SCALINGS, *structure.RESIDUALS,
        *structure.QK_NORMS, *structure.GATES, *structure.ACTIVATIONS, *structure.LAYOUTS, *structure.NEURON_ORDERS,
        *structure.PREDICTOR_KINDS, *structure.PREDICTOR_TAPS, *GATINGS, *ROUTER_TAPS, "llama", "gpt2", "bert", "t5", "rwkv", "plamo2", "none", "default",
        "llama-bpe", "gpt-2", "qwen2", "falcon", "smollm", "jais-2", "lazyneuron",
    ])
)  # fmt: skip
# Keys that some file may have: libllama reads more of them than our files hold.
KEYS = (
    "tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.padding_token_id", "tokenizer.ggml.seperator_token_id",
    "tokenizer.ggml.mask_token_id", "tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.eog_token_ids", "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.remove_extra_whitespaces",
    "tokenizer.ggml.token_type_count", "tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.ggml.token_type",
    "tokenizer.ggml.suppress_tokens", "tokenizer.huggingface.json", "tokenizer.chat_template", "general.alignment", "split.no", "split.count",
    "split.tensors.count", "lazyneuron.schema_version", "llama.vocab_size", "llama.block_count", "llama.context_length",
    "lazyneuron.context_length", "lazyneuron.vocab_size", "lazyneuron.rope.scaling.factor", "lazyneuron.tied_output", "general.name",
    "lazyneuron.expert_count", "lazyneuron.expert_used_count", "lazyneuron.expert_bias", "lazyneuron.expert_gating_func",
    "lazyneuron.expert_weights_norm", "lazyneuron.expert_weights_scale", "lazyneuron.router.tap",
    "lazyneuron.attention.sliding_window", "lazyneuron.attention.sliding_window_pattern", "lazyneuron.feed_forward_length",
)  # fmt: skip


def scalar(rng: Random, kind: int) -> bytes:
    """A number of a GGUF type, at a border."""
    form = SCALARS[kind]
    if form in ("<f", "<d"):
        value = mutate.real(rng)
        try:
            return struct.pack(form, value)
        except OverflowError:
            return struct.pack(form, float("inf"))
    size = struct.calcsize(form)
    return (mutate.whole(rng) & (1 << 8 * size) - 1).to_bytes(size, "little")


def item(rng: Random, kind: int) -> bytes:
    """A value of a GGUF type."""
    if kind != STRING:
        return scalar(rng, kind)
    return (
        mutate.text(rng, WORDS).encode("utf-8", "surrogatepass")
        if rng.randrange(5)
        else rng.randbytes(rng.randrange(8))
    )


def _any_kind(rng: Random) -> int:
    return rng.choice((*SCALARS, STRING))


# --- keys -------------------------------------------------------------------------------------------------------------


def _entry(rng: Random, p: Parts) -> Entry:
    """A key, more often one of the structure's or one with many values."""
    named = [e for e in p.entries if e.key.startswith(b"lazyneuron.")] if rng.randrange(2) else p.entries
    return rng.choice(named or p.entries)


def value(rng: Random, p: Parts) -> None:
    e = _entry(rng, p)
    if e.items:
        e.items = list(e.items)
        e.items[rng.randrange(len(e.items))] = item(rng, e.kind)


def nudge(rng: Random, p: Parts) -> None:
    """A number a little larger or smaller, a text with one byte changed."""
    e = _entry(rng, p)
    if not e.items:
        return
    i, e.items = rng.randrange(len(e.items)), list(e.items)
    if e.kind == STRING or e.kind in (6, 12):
        e.items[i] = mutate.flip(rng, e.items[i]) if e.items[i] else b"x"
    else:
        size = len(e.items[i])
        e.items[i] = (int.from_bytes(e.items[i], "little") + rng.choice((-1, 1)) & (1 << 8 * size) - 1).to_bytes(
            size, "little"
        )


def retype(rng: Random, p: Parts) -> None:
    e = _entry(rng, p)
    e.kind = _any_kind(rng)
    e.items = [item(rng, e.kind) for _ in e.items[:400]]
    if rng.randrange(4) == 0:
        e.array = not e.array
        e.items = e.items if e.array else [item(rng, e.kind)]


def drop_key(rng: Random, p: Parts) -> None:
    if p.entries:
        p.entries.remove(_entry(rng, p))


def add_key(rng: Random, p: Parts) -> None:
    kind, array = _any_kind(rng), not rng.randrange(4)
    key = rng.choice(KEYS) if rng.randrange(4) else mutate.text(rng)
    items = [item(rng, kind) for _ in range(rng.choice((0, 1, 2, 300)) if array else 1)]
    e = Entry(key.encode("utf-8", "surrogatepass"), kind, items, array)
    if rng.randrange(2):
        p.entries = [old for old in p.entries if old.key != e.key]
    p.entries.insert(rng.randrange(len(p.entries) + 1), e)


def rename_key(rng: Random, p: Parts) -> None:
    e, other = _entry(rng, p), rng.choice(p.entries)
    e.key = rng.choice((other.key, mutate.flip(rng, e.key) if e.key else b"", e.key + b"\0", b"", e.key[:-1]))


def swap_values(rng: Random, p: Parts) -> None:
    a = _entry(rng, p)
    b = rng.choice([e for e in p.entries if (e.kind, e.array) == (a.kind, a.array)])
    a.items, b.items = b.items, a.items


def length(rng: Random, p: Parts) -> None:
    """An array cut, grown, or of another count than it has."""
    arrays = [e for e in p.entries if e.array]
    if not arrays:
        return
    e, kind = rng.choice(arrays), rng.randrange(5)
    if kind == 0:
        e.items = e.items[: rng.randrange(len(e.items) + 1)]
    elif kind == 1:
        e.items = e.items + [item(rng, e.kind) for _ in range(rng.choice((1, 1, 2, 50)))]
    elif kind == 2:
        e.count = mutate.whole(rng) if rng.randrange(4) == 0 else None
    elif kind == 3:
        e.items = []
    else:
        e.items = e.items * rng.choice((2, 3, 40))


def permute(rng: Random, p: Parts) -> None:
    """Two items of an array change places, or one stands twice."""
    arrays = [e for e in p.entries if e.array and len(e.items) > 1]
    if arrays:
        e = rng.choice(arrays)
        e.items = list(e.items)
        i, j = rng.randrange(len(e.items)), rng.randrange(len(e.items))
        e.items[i], e.items[j] = (e.items[j], e.items[i]) if rng.randrange(2) else (e.items[i], e.items[i])


def counts(rng: Random, p: Parts) -> None:
    kind = rng.randrange(4)
    if kind == 0:
        p.n_entries = rng.choice((mutate.whole(rng), len(p.entries) + rng.choice((-1, 1))))
    elif kind == 1:
        p.n_tensors = rng.choice((mutate.whole(rng), len(p.tensors) + rng.choice((-1, 1))))
    elif kind == 2:
        p.version = mutate.whole(rng)
    else:
        p.alignment = rng.choice((1, 2, 4, 8, 16, 32, 64, 128, 4096))


# --- tensors ----------------------------------------------------------------------------------------------------------


def shape(rng: Random, p: Parts) -> None:
    t, kind = rng.choice(p.tensors), rng.randrange(5)
    t.ne = list(t.ne)
    if kind == 0 and t.ne:
        t.ne[rng.randrange(len(t.ne))] = mutate.whole(rng)
    elif kind == 1:
        t.ne.reverse()
    elif kind == 2:
        t.ne.append(rng.choice((1, 1, 2, 0)))
    elif kind == 3:
        t.n_dims = mutate.whole(rng)
    elif t.ne:
        t.ne[-1] += rng.choice((-1, 1))


def tensor_type(rng: Random, p: Parts) -> None:
    t = rng.choice(p.tensors)
    t.kind = rng.choice((*BLOCKS, *range(43), -1, 43, 1 << 30))
    if rng.randrange(2) and t.kind in BLOCKS:  # as many bytes as the type wants
        n, (elements, nbytes) = 1, BLOCKS[t.kind]
        for extent in t.ne:
            n *= extent
        size = min(n // elements * nbytes, 1 << 18)
        t.data = (t.data * (size // max(1, len(t.data)) + 1))[:size]


def place(rng: Random, p: Parts) -> None:
    """Another offset: of a neighbour, at a border, or not aligned."""
    t = rng.choice(p.tensors)
    t.offset = rng.choice((mutate.whole(rng), 0, p.alignment * rng.randrange(2000), rng.randrange(200_000)))


def tensor_name(rng: Random, p: Parts) -> None:
    a, b = rng.choice(p.tensors), rng.choice(p.tensors)
    kind = rng.randrange(3)
    if kind == 0:
        a.name, b.name = b.name, a.name
    elif kind == 1:
        a.name = rng.choice(
            (b.name, b"", a.name + b"\0", a.name * 3, mutate.text(rng).encode("utf-8", "surrogatepass"))
        )
    else:
        a.name = mutate.flip(rng, a.name) if a.name else b"a"


def drop_tensor(rng: Random, p: Parts) -> None:
    if len(p.tensors) > 1:
        p.tensors.remove(rng.choice(p.tensors))


def add_tensor(rng: Random, p: Parts) -> None:
    t = rng.choice(p.tensors)
    name = rng.choice((t.name, t.name + b".x", b"extra"))
    p.tensors.insert(rng.randrange(len(p.tensors) + 1), Tensor(name, list(t.ne), t.kind, t.data))


_FLOATS = {0: ("<f", 4), 1: ("<e", 2), 30: ("<f", 2)}


def _sane(rng: Random, t: Tensor) -> bytes:
    """Numbers with which a model can still compute: random bytes are NaN or very large somewhere."""
    form, width = _FLOATS[t.kind]
    few = b"".join(struct.pack(form, rng.choice((-1, 1)) * 2.0 ** rng.randrange(-14, 3))[-width:] for _ in range(16))
    return (few * (len(t.data) // len(few) + 1))[: len(t.data)]


def numbers(rng: Random, p: Parts) -> None:
    """A tensor's bytes: random, one NaN or infinity, all the same, or an index or figure at a border."""
    small = [
        t
        for t in p.tensors
        if any(part in t.name for part in (b"neuron", b"predictor", b"expert", b"exp_probs", b"gate_inp"))
    ]
    t = rng.choice(small) if small and rng.randrange(2) else rng.choice(p.tensors)
    kind = rng.randrange(6)
    if len(t.data) < 8:
        return
    if kind == 0:
        t.data = rng.randbytes(len(t.data)) if t.kind not in _FLOATS or rng.randrange(4) == 0 else _sane(rng, t)
    elif kind == 1:
        t.data = bytes([rng.choice((0, 255, 127, 128))]) * len(t.data)
    elif kind == 2 and t.kind in _FLOATS:
        form, width = _FLOATS[t.kind]
        new = struct.pack(form, rng.choice((float("nan"), float("inf"), float("-inf"), 6e4, -1.0, 0.0)))[-width:]
        at = rng.randrange(len(t.data) // width) * width
        t.data = t.data[:at] + new + t.data[at + width :]
    elif kind == 3 and t.kind == 26:
        at = rng.randrange(len(t.data) // 4) * 4
        t.data = t.data[:at] + scalar(rng, 5) + t.data[at + 4 :]
    elif kind == 4:
        t.data = mutate.splice(rng, t.data)[: len(t.data)].ljust(len(t.data), b"\0")
    else:
        t.data = mutate.overwrite(rng, t.data)[: len(t.data)]


def tensor_size(rng: Random, p: Parts) -> None:
    t = rng.choice(p.tensors)
    t.data = rng.choice((b"", t.data[: rng.randrange(len(t.data) + 1)], t.data * 2))


Change = Callable[[Random, Parts], None]
KEY_CHANGES: tuple[Change, ...] = (
    value,
    value,
    value,
    nudge,
    nudge,
    retype,
    drop_key,
    add_key,
    add_key,
    rename_key,
    swap_values,
    length,
    permute,
    permute,
)
TENSOR_CHANGES: tuple[Change, ...] = (shape, tensor_type, place, tensor_name, drop_tensor, add_tensor, tensor_size)


def damaged(rng: Random, p: Parts, keys: int = 6) -> bytes:
    """The file with one to three faults. keys: how often in one of its keys, beside 3 in its counts and tensors, in twenty; the rest are in numbers."""
    p = p.copy()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.randrange(20)
        if kind < 1:
            counts(rng, p)
        elif kind < 3:
            rng.choice(TENSOR_CHANGES)(rng, p) if p.tensors else None
        elif kind < 3 + keys:
            rng.choice(KEY_CHANGES)(rng, p) if p.entries else None
        elif p.tensors:
            numbers(rng, p)
    data = build(p)
    if rng.randrange(12) == 0:
        data = mutate.damaged(rng, data, len(header(p)))
    return data
