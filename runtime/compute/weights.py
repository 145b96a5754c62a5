"""A model file's tensors as ggml tensors: mapped from the file, not copied.

Knows ggml's buffers; knows nothing of what a tensor is for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from runtime.base.closing import Closing, Handles
from runtime.bindings import ggml
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile


def new_context(n_tensors: int, extra: int = 0) -> ggml.ContextP:
    """A ggml context for `n_tensors` tensor headers (and `extra` bytes), without tensor data."""
    size = ggml.ggml_tensor_overhead() * (n_tensors + 1) + extra
    return ggml.ggml_init(ggml.ggml_init_params(mem_size=size, mem_buffer=None, no_alloc=True))


def check_status(status: int, where: str) -> None:
    """Raise UserError unless a graph was computed."""
    if status != ggml.STATUS_SUCCESS:
        raise UserError(f"{where}: ggml could not compute the graph (status {status})")


class Tensors:
    """Tensors by name: `tensors[name]` as it is stored; `tensors.matrix(name)` what to multiply with: its copy in another layout, where `copies` has one."""

    def __init__(self, tensors: dict[str, ggml.TensorP]) -> None:
        self.tensors = tensors
        self.copies: Mapping[str, ggml.TensorP] = {}

    def __getitem__(self, name: str) -> ggml.TensorP:
        return self.tensors[name]

    def matrix(self, name: str) -> ggml.TensorP:
        """The tensor as a factor of `ggml_mul_mat`; its rows need not lie as in the file."""
        return self.copies.get(name) or self.tensors[name]

    def get(self, name: str) -> ggml.TensorP | None:
        """The tensor, or None where there is none of that name."""
        return self.tensors.get(name)


class Weights(Tensors, Closing):
    """Tensors of a file, mapped; `close` unmaps them."""

    def __init__(self, file: GgufFile, names: Collection[str]) -> None:
        self._file = file
        with Handles() as handles:
            handles.callback(file.close)
            self._context = handles.add(new_context(len(names)), ggml.ggml_free)
            self._buffers = {
                at: handles.add(ggml.ggml_backend_cpu_buffer_from_ptr(at, size), ggml.ggml_backend_buffer_free)
                for at, size in {file.mapped(name) for name in names}
            }
            super().__init__({name: self._tensor(name) for name in names})
            self._handles = handles.pop_all()

    def release(self, name: str) -> None:
        """Give the memory of a mapped tensor's pages back; whoever touches them reads them from the file again."""
        self._file.release(name)

    def _tensor(self, name: str) -> ggml.TensorP:
        info = self._file.tensors[name]
        tensor = ggml.ggml_new_tensor_2d(self._context, info.type_id, *(*info.ne, 1)[:2])
        ggml.ggml_set_name(tensor, name.encode())
        buffer = self._buffers[self._file.mapped(name)[0]]
        status = ggml.ggml_backend_tensor_alloc(buffer, tensor, self._file.address(name))
        assert status == ggml.STATUS_SUCCESS, name
        return tensor

    def close(self) -> None:
        """Release the tensors and the mapping."""
        self.tensors, self.copies = {}, {}
        self._handles.close()


class KvCache(Closing):
    """Keys and values of some blocks, [kv_length, n_ctx] each; zeroed, since masked positions are multiplied too. lengths: kv_length of each block."""

    def __init__(self, backend: ggml.BackendP, type_id: int, lengths: Mapping[int, int], n_ctx: int) -> None:
        self._buffer, n = ggml.BufferP(), len(lengths)
        with Handles() as handles:
            context = handles.add(new_context(2 * n), ggml.ggml_free)
            self._keys, self._values = (
                {i: ggml.ggml_new_tensor_2d(context, type_id, length, n_ctx) for i, length in lengths.items()}
                for _ in range(2)
            )
            if n:
                self._buffer = ggml.ggml_backend_alloc_ctx_tensors(context, backend)
                handles.add(self._buffer, ggml.ggml_backend_buffer_free)
                if not self._buffer:
                    size = 2 * n_ctx * sum(ggml.ggml_row_size(type_id, length) for length in lengths.values())
                    raise UserError(
                        f"not enough memory for {size / 1e9:.1f} GB of keys and values", "use a smaller --n-ctx"
                    )
                ggml.ggml_backend_buffer_clear(self._buffer, 0)
            self._handles = handles.pop_all()

    def of(self, i: int) -> tuple[ggml.TensorP, ggml.TensorP]:
        """Keys and values of block `i`."""
        return self._keys[i], self._values[i]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return ggml.ggml_backend_buffer_get_size(self._buffer) if self._buffer else 0

    def close(self) -> None:
        """Release the memory."""
        self._handles.close()
