"""Tokens through a model that lies on the CPU and on devices: the subgraphs of both sides, and the order in which they run.

Blocks before the first resident one are a graph on the CPU. From there on the hidden states are on the first device. Where a block has cold neurons, its FFN's
input goes to the CPU, which computes these while the devices compute the hot ones; the sum continues on the first device. So the device's work is cut
where the CPU is needed, and nowhere else.

Knows streams and graphs; what lies where is runtime/hybrid/device_memory.py's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from runtime.base.closing import Closing, Handles
from runtime.bindings import ggml, sparse_ffn
from runtime.compute.batch import GraphInputs
from runtime.compute.blocks import AtFfn, Blocks
from runtime.compute.builder import Builder, GraphSpec, Inputs
from runtime.compute.ffns import ffn_of
from runtime.compute.graph import Graph, check_supported, read, write
from runtime.compute.kv_cache import KvCache
from runtime.compute.repack import Repacked
from runtime.compute.weights import check_status
from runtime.hybrid.device_memory import Hybrid
from runtime.hybrid.device_queue import Mark, Stream
from runtime.hybrid.sides import Part, Side


@dataclass(frozen=True)
class Crossing:
    """Tensors between subgraphs, on the first device and in main memory: [n_embd, n], products as `Blocks.ffn` gives them, scores [n_ff, n]."""

    x: ggml.TensorP  # the FFN's input
    residual: ggml.TensorP
    stream: ggml.TensorP  # before the FFN's norm, for a predictor that sees it
    hot: ggml.TensorP  # the first device's part of the FFN's product
    y: ggml.TensorP  # the others' part
    scores: ggml.TensorP  # of the predictor, for cold neurons


@dataclass(frozen=True)
class Elsewhere:
    """A piece of a block's hot neurons on another device than the first. y: the product there; host_y: in main memory."""

    stream: Stream
    part: Part
    x: ggml.TensorP
    y: ggml.TensorP
    host_y: ggml.TensorP


@dataclass(frozen=True)
class SplitBlock:
    """One FFN of which the CPU or another device has a part. before: all that the first device computes since the last such FFN."""

    i: int
    before: Part
    downloads: tuple[tuple[ggml.TensorP, ggml.TensorP], ...]  # from the device, to main memory
    hot: Part | None
    cold: Part | None
    elsewhere: tuple[Elsewhere, ...]
    host_x: ggml.TensorP
    y: ggml.TensorP
    host_y: ggml.TensorP


