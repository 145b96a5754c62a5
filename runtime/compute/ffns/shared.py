"""The expert that every token uses, beside those that a router chooses for it.

It is computed whole where the block is at home: by our own operators on the CPU, through whole matrices on a device.
"""

from __future__ import annotations

from dataclasses import replace

from runtime.bindings import ggml
from runtime.bindings.ffn_shape import FfnShape
from runtime.compute.builder import Builder
from runtime.compute.ffns.neurons import FfnInputs, NeuronFfn


class SharedFfn(NeuronFfn):
    """The shared expert of a block. It has no predictor: `predicted` reads its first rows as `exact` does. Its rows are
    always in memory, also where those of other neurons are read when they fire.
    """

    def __init__(self, b: Builder, shape: FfnShape, i: int) -> None:
        super().__init__(replace(b, paging=None), shape, i)

    def product(self, given: FfnInputs) -> ggml.TensorP:
        """The product of all neurons: [n_embd, n]."""
        return self.dense(given.x) if self._whole(given.x.ne[1]) else self.native(given.x, None)
