"""What mixes the tokens of a block: one file for each kind, and here the table of kinds.

A new kind is a frozen value beside `Attention` (runtime/model_file/structure.py), its tensors (tensor_shapes.py), a
class in a file here, and its row below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from runtime.bindings import ggml
from runtime.compute.builder import Builder
from runtime.compute.mixers.attention import AttentionMixer
from runtime.compute.mixers.mamba2 import Mamba2Mixer
from runtime.model_file.structure import Attention, Mamba2


class Mixer(Protocol):
    """One block's mixer in one graph."""

    norm: str  # stem of the norm that belongs to it

    def mixed(self, x: ggml.TensorP) -> ggml.TensorP:
        """What is added to the residual stream: [n_embd, n_tokens] -> as long."""
        ...


_Kind = Callable[[Builder, Any, int], Mixer]
KINDS: dict[type, _Kind] = {Attention: AttentionMixer, Mamba2: Mamba2Mixer}


def mixer_of(b: Builder, i: int) -> Mixer | None:
    """The mixer of block `i`, None where it has none."""
    shape = b.s.blocks[i].mixer
    return None if shape is None else KINDS[type(shape)](b, shape, i)