class SplitGraph(Closing):
    """What `runtime.compute.graph.Graph` is for the CPU alone: call `run` from the thread that owns ggml, and `close`.

    backend: the CPU's. kv: keys and values of the blocks that are wholly on the CPU.
    It uses the hybrid's memory, as all others of that hybrid do: see `Hybrid.growths`. Raises UserError where memory does not suffice, and for what a device cannot compute.
    """

    def __init__(
        self, spec: GraphSpec, hybrid: Hybrid, backend: ggml.BackendP, kv: KvCache, scratch: Repacked | None
    ) -> None:
        self.spec, self.scratch, self._hybrid, self._backend = spec, scratch, hybrid, backend
        self._residence, self._s = hybrid.residence, hybrid.residence.structure
        self._made = next(iter(self._s.ffns.values())).product_length
        self._streams, self._trace = hybrid.streams, hybrid.streams[0].trace
        self.ffns: dict[int, sparse_ffn.Ffn] = {}  # by block
        self.blocks: list[SplitBlock] = []
        self.last: Part  # all that the first device computes after the last of them
        with Handles() as handles:
            self._open_cpu(handles, kv)
            self._open_sides(handles)
            _Build(self).all()
            for side in (*self.devices, self.host):
                side.allocate_parts()
            self._handles = handles.pop_all()

    def _open_cpu(self, handles: Handles, kv: KvCache) -> None:
        weights, n = self._hybrid.weights, self.spec.n_outputs
        front = replace(self.spec, end=self._residence.first)
        self._front = handles.enter_context(Graph(front, self._s, weights, kv, self._backend, self.scratch, self.ffns))
        self._head: Graph | None = None
        if not self._residence.placement.head:
            tail = replace(self.spec, n_tokens=n, first=self._s.block_count)
            self._head = handles.enter_context(Graph(tail, self._s, weights, kv, self._backend))

    def _open_sides(self, handles: Handles) -> None:
        s, n, d = self._s, self.spec.n_tokens, self._s.embedding_length
        max_tensors = 32 + 20 * s.block_count
        self.devices = [handles.enter_context(Side(memory, max_tensors)) for memory in self._hybrid.memories]
        self.host = handles.enter_context(Side(self._hybrid.main_memory, max_tensors))
        device, host = self.devices[0], self.host
        arriving = self.spec.n_outputs if self._residence.first == s.block_count else n
        self.hidden, self.host_hidden = device.tensor(d, arriving), host.tensor(d, arriving)
        self.inputs, self.host_inputs = (_inputs(side, self.spec, s.windows) for side in (device, host))
        self.crossing, self.host_crossing = self._crossing(device), self._crossing(host)
        width = s.vocab_size if self._head is None else d
        self.result, self.host_result = (side.tensor(width, self.spec.n_outputs) for side in (device, host))
        made = self._made
        self.pieces = [(side.tensor(d, n), side.tensor(made, n), host.tensor(made, n)) for side in self.devices[1:]]
        for side in (*self.devices, host):
            side.allocate_tensors()

    def _crossing(self, side: Side) -> Crossing:
        s, n = self._s, self.spec.n_tokens
        x, residual, stream = (side.tensor(s.embedding_length, n) for _ in range(3))
        hot, y = (side.tensor(self._made, n) for _ in range(2))
        return Crossing(x, residual, stream, hot, y, side.tensor(max(ffn.n_ff for ffn in s.ffns.values()), n))

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self, inputs: GraphInputs) -> npt.NDArray[np.float32]:
        """Compute the tokens and return logits, float32 [n_outputs, n_vocab]."""
        try:
            return self._run(inputs)
        except BaseException:
            for stream in self._streams:
                stream.settle()  # it may still write to what is about to be freed
            raise

    def _run(self, inputs: GraphInputs) -> npt.NDArray[np.float32]:
        main = self._streams[0]
        began = self._trace.now() if self._trace else 0.0
        write(self.host_hidden, self._front.run(inputs))
        self._traced("front", began)
        main.upload(self.hidden, self.host_hidden)
        for device, host, array in zip(self.inputs.tensors, self.host_inputs.tensors, inputs.arrays, strict=True):
            write(host, array)
            main.upload(device, host)
        for block in self.blocks:
            self._run_block(block)
        main.compute(self.last.graph, self.last.name)
        main.download(self.result, self.host_result)
        for stream in self._streams:
            stream.finish()
        if self._trace:
            self._trace.step += 1
        result = read(self.host_result)
        return result if self._head is None else self._head.run(inputs.wanted(result))

    def _run_block(self, b: SplitBlock) -> None:
        main = self._streams[0]
        main.compute(b.before.graph, b.before.name)
        for device, host in b.downloads:
            main.download(device, host)
        arrived = main.mark()
        if b.hot:
            main.compute(b.hot.graph, b.hot.name)
        arrived.wait()
        marks = [self._start(piece, b.host_x) for piece in b.elsewhere]
        if b.cold:
            began = self._trace.now() if self._trace else 0.0
            check_status(ggml.ggml_backend_graph_compute(self._backend, b.cold.graph), "the CPU")
            self._traced(b.cold.name, began)
        for mark in marks:
            mark.wait()
        if b.elsewhere:
            self._add_pieces(b)
        main.upload(b.y, b.host_y)

    def _start(self, piece: Elsewhere, host_x: ggml.TensorP) -> Mark:
        piece.stream.upload(piece.x, host_x)
        piece.stream.compute(piece.part.graph, piece.part.name)
        piece.stream.download(piece.y, piece.host_y)
        return piece.stream.mark()

    def _add_pieces(self, b: SplitBlock) -> None:
        products = [read(piece.host_y) for piece in b.elsewhere]
        write(b.host_y, sum(products, read(b.host_y) if b.cold else np.zeros_like(products[0])))

    def _traced(self, name: str, began: float) -> None:
        if self._trace:
            self._trace.add("CPU", name, began)

    def close(self) -> None:
        """Free the subgraphs; their memory is the hybrid's."""
        self._handles.close()


def _inputs(side: Side, spec: GraphSpec, windows: tuple[int, ...]) -> Inputs:
    n = spec.n_tokens
    return Inputs(
        positions=side.tensor(n, 1, ggml.I32),
        cells=side.tensor(n, 1, ggml.I64),
        outputs=side.tensor(spec.n_outputs, 1, ggml.I32),
        masks={window: side.tensor(spec.n_kv, n, ggml.F16) for window in windows},
    )


