"""A model file's tensors as ggml tensors: mapped from the file, or read into memory of our own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.base.closing import Closing, Handles
from runtime.base.own_memory import OwnMemory, Reading
from runtime.bindings import ggml
from runtime.compute.paging import Paging
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile, TensorInfo

_ALIGNMENT = 64  # of a tensor in memory: a line of the caches


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


@dataclass(frozen=True)
class Held:
    """The bytes of a tensor that are read into memory: `first` .. first + length - 1."""

    first: int
    length: int


class Weights(Tensors, Closing):
    """Tensors of a file: those of `held` in memory, of which only the bytes that it names may be read, the others
    mapped; `close` gives both back.

    threads: to read with. paging: what has some of them, which then are neither held nor mapped; it must outlive this.
    Raises UserError where the system refuses the memory, or a file has become shorter.
    """

    def __init__(
        self,
        file: GgufFile,
        names: Collection[str],
        held: Mapping[str, Held] | None = None,
        threads: int = 1,
        paging: Paging | None = None,
    ) -> None:
        self._file, held, self.paging = file, held or {}, paging
        paged = paging.names if paging else frozenset()
        self.held_bytes = sum(part.length for part in held.values())
        with Handles() as handles:
            handles.callback(file.close)
            self._context = handles.add(new_context(len(names)), ggml.ggml_free)
            self._buffers = {
                at: handles.add(ggml.ggml_backend_cpu_buffer_from_ptr(at, size), ggml.ggml_backend_buffer_free)
                for at, size in {file.mapped(name) for name in names if name not in held and name not in paged}
            }
            placed = self._hold(handles, held, threads) if held else {}
            placed |= self._paged(handles, paging) if paging else {}
            super().__init__(
                {name: self._tensor(name, *(placed.get(name) or self._mapped(name)), name in held) for name in names}
            )
            self._handles = handles.pop_all()

    def _hold(self, handles: Handles, held: Mapping[str, Held], threads: int) -> dict[str, tuple[ggml.BufferP, int]]:
        """Read tensors into memory: the buffer and the address of each."""
        starts, end = {}, 0
        for name in held:
            starts[name] = end
            end += -(-self._file.tensors[name].nbytes // _ALIGNMENT) * _ALIGNMENT
        memory = handles.enter_context(OwnMemory(end))
        readings = [
            _reading(self._file.path_of(name), self._file.tensors[name], part, starts[name])
            for name, part in held.items()
        ]
        memory.read(readings, threads)
        pointer = ggml.ggml_backend_cpu_buffer_from_ptr(memory.address, end)
        buffer = handles.add(pointer, ggml.ggml_backend_buffer_free)
        return {name: (buffer, memory.address + start) for name, start in starts.items()}

    def _paged(self, handles: Handles, paging: Paging) -> dict[str, tuple[ggml.BufferP, int]]:
        """The buffer and the address of each tensor that is read page by page."""
        places = {name: paging.place(name) for name in paging.names}
        buffers = {
            start: handles.add(ggml.ggml_backend_cpu_buffer_from_ptr(start, size), ggml.ggml_backend_buffer_free)
            for start, size in {(start, size) for start, size, _ in places.values()}
        }
        return {name: (buffers[start], address) for name, (start, _, address) in places.items()}

    def release(self, name: str) -> None:
        """Give the memory of a tensor's mapped pages back; whoever touches them reads them from the file again."""
        self._file.release(name)

    def in_file(self, name: str) -> int:
        """Where the whole tensor lies, mapped, also where it is held."""
        return self._file.address(name)

    def _mapped(self, name: str) -> tuple[ggml.BufferP, int]:
        return self._buffers[self._file.mapped(name)[0]], self._file.address(name)

    def _tensor(self, name: str, buffer: ggml.BufferP, address: int, held: bool) -> ggml.TensorP:
        info = self._file.tensors[name]
        tensor = ggml.ggml_new_tensor_3d(self._context, info.type_id, *(*info.ne, 1, 1)[:3])
        if info.stride and not held:
            steps = tensor.struct.nb
            steps[1] = info.stride
            steps[2] = steps[3] = info.stride * tensor.ne[1]
            steps[3] *= tensor.ne[2]
        ggml.ggml_set_name(tensor, name.encode())
        status = ggml.ggml_backend_tensor_alloc(buffer, tensor, address)
        assert status == ggml.STATUS_SUCCESS, name
        return tensor

    def close(self) -> None:
        """Release the tensors, the memory and the mapping."""
        self.tensors, self.copies = {}, {}
        self._handles.close()


def _reading(path: Path, info: TensorInfo, part: Held, start: int) -> Reading:
    """What reads a part of a tensor to where it belongs in memory, when the tensor begins at `start`: there its rows
    follow each other, whatever lies between them in the file.
    """
    if not info.stride:
        return Reading(path, info.offset + part.first, part.length, start + part.first)
    row = info.nbytes // info.rows
    return Reading(
        path, info.offset + part.first // row * info.stride, part.length, start + part.first, row, info.stride
    )
