"""How many bytes one decoded token has to read: what bounds the speed of a machine whose memory is slower than its arithmetic.

A pure function of a file's tensors and of how many neurons fire; knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.gguf_file import TensorInfo
from runtime.structure import Structure


@dataclass(frozen=True)
class Traffic:
    """Bytes read for one token, by part."""

    ffn: float
    attention: float
    head: float
    other: float
    kv: float

    @property
    def total(self) -> float:
        """All parts together."""
        return self.ffn + self.attention + self.head + self.other + self.kv


def bytes_per_token(
    s: Structure, tensors: Mapping[str, TensorInfo], ffn: str, layer_shares: Sequence[float], kv_bytes: float = 0.0
) -> Traffic:
    """Bytes that one token reads.

    ffn: "dense" or "exact". layer_shares: share of the neurons computed, one per block. kv_bytes: keys and values read.
    """
    ffn_bytes = sum(_ffn_bytes(s, tensors, ffn, i, share) for i, share in enumerate(layer_shares))
    head = tensors["token_embd.weight" if s.tied_output else "output.weight"].nbytes
    attention = sum(t.nbytes for name, t in tensors.items() if ".attn_" in name)
    looked_up = [tensors[name] for name in ("token_embd.weight", "position_embd.weight") if name in tensors]
    other = sum(t.nbytes / t.ne[1] for t in looked_up)
    other += sum(
        t.nbytes
        for name, t in tensors.items()
        if name.startswith(("output_norm", "output_proj", "token_embd_proj")) or ".ffn_norm" in name
    )
    return Traffic(ffn=ffn_bytes, attention=attention, head=head, other=other, kv=kv_bytes)


def kv_bytes(s: Structure, n_positions: float, element_size: int) -> float:
    """Bytes of keys and values that attention reads at `n_positions` positions, all layers."""
    return 2 * s.block_count * n_positions * s.kv_length * element_size


def _ffn_bytes(s: Structure, tensors: Mapping[str, TensorInfo], ffn: str, i: int, share: float) -> float:
    def size(name: str) -> int:
        tensor = tensors.get(f"blk.{i}.ffn_{name}")
        return tensor.nbytes if tensor else 0

    biases = size("gate.bias") + size("up.bias") + size("down.bias")
    if ffn == "dense":
        return size("gate.weight") + size("up.weight") + size("down.weight") + biases
    if s.gated:
        return size("gate.weight") + share * (size("up.weight") + size("down_t.weight")) + biases
    return size("up.weight") + share * size("down_t.weight") + biases