class _Build:
    """Adds the subgraphs of a `SplitGraph`."""

    def __init__(self, g: SplitGraph) -> None:
        self.g, self.s = g, g._s
        self.residence, self.hybrid = g._residence, g._hybrid
        self.device_spec = replace(g.spec, ffn="dense", dense_from=())

    def all(self) -> None:
        """The blocks on the device, cut where another side has a part of an FFN, and the head or the hidden states at the end."""
        g, s = self.g, self.s
        part, begun, x = self._part(), self.residence.first, g.hidden
        for i in range(self.residence.first, s.block_count):
            blocks = self._on_device(part)
            if self.residence.whole(i):
                x = blocks.block(x, i)
                continue
            at = blocks.until_ffn(x, i)
            part.name = f"blocks {begun}-{i}" if begun < i else f"block {i}"
            g.blocks.append(self._split(part, blocks, at, i))
            part, begun = self._part(), i + 1
            x = self._joined(part, g.blocks[-1])
        blocks = self._on_device(part)
        part.keep(blocks.head(x) if g._head is None else x, g.result)
        part.name, g.last = "head", part
        for side, stream in zip(g.devices, g._streams, strict=True):
            for p in side.parts:
                check_supported(p.graph, stream.info.handle)

    def _part(self) -> Part:
        return self.g.devices[0].part("", self.s.block_count)

    def _on_device(self, part: Part, d: int = 0) -> Blocks:
        g, device = self.g, self.g._streams[d].info.handle
        tensors, kv = self.hybrid.tensors[d], self.hybrid.kv
        return Blocks(Builder(part.ctx, self.s, tensors, kv, self.device_spec, g.inputs, device))

    def _split(self, part: Part, blocks: Blocks, at: AtFfn, i: int) -> SplitBlock:
        g, n = self.g, at.x.ne[1]
        device, host = (
            self._sized(side, c, n, i) for side, c in ((g.devices[0], g.crossing), (g.host, g.host_crossing))
        )
        part.keep(at.residual, device.residual)
        part.keep(at.x, device.x)
        downloads = [(device.x, host.x)]
        sees_stream = self.s.predictor_tap == "residual"
        if self.residence.scored_on_device(i):
            part.keep(blocks.ffn(i).scores(at.stream if sees_stream else at.x), device.scores)
            downloads.append((device.scores, host.scores))
        elif sees_stream and self.residence.predicted and self.residence.cold(i) and self.s.rank(i):
            part.keep(ggml.ggml_cont(part.ctx, at.stream), device.stream)
            downloads.append((device.stream, host.stream))
        return SplitBlock(
            i=i,
            before=part,
            downloads=tuple(downloads),
            hot=self._hot(device, i),
            cold=self._cold(host, i) if self.residence.cold(i) else None,
            elsewhere=tuple(self._piece(d, n, i) for d in range(1, len(g.devices)) if self._has(d, i)),
            host_x=host.x,
            y=device.y,
            host_y=host.y,
        )

    def _sized(self, side: Side, c: Crossing, n: int, i: int) -> Crossing:
        """The crossing tensors for n tokens."""
        d, made = self.s.embedding_length, self.g._made
        x, residual, stream = (side.reshaped(t, d, n) for t in (c.x, c.residual, c.stream))
        hot, y = (side.reshaped(t, made, n) for t in (c.hot, c.y))
        return Crossing(x, residual, stream, hot, y, side.reshaped(c.scores, max(1, self.residence.cold(i)), n))

    def _has(self, d: int, i: int) -> bool:
        first, end = self.residence.piece(i, d)
        return end > first

    def _hot(self, at: Crossing, i: int) -> Part | None:
        if not self._has(0, i):
            return None
        part = self.g.devices[0].part(f"hot {i}")
        part.keep(self._on_device(part).ffn(i).dense(at.x), at.hot)
        return part

    def _piece(self, d: int, n: int, i: int) -> Elsewhere:
        side, (x, y, host_y), made = self.g.devices[d], self.g.pieces[d - 1], self.g._made
        x, y = side.reshaped(x, self.s.embedding_length, n), side.reshaped(y, made, n)
        host_y = self.g.host.reshaped(host_y, made, n)
        part = side.part(f"hot {i}")
        part.keep(self._on_device(part, d).ffn(i).dense(x), y)
        return Elsewhere(self.g._streams[d], part, x, y, host_y)

    def _cold(self, at: Crossing, i: int) -> Part:
        g, cold = self.g, self.hybrid.cold[i]
        part = g.host.part(f"cold {i}")
        cpu = ggml.ggml_backend_get_device(g._backend)
        spec = replace(g.spec, dense_from=())
        builder = Builder(part.ctx, cold.structure, cold.tensors, None, spec, g.host_inputs, cpu, None, g.ffns)
        ffn = ffn_of(builder, i)
        if self.residence.scored_on_device(i):
            y = ffn.native(at.x, ffn.chosen(at.scores))
        else:
            y = ffn.product(at.x, at.stream)
        part.keep(y, at.y)
        check_supported(part.graph, cpu)
        return part

    def _joined(self, part: Part, b: SplitBlock) -> ggml.TensorP:
        """The output of a block whose FFN was split."""
        g, n = self.g, b.y.ne[1]
        at = self._sized(g.devices[0], g.crossing, n, b.i)
        product = ggml.ggml_add(part.ctx, at.hot, at.y) if b.hot else at.y
        return self._on_device(part).after_ffn(AtFfn(at.x, at.residual, at.stream), product, b.i)
