"""The expert that every token uses, beside those that a router chooses for it.

It is computed whole where the block is at home: by our own operators on the CPU, through whole matrices on a device.
"""

from __future__ import annotations

from runtime.bindings import ggml
from runtime.compute.ffns.neurons import FfnInputs, NeuronFfn


class SharedFfn(NeuronFfn):
    """The shared expert of a block. It has no predictor: `predicted` reads its first rows as `exact` does."""

    def product(self, given: FfnInputs) -> ggml.TensorP:
        """The product of all neurons: [n_embd, n]."""
        return self.dense(given.x) if self._whole(given.x.ne[1]) else self.native(given.x, None)
