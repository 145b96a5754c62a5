"""What a benchmark knows of the machine's memory: the bandwidth that ggml reaches, and what a process has resident."""

from __future__ import annotations

import os
import time
from pathlib import Path

from runtime.base.worker import on_worker
from runtime.bindings import ggml
from runtime.compute.weights import new_context

_WIDTH = 8192  # elements of a row
_FIELDS = {"VmHWM": "peak_bytes", "RssAnon": "anonymous_bytes", "RssFile": "file_bytes"}


class DenseProduct:
    """ggml's own product of a large F16 matrix with a vector: the yardstick of memory bandwidth.

    size: bytes, beyond any cache.
    """

    def __init__(self, threads: int, size: int = 1 << 29) -> None:
        self._size = size
        on_worker(lambda: self._open(threads))

    def _open(self, threads: int) -> None:
        self._backend = ggml.ggml_backend_cpu_init()
        ggml.ggml_backend_cpu_set_n_threads(self._backend, threads)
        self._context = new_context(8, ggml.ggml_graph_overhead_custom(8, False))
        matrix = ggml.ggml_new_tensor_2d(self._context, ggml.F16, _WIDTH, self._size // (2 * _WIDTH))
        vector = ggml.ggml_new_tensor_1d(self._context, ggml.F32, _WIDTH)
        self._graph = ggml.ggml_new_graph_custom(self._context, 8, False)
        ggml.ggml_build_forward_expand(self._graph, ggml.ggml_mul_mat(self._context, matrix, vector))
        self._buffer = ggml.ggml_backend_alloc_ctx_tensors(self._context, self._backend)
        ggml.ggml_backend_buffer_clear(self._buffer, 1)

    def bandwidth(self, passes: int = 4) -> float:
        """Bytes per second in the best of a few passes."""
        return on_worker(lambda: max(self._pass() for _ in range(passes)))

    def _pass(self) -> float:
        start = time.perf_counter()
        ggml.ggml_backend_graph_compute(self._backend, self._graph)
        return self._size / (time.perf_counter() - start)

    def close(self) -> None:
        """Free the matrix."""
        on_worker(self._close)

    def _close(self) -> None:
        ggml.ggml_backend_buffer_free(self._buffer)
        ggml.ggml_free(self._context)
        ggml.ggml_backend_free(self._backend)


def resident() -> dict[str, int]:
    """Of this process, in bytes: `peak_bytes`, and now `anonymous_bytes` and `file_bytes`.

    Empty where there is no /proc.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return {}
    lines = (line.split() for line in status.read_text().splitlines())
    return {_FIELDS[words[0][:-1]]: int(words[1]) * 1024 for words in lines if words and words[0][:-1] in _FIELDS}


def read_through(path: Path) -> None:
    """Read a file once, so that it lies in the page cache."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def drop_cached(path: Path) -> None:
    """Let a file that no process has mapped leave the page cache, where the system can be asked to."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
