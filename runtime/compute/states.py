"""What Mamba blocks remember of each sequence: one state for each, which every token changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.base.closing import Closing, Handles
from runtime.base.figures import size as size_text
from runtime.bindings import ggml
from runtime.compute.weights import new_context
from runtime.errors import UserError
from runtime.model_file.structure import Mamba2, Structure


@dataclass(frozen=True)
class Move:
    """What is to happen to states before the next batch is computed.

    kind: `begin` (as before the first token), `copy` (from another sequence), `save` (a copy in main memory), `restore`
    (from the copy of that sequence, or of another), `forget` (the copy). source: of `copy` and `restore`.
    """

    kind: str
    sequence: int
    source: int = 0


def state_bytes(s: Structure) -> int:
    """Bytes of one sequence's states, all blocks."""
    return sum(m.state_bytes for m in s.mambas.values())


class StateCache(Closing):
    """States of some blocks: of each two F32 matrices, [conv_state, n] and [scan_state, n], a row for each sequence.

    A row has no meaning until its sequence begins. Copies lie in main memory. Raises UserError where memory does not
    suffice.
    """

    def __init__(self, backend: ggml.BackendP, mambas: Mapping[int, Mamba2], n_sequences: int) -> None:
        self._buffer = ggml.BufferP()
        self._saved: dict[int, list[npt.NDArray[np.float32]]] = {}
        with Handles() as handles:
            context = handles.add(new_context(2 * len(mambas)), ggml.ggml_free)
            self._states = {
                i: tuple(
                    ggml.ggml_new_tensor_2d(context, ggml.F32, n, n_sequences) for n in (m.conv_state, m.scan_state)
                )
                for i, m in mambas.items()
            }
            if mambas:
                self._buffer = ggml.ggml_backend_alloc_ctx_tensors(context, backend)
                handles.add(self._buffer, ggml.ggml_backend_buffer_free)
                if not self._buffer:
                    size = n_sequences * sum(m.state_bytes for m in mambas.values())
                    raise UserError(
                        f"not enough memory for {size_text(size)} of states", "answer fewer at once, with --parallel"
                    )
            self._handles = handles.pop_all()

    def of(self, i: int) -> tuple[ggml.TensorP, ggml.TensorP]:
        """States of block `i`: of its convolution and of its scan."""
        conv, scan = self._states[i]
        return conv, scan

    def apply(self, move: Move) -> None:
        """Do what a move says."""
        if move.kind == "begin":
            for tensor in self._tensors:
                _set(tensor, move.sequence, np.zeros(tensor.ne[0], np.float32))
        elif move.kind == "copy":
            for tensor in self._tensors:
                _set(tensor, move.sequence, _get(tensor, move.source))
        elif move.kind == "save":
            self._saved[move.sequence] = [_get(tensor, move.sequence) for tensor in self._tensors]
        elif move.kind == "restore":
            for tensor, row in zip(self._tensors, self._saved[move.source], strict=True):
                _set(tensor, move.sequence, row)
        else:
            self._saved.pop(move.sequence, None)

    @property
    def _tensors(self) -> list[ggml.TensorP]:
        return [tensor for pair in self._states.values() for tensor in pair]

    @property
    def nbytes(self) -> int:
        """Bytes of memory, without copies."""
        return ggml.ggml_backend_buffer_get_size(self._buffer) if self._buffer else 0

    def close(self) -> None:
        """Release the memory."""
        self._saved.clear()
        self._handles.close()


def _set(tensor: ggml.TensorP, row: int, values: npt.NDArray[np.float32]) -> None:
    ggml.ggml_backend_tensor_set(tensor, values.ctypes.data, row * values.nbytes, values.nbytes)


def _get(tensor: ggml.TensorP, row: int) -> npt.NDArray[np.float32]:
    values = np.empty(tensor.ne[0], np.float32)
    ggml.ggml_backend_tensor_get(
        ggml.ConstTensorP(tensor.value), values.ctypes.data, row * values.nbytes, values.nbytes
    )
    return values
