"""What is computed of each token by itself: one file for each kind of FFN, and here the table of kinds.

A new kind is a field of `FfnShape` (runtime/bindings/ffn_shape.py), its tensors (runtime/model_file/tensor_shapes.py),
a class in a file here, and its row below.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.bindings.ffn_shape import Span
from runtime.compute.builder import Builder
from runtime.compute.ffns.experts import ExpertsFfn
from runtime.compute.ffns.neurons import NeuronFfn
from runtime.compute.ffns.shared import SharedFfn

KINDS = {False: NeuronFfn, True: ExpertsFfn}  # by whether there are experts


def ffn_of(b: Builder, i: int, spans: Sequence[Span] = ()) -> NeuronFfn:
    """The FFN of block `i`, which has one; or some of its neurons: one span of them, or with experts several."""
    shape = b.s.blocks[i].ffn
    assert shape, f"block {i} has no FFN"
    return KINDS[shape.experts is not None](b, shape, i, spans)


def shared_of(b: Builder, i: int) -> SharedFfn | None:
    """The expert of block `i` that every token uses; None where it has none."""
    shape = b.s.blocks[i].shared
    return SharedFfn(b, shape, i) if shape else None
