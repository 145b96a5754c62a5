"""How many bytes one decoded token has to read: what bounds the speed of a machine whose memory is slower than its arithmetic.

A pure function of a file's tensors and of how many neurons fire; knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.model_file.reader import TensorInfo
from runtime.model_file.structure import Structure


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


@dataclass(frozen=True)
class Activity:
    """Which share of each block's neurons is read. fired: up and down rows (ungated: down rows); gates: gate (up) rows."""

    ffn: str  # the mode
    fired: Sequence[float]
    gates: Sequence[float]

    @classmethod
    def uniform(cls, ffn: str, n_blocks: int, fired: float, gates: float = 1.0) -> Activity:
        """The same shares in every block."""
        return cls(ffn, [fired] * n_blocks, [gates] * n_blocks)


def bytes_per_token(
    s: Structure, tensors: Mapping[str, TensorInfo], activity: Activity, kv_bytes: float = 0.0
) -> Traffic:
    """Bytes that one token reads. kv_bytes: those of keys and values, see `kv_bytes`."""
    ffn_bytes = sum(ffn_bytes_of_block(s, tensors, activity, i) for i in range(s.block_count))
    head = tensors["token_embd.weight" if s.tied_output else "output.weight"].nbytes
    attention = sum(t.nbytes for name, t in tensors.items() if ".attn_" in name)
    looked_up = [tensors[name] for name in ("token_embd.weight", "position_embd.weight") if name in tensors]
    other = sum(t.nbytes / t.ne[1] for t in looked_up)
    always = ("output_norm", "output_proj", "token_embd_proj", "rope_freqs")
    other += sum(t.nbytes for name, t in tensors.items() if name.startswith(always) or ".ffn_norm" in name)
    return Traffic(ffn=ffn_bytes, attention=attention, head=head, other=other, kv=kv_bytes)


def kv_bytes(s: Structure, n_positions: float, element_size: int) -> float:
    """Bytes of keys and values that attention reads at `n_positions` positions, all layers."""
    return 2 * s.block_count * n_positions * s.kv_length * element_size


def ffn_bytes_of_block(s: Structure, tensors: Mapping[str, TensorInfo], activity: Activity, i: int) -> float:
    """Bytes of block `i`'s FFN, predictor included, that one token reads."""

    def size(name: str) -> int:
        tensor = tensors.get(f"blk.{i}.{name}")
        return tensor.nbytes if tensor else 0

    always = size("ffn_gate.bias") + size("ffn_up.bias") + size("ffn_down.bias")
    if activity.ffn == "dense":
        return size("ffn_gate.weight") + size("ffn_up.weight") + size("ffn_down.weight") + always
    if activity.ffn == "predicted":
        names = ("predictor_in.weight", "predictor_out.weight", "predictor_out.bias", "predictor_sign")
        always += sum(size(name) for name in names)
    first, rest = (
        ("ffn_gate.weight", ("ffn_up.weight", "ffn_down_t.weight"))
        if s.gated
        else ("ffn_up.weight", ("ffn_down_t.weight",))
    )
    return always + activity.gates[i] * size(first) + activity.fired[i] * sum(size(name) for name in rest)
