"""The contenders of a race, each in a process of its own: llama.cpp, and our modes, on the CPU alone or on a device
too.

All get the same ids to compute, whatever they would have said themselves: our modes but those that compute several
tokens at once because they expect them. These write what they would (`Writing`).

`open` is timed, so whatever a contender imports is imported when it is made.
"""

from __future__ import annotations

import ctypes
import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import runtime
from runtime.bindings import ggml_devices as gd
from runtime.bindings.logs import captured_log, silence
from runtime.errors import UserError
from runtime.generation import Token
from runtime.hybrid.bandwidth import cpu
from runtime.hybrid.devices import NONE, find
from runtime.options import FFN_MODES
from runtime.text.sampling import Sampling

LLAMA_CPP = "llama_cpp"
TOKEN_BY_TOKEN = ("dense", "exact", "predicted")  # modes that compute any token, one after the other
BATCH = 512  # tokens of a prompt computed at once, by every contender
_MIB = 1 << 20


def in_order(modes: Iterable[str]) -> list[str]:
    """Our modes as tables show them: from the plainest on, others last."""
    known = [mode for mode in TOKEN_BY_TOKEN if mode in modes]
    return [*known, *(mode for mode in modes if mode not in known)]


@dataclass(frozen=True)
class Spec:
    """A contender. kind: LLAMA_CPP or one of our modes. device: a name, or NONE for the CPU alone.

    budget: bytes on the device, whole KiB; of our modes. layers, cpu_ffns: llama.cpp's: how many layers are on the
    device, the head first and then the last blocks (`--n-gpu-layers`), and how many of the first blocks leave their
    FFN's weights to the CPU. ram_budget: bytes of main memory, 0 for no limit; pressure: who keeps llama.cpp within it
    (bench/short_memory.py).
    """

    kind: str
    path: str
    threads: int
    n_ctx: int
    device: str = NONE
    budget: int = 0
    layers: int = 0
    cpu_ffns: int = 0
    ram_budget: int = 0
    pressure: str = ""


class Contender(Protocol):
    """One way to run one model."""

    def open(self) -> None:
        """Load the model."""

    def start(self, ids: Sequence[int]) -> None:
        """Forget the context and compute `ids`, as a prompt: the last one's logits are wanted."""

    def step(self, token: int) -> None:
        """Compute one more token and its logits."""

    def facts(self) -> dict[str, Any]:
        """What is known of the tokens since `start`."""

    def on_device(self) -> dict[str, Any]:
        """`device_bytes`, those of all buffers on the device, and what else is known of what is there."""

    def close(self) -> None:
        """Free the model."""


