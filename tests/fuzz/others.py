"""Targets that are neither models nor checkpoints of safetensors: PowerInfer's files, pickles, saved chats."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from convert import pytorch
from convert.checkpoint import FLOATS
from convert.job import convert
from fuzz import mutate, mutate_gguf, mutate_json
from fuzz.bases import VOCAB, sentencepiece
from fuzz.checkpoints import FF, D
from fuzz.gguf_parts import Entry, Parts, Tensor
from fuzz.models import runs
from fuzz.worker import Target, seeded
from runtime.commands.conversation import Conversation

# --- PowerInfer ---------------------------------------------------------------------------------------------------------

RANK = 32


def _entry(key: str, value: Any) -> Entry:
    kinds = {str: 8, bool: 7, int: 4, float: 6}
    values = value if isinstance(value, list) else [value]
    kind = 5 if isinstance(value, list) and type(values[0]) is int else kinds[type(values[0])]
    forms = {4: "<u4", 5: "<i4", 6: "<f4", 7: "u1"}
    items = [v.encode() if kind == 8 else np.array(v).astype(forms[kind]).tobytes() for v in values]
    return Entry(key.encode(), kind, items, isinstance(value, list))


def powerinfer(seed: int, arch: str) -> Parts:
    """A small whole file, as PowerInfer's converter writes it."""
    rng = np.random.default_rng(seed)
    keys: dict[str, Any] = {
        "general.architecture": arch, "general.name": "x", f"{arch}.context_length": 66, f"{arch}.embedding_length": D, f"{arch}.block_count": 1,
        f"{arch}.feed_forward_length": FF, f"{arch}.attention.head_count": 2, "powerinfer.sparse_threshold": 0.5,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, D), "output_norm.weight": (D,)}
    layer: dict[str, tuple[int, ...]] = {f"attn_{part}.weight": (D, D) for part in ("q", "k", "v", "output")}
    layer |= {
        "attn_norm.weight": (D,),
        "ffn_norm.weight": (D,),
        "ffn_up.weight": (FF, D),
        "ffn_down_t.weight": (FF, D),
        "fc1.weight": (RANK, D),
        "fc2.weight": (FF, RANK),
    }
    if arch == "llama":
        keys |= {
            "llama.attention.head_count_kv": 2,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.dimension_count": 16,
            "llama.rope.freq_base": 10000.0,
        }
        shapes["output.weight"] = (VOCAB, D)
        layer["ffn_gate.weight"] = (FF, D)
    else:
        shapes |= {"position_embd.weight": (66, D), "output_norm.bias": (D,)}
        layer |= {f"attn_{part}.bias": (D,) for part in ("q", "k", "v", "output", "norm")}
        layer |= {"ffn_norm.bias": (D,), "ffn_up.bias": (FF,), "ffn_down_t.bias": (D,)}
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    keys |= {
        k: v
        for k, v in sentencepiece(VOCAB).items()
        if k.startswith("tokenizer.ggml.") and not k.endswith(("pre", "prefix", "_token"))
    }
    tensors = []
    for name, shape in shapes.items():
        kind = 0 if len(shape) == 1 or name == "position_embd.weight" else 1
        data = rng.choice(np.array([-0.25, 0.25, 1.0]), shape).astype("<f2" if kind else "<f4").tobytes()
        tensors.append(Tensor(name.encode(), list(shape[::-1]), kind, data))
    return Parts(b"PWRI", 3, [_entry(k, v) for k, v in keys.items()], tensors, 32)


def _imported(folder: Path) -> bool:
    layout = "both" if (folder / "old.powerinfer.gguf").stat().st_size % 2 else "sparse"
    convert(folder / "old.powerinfer.gguf", folder / "out/model.gguf", calibration="none", threads=1, layout=layout)
    return runs(folder / "out/model.gguf")


# --- pickles ------------------------------------------------------------------------------------------------------------


def _read_pickle(folder: Path) -> bool:
    path = folder / "pytorch_model.bin"
    for name, (_, kind) in pytorch.inspect(path).items():
        if kind in FLOATS:  # others are refused by their type
            with pytorch.open_tensor(path, name) as tensor:
                tensor[:]
    return True


def _read_bare(folder: Path) -> bool:
    pytorch.read_bare(folder / "pytorch_model.bin")
    return True


_OPCODES = b"(.0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVXY]abcdefghijlopqrstu}\x80\x81\x82\x83\x84\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95"


def pickles() -> list[bytes]:
    """Small files as torch saves them, and as it did before 1.6: that one is stored, since such files hold addresses."""
    import torch

    state = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(4, dtype=torch.bfloat16),
        "c": torch.zeros(2, dtype=torch.int64),
    }
    out = [(Path(__file__).parent / "before-torch-1.6.bin").read_bytes()]
    odd = {
        "a": torch.ones(1).expand(9, 9),
        "b": torch.eye(3).to_sparse(),
        "c": torch.empty(3, device="meta"),
        "d": torch.nn.Parameter(torch.ones(2)),
    }
    for value in (state, state["a"], {"state_dict": state, "step": 3}, odd, state | {"d": odd["d"]}):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        out.append(buffer.getvalue())
    return out


def _damaged_pickle(rng: Random, data: bytes) -> bytes:
    """Faults in the bytes, or in the pickle inside the archive with all checksums right."""
    if data[:2] != b"PK" or rng.randrange(3) == 0:
        return mutate.damaged(rng, data)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            part = old.read(name)
            if name.endswith("data.pkl") or rng.randrange(8) == 0:
                part = mutate.damaged(rng, part)
                at = rng.randrange(len(part) + 1)
                part = (
                    part
                    if rng.randrange(2)
                    else part[:at] + bytes(rng.choices(_OPCODES, k=rng.choice((1, 2, 5)))) + part[at:]
                )
            if rng.randrange(40):
                new.writestr(zipfile.ZipInfo(name if rng.randrange(40) else "../" + name), part)
    return out.getvalue()


# --- saved chats --------------------------------------------------------------------------------------------------------

CHAT = {
    "lazyneuron_conversation": 1,
    "messages": [
        {"role": role, "content": f"{role} says \U0001f600"} for role in ("system", "user", "assistant", "user")
    ],
}


def _loaded(folder: Path) -> bool:
    conversation = Conversation("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}")
    conversation.load(folder / "chat.json")
    conversation.prompt()
    conversation.save(folder / "chat.json")
    conversation.save(folder / "out/chat.json")
    return True


def other_targets(rng_of: Callable[[str, int], Random]) -> list[Target]:
    """All of them."""
    files = [powerinfer(0, "llama"), powerinfer(1, "opt")]
    saved, chat = pickles(), json.dumps(CHAT).encode()
    words = ("role", "content", "user", "system", "assistant", "messages", "lazyneuron_conversation", "tool")

    return [
        seeded(
            rng_of,
            "powerinfer",
            lambda rng: {"old.powerinfer.gguf": mutate_gguf.damaged(rng, rng.choice(files))},
            _imported,
        ),
        seeded(
            rng_of, "pickle", lambda rng: {"pytorch_model.bin": _damaged_pickle(rng, rng.choice(saved))}, _read_pickle
        ),
        seeded(
            rng_of,
            "counts",
            lambda rng: {"pytorch_model.bin": _damaged_pickle(rng, rng.choice(saved))},
            _read_bare,
            0.3,
        ),
        seeded(rng_of, "conversation", lambda rng: {"chat.json": mutate_json.damaged(rng, chat, words)}, _loaded),
    ]
