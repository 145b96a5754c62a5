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
    """What is to happen to a row of states before the next batch is computed.

    kind: `begin` (as before the first token), `copy` (from `source`), or `replay`: what `source` becomes by the first
    `length` tokens of the log. A move may be done again: it does not change what it reads.
    """

    kind: str
    row: int
    source: int = 0
    length: int = 0


def state_bytes(s: Structure) -> int:
    """Bytes of one sequence's states, all blocks."""
    return sum(m.state_bytes for m in s.mambas.values())


class StateCache(Closing):
    """States of some blocks: of each two F32 matrices, [conv_state, n] and [scan_state, n]; a row is one sequence's.

    logged: so many tokens of a batch have a place, [log_length, logged], for what states follow from.
    A row has no meaning until a sequence begins there. Raises UserError where memory does not suffice.
    """

    def __init__(
        self, backend: ggml.BackendP, mambas: Mapping[int, Mamba2], n_states: int = 1, logged: int = 0
    ) -> None:
        self._buffer = ggml.BufferP()
        with Handles() as handles:
            context = handles.add(new_context(3 * len(mambas)), ggml.ggml_free)

            def new(length: int, n: int) -> ggml.TensorP:
                return ggml.ggml_new_tensor_2d(context, ggml.F32, length, n)

            self._states = {i: (new(m.conv_state, n_states), new(m.scan_state, n_states)) for i, m in mambas.items()}
            self._logs = {i: new(m.log_length, logged) for i, m in mambas.items()} if logged else {}
            if mambas:
                self._buffer = ggml.ggml_backend_alloc_ctx_tensors(context, backend)
                handles.add(self._buffer, ggml.ggml_backend_buffer_free)
                if not self._buffer:
                    size = sum(m.held_bytes(n_states, logged) for m in mambas.values())
                    raise UserError(
                        f"not enough memory for {size_text(size)} of states", "answer fewer at once, with --parallel"
                    )
            self._handles = handles.pop_all()

    def of(self, i: int) -> tuple[ggml.TensorP, ggml.TensorP]:
        """States of block `i`: of its convolution and of its scan."""
        conv, scan = self._states[i]
        return conv, scan

    def log(self, i: int) -> ggml.TensorP:
        """Where block `i` keeps what its states follow from: [log_length, logged]."""
        return self._logs[i]

    def begin(self, row: int) -> None:
        """Let a row be as before the first token."""
        for tensor in self._tensors:
            _set(tensor, row, np.zeros(tensor.ne[0], np.float32))

    def copy(self, source: int, row: int) -> None:
        """Let a row be as another one."""
        for tensor in self._tensors:
            _set(tensor, row, _get(tensor, source))

    @property
    def _tensors(self) -> list[ggml.TensorP]:
        return [tensor for pair in self._states.values() for tensor in pair]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return ggml.ggml_backend_buffer_get_size(self._buffer) if self._buffer else 0

    def close(self) -> None:
        """Release the memory."""
        self._handles.close()


def _set(tensor: ggml.TensorP, row: int, values: npt.NDArray[np.float32]) -> None:
    ggml.ggml_backend_tensor_set(tensor, values.ctypes.data, row * values.nbytes, values.nbytes)


def _get(tensor: ggml.TensorP, row: int) -> npt.NDArray[np.float32]:
    values = np.empty(tensor.ne[0], np.float32)
    ggml.ggml_backend_tensor_get(
        ggml.ConstTensorP(tensor.value), values.ctypes.data, row * values.nbytes, values.nbytes
    )
    return values