class Ours:
    """Our runtime in one FFN mode."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._ids: list[int] = []

    def open(self) -> None:
        """Load the model."""
        s = self._spec
        self._model = runtime.load(
            s.path, ffn=s.kind, threads=s.threads, n_ctx=s.n_ctx, n_batch=BATCH, device=s.device,
            vram_budget=None if s.device == NONE else f"{s.budget // 1024}KiB",
            ram_budget=f"{s.ram_budget}B" if s.ram_budget else None,
        )  # fmt: skip
        self._sequence, self._counters = self._model._sequence, self._model._engine.counters

    def start(self, ids: Sequence[int]) -> None:
        """Forget the context and compute `ids` as a prompt."""
        self._sequence.clear()
        self._ids = list(ids)
        self._sequence.logits(self._ids).argmax()
        self._counters.reset()

    def step(self, token: int) -> None:
        """Compute one more token."""
        self._ids.append(token)
        self._sequence.logits(self._ids).argmax()

    def facts(self) -> dict[str, Any]:
        """Shares of neurons per block since `start`."""
        return {"fired": self._counters.layer_shares(), "gates": self._counters.gate_shares()}

    def on_device(self) -> dict[str, Any]:
        """Blocks whose attention is there, the share of all neurons, and whether the head is."""
        found: dict[str, Any] = {"device_bytes": sum(self._model.device_bytes())}
        if self._model.arrangement:
            placement, s = self._model.arrangement.placement, self._model.structure
            found["blocks"] = s.block_count - placement.resident_from
            there = self._model.arrangement.tensor_map.on_devices
            found["hot_share"] = sum(there) / sum(ffn.n_reached for ffn in s.ffns.values())
            found["head"] = placement.head
        return found

    def close(self) -> None:
        """Free the model."""
        self._model.close()


class Writing(Ours):
    """Our runtime in a mode that guesses tokens and computes several at once: it writes its own text, the likeliest
    token each time, and tokens that are given only count.

    A text that ends goes on with the first token of the prompt.
    """

    def start(self, ids: Sequence[int]) -> None:
        """Forget the context, compute `ids` as a prompt and choose the first token."""
        self._taken = self._written = 0
        self._tokens = self._write(list(ids))
        self.step(ids[0])

    def step(self, token: int) -> None:
        """Take one more token of the text, which is written as far as it has to be."""
        self._taken += 1
        while self._written < self._taken:
            next(self._tokens)

    def _write(self, ids: list[int]) -> Iterator[None]:
        """Write on without end."""
        first, cached = ids[0], False
        while True:
            self._generation = self._model.generate(
                ids, sampling=Sampling(temperature=0), cache_prompt=cached, on_token=self._count
            )
            for _ in self._generation:
                yield
            ids, cached = [*ids, *self._generation.token_ids, first], True

    def _count(self, _: Token) -> None:
        self._written += 1

    def facts(self) -> dict[str, Any]:
        """What the generation says of itself."""
        self._generation.close()
        stats = self._generation.stats
        return {
            "fired": stats.layer_shares,
            "gates": stats.gate_shares,
            "bytes_per_token": stats.bytes_per_token,
            "drafted_tokens": stats.drafted_tokens,
            "accepted_tokens": stats.accepted_tokens,
        }


class _BufferTypeOverride(ctypes.Structure):
    """struct llama_model_tensor_buft_override, which llama-cpp-python does not declare."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p)]


