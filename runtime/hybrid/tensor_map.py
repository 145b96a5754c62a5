"""Which tensors of a model a placement puts on which device, and which rows stay with the CPU.

Pure: knows the names and shapes of docs/format.md; knows nothing of ggml or of how tensors get there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from runtime.hybrid.planner import Placement
from runtime.model_file.structure import Structure
from runtime.model_file.tensor_shapes import required_tensors

_BLOCK = re.compile(r"blk\.(\d+)\.(.*)")
_ROWS = ("ffn_gate.weight", "ffn_gate.bias", "ffn_up.weight", "ffn_up.bias")
_COLUMNS = ("ffn_down.weight",)
_CPU_ONLY = ("ffn_down_t.weight", "ffn_neuron_index", "ffn_neuron_freq")


@dataclass(frozen=True)
class Part:
    """A tensor, or some of its neurons: `first`..`end` along `axis` (1: rows, or elements of a vector; 0: columns), all where axis is None."""

    name: str
    axis: int | None = None
    first: int = 0
    end: int = 0


@dataclass(frozen=True)
class Residence:
    """A placement of one model. predicted: whether blocks with a predictor use it."""

    structure: Structure
    placement: Placement
    predicted: bool

    @property
    def first(self) -> int:
        """The first block whose attention is on the device."""
        return self.placement.resident_from

    def hot(self, i: int) -> int:
        """Neurons of block `i` on all devices together: a prefix of them."""
        return sum(self.placement.hot[i])

    def neurons(self, i: int) -> int:
        """Neurons of block `i`, 0 without an FFN."""
        ffn = self.structure.blocks[i].ffn
        return ffn.n_ff if ffn else 0

    def cold(self, i: int) -> int:
        """Neurons of block `i` that the CPU computes."""
        return self.neurons(i) - self.hot(i)

    def whole(self, i: int) -> bool:
        """Whether block `i` is wholly on the first device."""
        return self.placement.hot[i][0] == self.neurons(i)

    def scored_on_device(self, i: int) -> bool:
        """Whether the device computes the scores of block `i`'s cold neurons. Sign bits are the CPU's: no device has an operation for them."""
        s = self.structure
        resident = i >= self.first and self.cold(i) > 0
        return resident and self.predicted and s.rank(i) > 0 and s.predictor != "signbit"

    def piece(self, i: int, device: int) -> tuple[int, int]:
        """First and end of the neurons of block `i` on a device."""
        pieces = self.placement.hot[i]
        first = sum(pieces[:device])
        return first, first + pieces[device]

    def parts(self, device: int) -> list[Part]:
        """What a device holds."""
        return list(self._first_device() if device == 0 else self._neurons(device))

    def _neurons(self, device: int) -> Iterator[Part]:
        for i in range(self.structure.block_count):
            first, end = self.piece(i, device)
            if end > first:
                yield from self._slices(i, first, end)

    def _slices(self, i: int, first: int, end: int) -> Iterator[Part]:
        names = required_tensors(self.structure)
        for axis, group in ((1, _ROWS), (0, _COLUMNS)):
            yield from (Part(n, axis, first, end) for n in (f"blk.{i}.{name}" for name in group) if n in names)

    def _first_device(self) -> Iterator[Part]:
        for name in required_tensors(self.structure):
            block = _BLOCK.match(name)
            if block is None:
                if self._is_global_part(name):
                    yield Part(name)
            elif int(block[1]) >= self.first:
                yield from self._of_block(name, int(block[1]), block[2])
        yield from self._neurons(0)

    def _of_block(self, name: str, i: int, short: str) -> Iterator[Part]:
        if short in (*_ROWS, *_COLUMNS, *_CPU_ONLY):
            return
        if not short.startswith("predictor_"):
            yield Part(name)
        elif self.scored_on_device(i):
            if short == "predictor_in.weight":
                yield Part(name)
            elif short == "predictor_out.weight":
                yield Part(name, 1, self.hot(i), self.neurons(i))

    def _is_global_part(self, name: str) -> bool:
        if name == "rope_freqs.weight":
            return self.first < self.structure.block_count
        head = "token_embd.weight" if self.structure.tied_output else "output.weight"
        return self.placement.head and (name == head or name.startswith(("output_norm", "output_proj")))

    def cold_parts(self, i: int) -> list[Part]:
        """The rows of block `i` that the CPU computes with."""
        n_ff, k, names = self.neurons(i), self.hot(i), required_tensors(self.structure)
        rows = (*_ROWS, "ffn_down_t.weight", "predictor_out.weight", "predictor_out.bias", "predictor_sign")
        parts = [Part(f"blk.{i}.{name}", 1, k, n_ff) for name in rows]
        parts += [Part(f"blk.{i}.{name}", 0, k, n_ff) for name in _COLUMNS]
        return [part for part in parts if part.name in names]

    def cold_structure(self, i: int) -> Structure:
        """The model as if it had block `i`'s cold neurons only."""
        return replace(self.structure, feed_forward_length=self.cold(i))
