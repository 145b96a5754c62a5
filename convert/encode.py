"""A planned tensor as a stream of encoded bytes: read in pieces, encoded by several threads, delivered in order.

Memory use depends on the number of threads, not on the tensor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import numpy.typing as npt

from convert.arch import Generated, Source
from convert.checkpoint import Checkpoint
from convert.file_tensors import KeptRows, Readable
from convert.formats import encode
from convert.plan import MadeTensor, PlannedTensor
from convert.rewrites import IDENTITY, Permuted, Rewrite, ScaledColumns, Sliceable, ternary
from runtime.errors import UserError

PIECE = 1 << 21  # elements that one thread encodes at a time: 8 MiB as F32
Bytes = npt.NDArray[np.uint8]


class Encoder:
    """Owns the threads that encode the tensors of one conversion. Results do not depend on how many there are.

    checkpoint: None where nothing of the plan comes from one.
    """

    def __init__(self, checkpoint: Checkpoint | None, threads: int) -> None:
        self._checkpoint = checkpoint
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def pieces(self, tensor: PlannedTensor) -> Iterator[Bytes]:
        """The bytes of `tensor`, in order. Raises UserError for values that its format cannot hold."""
        for part in tensor.parts:
            yield from self._pieces(part)

    def _pieces(self, tensor: PlannedTensor) -> Iterator[Bytes]:
        source = tensor.source
        if isinstance(source, MadeTensor):
            yield source.data
        elif isinstance(source, KeptRows):
            yield from source.pieces(tensor.rows, tensor.row_bytes, tensor.order)
        elif isinstance(source, Generated):
            yield encode(source.make(self._source.config), tensor.type)
        else:
            with self._open(source) as stored:
                yield from self._encoded(tensor, source, _in_order(tensor, stored))

    @property
    def _source(self) -> Checkpoint:
        assert self._checkpoint is not None, "a tensor of a checkpoint in a plan without one"
        return self._checkpoint

    def _open(self, source: Source | Readable) -> AbstractContextManager[Sliceable]:
        return read(self._source, source) if isinstance(source, Source) else source.open()

    def _encoded(self, tensor: PlannedTensor, source: Source | Readable, stored: Sliceable) -> Iterator[Bytes]:
        row_length = tensor.shape[0] if len(tensor.shape) > 1 else 1
        rewrite = IDENTITY if tensor.order is not None else tensor.rewrite
        step = max(1, PIECE // row_length)
        ahead: deque[Future[Bytes]] = deque()
        for start in range(0, tensor.rows, step):
            stop = min(start + step, tensor.rows)
            ahead.append(self._pool.submit(_encode_rows, source.name, tensor.type, rewrite, stored, start, stop))
            if len(ahead) > self._threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@contextmanager
def read(checkpoint: Checkpoint, source: Source) -> Iterator[Sliceable]:
    """A checkpoint's tensor before its rewrite."""
    with checkpoint.open(source.name) as stored:
        rounded = ternary(stored) if source.ternary else stored
        if not source.columns:
            yield rounded
            return
        with checkpoint.open(source.columns) as vector:
            yield ScaledColumns(rounded, np.asarray(vector[:], np.float32))


def _in_order(tensor: PlannedTensor, stored: Sliceable) -> Sliceable:
    """The stored tensor, or the rewritten one with its neurons in the file's order: that needs the whole of it in
    memory.
    """
    if tensor.order is None:
        return stored
    return Permuted(tensor.rewrite.rows(stored, 0, tensor.rows), tensor.order, tensor.neuron_axis)


def _encode_rows(name: str, kind: str, rewrite: Rewrite, stored: Sliceable, start: int, stop: int) -> Bytes:
    rows = rewrite.rows(stored, start, stop)
    try:
        return encode(rows, kind)
    except UserError as error:
        raise UserError(f"{name}: {error.message}", error.hint) from None
