"""A model file's tensors as ggml tensors: mapped from the file, not copied."""

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
    """Tensors by name: `tensors[name]` as it is stored; `tensors.matrix(name)` what to multiply with: its copy in
    another layout, where `copies` has one.
    """

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
