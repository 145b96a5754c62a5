"""A planned tensor as a stream of encoded bytes: read in pieces, encoded by several threads, delivered in order.

Memory use depends on the number of threads, not on the tensor. Knows neither the plan nor the file it goes to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from convert.arch import Generated, Source
from convert.checkpoint import Checkpoint
from convert.plan import PlannedTensor
from convert.quantize import encode
from convert.rewrites import REWRITES, Sliceable
from runtime.errors import UserError

PIECE = 1 << 21  # elements that one thread encodes at a time: 8 MiB as F32
Bytes = npt.NDArray[np.uint8]


class Encoder:
    """Owns the threads that encode the tensors of one checkpoint. Results do not depend on how many there are."""

    def __init__(self, checkpoint: Checkpoint, threads: int) -> None:
        self._checkpoint = checkpoint
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def pieces(self, tensor: PlannedTensor) -> Iterator[Bytes]:
        """The bytes of `tensor`, in order. Raises UserError for values that its format cannot hold."""
        if isinstance(tensor.source, Generated):
            yield encode(tensor.source.make(self._checkpoint.config), tensor.type)
            return
        row_length = tensor.shape[0] if len(tensor.shape) > 1 else 1
        step = max(1, PIECE // row_length)
        with self._checkpoint.open(tensor.source.name) as stored:
            ahead: deque[Future[Bytes]] = deque()
            for start in range(0, tensor.rows, step):
                stop = min(start + step, tensor.rows)
                ahead.append(self._pool.submit(_encode_rows, tensor.source, tensor.type, stored, start, stop))
                if len(ahead) > self._threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()


def _encode_rows(source: Source, kind: str, stored: Sliceable, start: int, stop: int) -> Bytes:
    rows = REWRITES[source.rewrite].rows(stored, start, stop)
    try:
        return encode(rows, kind)
    except UserError as error:
        raise UserError(f"{source.name}: {error.message}", error.hint) from None