class LlamaCpp:
    """llama.cpp through llama-cpp-python's C functions with its own best settings: mapped, repacked, flash attention.

    Its class `Llama` cannot say which device is used, nor which weights stay with the CPU.
    """

    repacks = True

    def __init__(self, spec: Spec) -> None:
        import llama_cpp  # noqa: PLC0415  (its import is slow, and no other contender needs it)

        self._lib, self._spec, self._log = llama_cpp, spec, [""]
        silence()  # its import routed the log elsewhere
        llama_cpp.llama_backend_init()

    def open(self) -> None:
        """Load the model. Raises UserError where that fails."""
        self._open(dry=False)

    def _open(self, dry: bool) -> None:
        """dry: nothing is loaded, and only the sizes of compute buffers are found out."""
        lib, params = self._lib, self._model_params()
        params.use_extra_bufts = self.repacks
        params.no_alloc, params.load_mode = dry, lib.LLAMA_LOAD_MODE_NONE if dry else lib.LLAMA_LOAD_MODE_MMAP
        with captured_log() as self._log:
            self._model = lib.llama_model_load_from_file(self._spec.path.encode(), params)
            self._context = lib.llama_init_from_model(self._model, self._context_params()) if self._model else None
        if not self._context:
            if self._model:
                lib.llama_model_free(self._model)
            raise UserError(f"`{self._spec.path}`: llama.cpp does not load it: {(self._log or [''])[-1]}")
        self._n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def _model_params(self) -> Any:
        s, params = self._spec, self._lib.llama_model_default_params()
        params.n_gpu_layers = s.layers
        # Whatever the CPU holds may be repacked: without this, memory for transfers to the device would come first.
        params.no_host = True
        used = [device.handle.value for device in find((s.device,))] if s.layers else []
        self._devices = (ctypes.c_void_p * 2)(*used)  # ends with NULL; kept as long as the model
        params.devices = ctypes.addressof(self._devices)
        self._overrides = (_BufferTypeOverride * 2)()
        if s.cpu_ffns:
            blocks = "|".join(map(str, range(s.cpu_ffns)))
            buffer_type = gd.ggml_backend_dev_buffer_type(cpu().handle)
            self._overrides[0] = _BufferTypeOverride(
                rf"^blk\.({blocks})\.ffn_(gate|up|down)(_exps)?\.".encode(), buffer_type.value
            )
            params.tensor_buft_overrides = ctypes.addressof(self._overrides)
        return params

    def _context_params(self) -> Any:
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = self._spec.n_ctx, BATCH, BATCH
        params.n_threads = params.n_threads_batch = self._spec.threads
        params.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        return params

    def start(self, ids: Sequence[int]) -> None:
        """Forget the context and compute `ids` as a prompt."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        for at in range(0, len(ids), BATCH):
            self._compute(ids[at : at + BATCH])

    def step(self, token: int) -> None:
        """Compute one more token."""
        self._compute([token])

    def _compute(self, ids: Sequence[int]) -> None:
        tokens = (self._lib.llama_token * len(ids))(*ids)  # the batch only points to it
        if self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        np.ctypeslib.as_array(logits, (self._n_vocab,)).argmax()

    def facts(self) -> dict[str, Any]:
        """Nothing: every neuron, always."""
        return {}

    def on_device(self) -> dict[str, Any]:
        """Layers there, and how many of the first blocks leave their FFN to the CPU.

        The bytes are those that llama.cpp logs.
        """
        return {"device_bytes": self._logged_bytes(), "layers": self._spec.layers, "cpu_ffns": self._spec.cpu_ffns}

    def compute_bytes(self) -> int:
        """Bytes of the compute buffers that it would have on the device, found without loading the model."""
        self._open(dry=True)
        try:
            return self._logged_bytes()
        finally:
            self.close()

    def _logged_bytes(self) -> int:
        """The sum of the device's buffers, each rounded to 10 KiB by the log."""
        # Buffers are named after their device, some with a suffix: `CUDA0`, `MTL0_Mapped`. `CUDA_Host` is main memory.
        line = re.compile(rf": +{re.escape(self._spec.device)}(_\w+)? .*buffer size = +([\d.]+) MiB", re.IGNORECASE)
        return sum(round(float(match[2]) * _MIB) for match in map(line.search, self._log) if match)

    def close(self) -> None:
        """Free the model."""
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)


def make(spec: Spec) -> Contender:
    """The contender that is described."""
    if spec.kind in FFN_MODES:
        return Ours(spec) if spec.kind in TOKEN_BY_TOKEN else Writing(spec)
    assert spec.kind == LLAMA_CPP, spec.kind
    return LlamaCpp(spec)


def timed_open(contender: Contender, ids: Sequence[int]) -> dict[str, float]:
    """Load and answer: seconds until the model is loaded, and until the logits after `ids` are there."""
    begin = time.perf_counter()
    contender.open()
    loaded = time.perf_counter()
    contender.start(ids)
    return {"load_s": loaded - begin, "first_token_s": time.perf_counter() - begin}


def timed_prompt(contender: Contender, ids: Sequence[int]) -> float:
    """Seconds that a prompt takes."""
    begin = time.perf_counter()
    contender.start(ids)
    return time.perf_counter() - begin


def timed_decode(
    contender: Contender,
    prompt: Sequence[int],
    ids: Sequence[int],
    warm_up: Sequence[int] = (),
    limit_s: float = math.inf,
) -> tuple[int, float]:
    """How many of the tokens `ids` were computed one by one and the seconds that they took, after a prompt and tokens
    to warm up that are not counted. Ends after the token with which `limit_s` is reached.
    """
    contender.start(prompt)
    for token in warm_up:
        contender.step(token)
    begin = time.perf_counter()
    n, seconds = 0, 0.0
    while n < len(ids) and seconds < limit_s:
        contender.step(ids[n])
        n, seconds = n + 1, time.perf_counter() - begin
    return n, seconds
