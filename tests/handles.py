"""Counts what native code hands out and gets back, and makes any call of it fail."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from runtime.base.worker import on_worker
from runtime.bindings import ffi, ggml, llama
from runtime.bindings import ggml_devices as gd

ROOT = Path(__file__).parent.parent

# What makes a handle, and what takes it back.
PAIRS = {
    "ggml_free": ("ggml_init",),
    "ggml_backend_free": ("ggml_backend_cpu_init", "ggml_backend_dev_init"),
    "ggml_backend_buffer_free": (
        "ggml_backend_cpu_buffer_from_ptr",
        "ggml_backend_alloc_ctx_tensors",
        "ggml_backend_alloc_ctx_tensors_from_buft",
        "ggml_backend_buft_alloc_buffer",
    ),
    "ggml_gallocr_free": ("ggml_gallocr_new",),
    "ggml_threadpool_free": ("ggml_threadpool_new",),
    "ggml_backend_event_free": ("ggml_backend_event_new",),
    "gguf_free": ("gguf_init_from_file",),
    "llama_sampler_free": ("llama_sampler_chain_init",),
    "llama_model_free": ("llama_model_load_from_file",),
}
MAKERS = {maker: free for free, makers in PAIRS.items() for maker in makers}


class Injected(Exception):  # noqa: N818
    """What a call fails with: nothing that the product could expect."""


class Handles:
    """Watches the declared functions from its making on, but for those that only read a header, thousands of times.

    live: (what frees it, address) of each handle that is out; calls: by function; fails: a function, and which of its calls raises `Injected`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.live: Counter[tuple[str, int]] = Counter()
        self.calls: Counter[str] = Counter()
        self.fails: tuple[str, int] | None = None
        self._lock = threading.Lock()
        for library in (ffi.GGML_BASE, ffi.GGML_CPU, ffi.GGML, ffi.LLAMA):
            for name in [name for name in library.stubs if not name.startswith("gguf_get_")]:
                module: Any = next(m for m in (ggml, gd, llama) if hasattr(m, name))
                function = ffi.resolved(library, name)
                setattr(module, name, function)  # the first call of a stub would put it there, in the place of ours
                monkeypatch.setattr(module, name, self._watched(name, function))

    def _watched(self, name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            with self._lock:
                self.calls[name] += 1
                if self.fails == (name, self.calls[name]):
                    self.fails = None
                    raise Injected(name)
            found = function(*arguments)
            with self._lock:
                if name in MAKERS and found:
                    self.live[MAKERS[name], found.value] += 1
                elif name in PAIRS and arguments[0]:
                    self.live[name, arguments[0].value] -= 1
                    assert self.live[name, arguments[0].value] >= 0, f"{name}: freed twice"
                    self.live += Counter()
            return found

        return call

    def __len__(self) -> int:
        return sum(self.live.values())


def is_mapped(path: Path) -> bool:
    """Whether this process has the file in its address space."""
    return any(line.rstrip().endswith(str(path.resolve())) for line in Path("/proc/self/maps").read_text().splitlines())


def idle() -> None:
    """Wait until the worker has done what it was asked to do."""
    on_worker(lambda: None)


def run_program(text: str, *arguments: object, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """A Python program in a process of its own."""
    command = [sys.executable, *options, "-c", text, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
