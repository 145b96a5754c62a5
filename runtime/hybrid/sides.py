"""The sides of a loaded model: the CPU and its devices, each with its queue and with what lies there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.base.closing import Closing, Handles
from runtime.bindings import ggml
from runtime.compute.ffns.experts import members, members_name
from runtime.compute.kv_cache import KvCache
from runtime.compute.states import StateCache
from runtime.compute.weights import Tensors, Weights, new_context
from runtime.hybrid.device_memory import Made, copied, viewed
from runtime.hybrid.memory import SHORTER, SMALLER, Memory, device_kinds, host_kinds, plain_kinds
from runtime.hybrid.queues import CpuQueue, Queue
from runtime.hybrid.tensor_map import CPU, Piece, Slice, TensorMap
from runtime.model_file import tensor_names as n

At = tuple[int, int]  # a piece: its block and its first neuron


@dataclass(frozen=True)
class Side:
    """One side. tensors: the blocks at home there, the CPU's being the whole file. kv: their keys and values.

    neurons: the rows and columns of a piece. scorers: what scores of a piece on the CPU are computed with, at its
    block's home. states: of the Mamba blocks at home there.
    nbytes: of the tensors that were copied to a device.
    """

    queue: Queue
    tensors: Tensors
    neurons: dict[At, Tensors]
    scorers: dict[At, Tensors]
    kv: KvCache
    states: StateCache
    nbytes: int = 0


class Sides(Closing):
    """What lies on all sides, the CPU first; `close` frees it, when the queues have ended what they do.

    devices: their queues, in the order of the map's sides. n_cells: positions of the caches. blocks: those that have
    caches, None for all. n_states, logged: see `StateCache`.
    Raises UserError where a side's memory does not suffice.
    """

    def __init__(
        self,
        weights: Weights,
        tensor_map: TensorMap,
        cpu: CpuQueue,
        devices: Sequence[Queue],
        n_cells: int,
        kv_type: int,
        blocks: range | None = None,
        n_states: int = 1,
        logged: int = 0,
    ) -> None:
        self.weights, self.map = weights, tensor_map
        self._blocks = range(tensor_map.structure.block_count) if blocks is None else blocks
        self._n_cells, self._kv_type, self._n_states, self._logged = n_cells, kv_type, n_states, logged
        # By block, how many tokens chose each of its experts, of what our operators computed.
        experts = {i: ffn.experts for i, ffn in tensor_map.structure.ffns.items() if ffn.experts}
        self.choices = {i: np.zeros(e.count, np.int64) for i, e in experts.items()}
        with Handles() as handles:
            self.devices = [self._on_device(handles, side, queue) for side, queue in enumerate(devices, start=1)]
            self._memories = [handles.enter_context(Memory(q.where, device_kinds(q.device), SMALLER)) for q in devices]
            if devices:
                kinds = host_kinds(devices[0].device)
                self._main_memory = handles.enter_context(Memory("main memory", kinds, SMALLER))
            self.cpu = self._on_cpu(handles, cpu)
            for queue in devices:
                handles.callback(queue.settle)
            self._handles = handles.pop_all()

    @property
    def all(self) -> list[Side]:
        """Every side, by its number."""
        return [self.cpu, *self.devices]

    def _on_device(self, handles: Handles, side: int, queue: Queue) -> Side:
        pieces, scored = self._pieces(side), self._scored(side)
        groups: list[Sequence[Slice | Made]] = [
            self.map.own(side),
            *(self._neurons(i, piece) for i, piece in pieces),
            *(self.map.scorer(i, piece) for i, piece in scored),
        ]
        (own, *rest), nbytes = copied(handles, self.weights, queue, groups)
        neurons = {(i, piece.first): t for (i, piece), t in zip(pieces, rest[: len(pieces)], strict=True)}
        # A piece is scored with the predictor's first matrix, which is one for the block.
        scorers = {
            (i, piece.first): Tensors({**own.tensors, **t.tensors})
            for (i, piece), t in zip(scored, rest[len(pieces) :], strict=True)
        }
        return Side(queue, own, neurons, scorers, *self._caches(handles, side, queue), nbytes)

    def _on_cpu(self, handles: Handles, queue: Queue) -> Side:
        pieces = self._pieces(CPU)
        views = handles.add(new_context(16 * len(pieces)), ggml.ggml_free)
        neurons = {(i, piece.first): self._cold(views, i, piece) for i, piece in pieces}
        made = [
            [m for piece in block.on(CPU) for m in self._members(i, piece)] for i, block in enumerate(self.map.blocks)
        ]
        (*found,), _ = copied(handles, self.weights, queue, made)
        for i, piece in pieces:
            if found[i].tensors:  # one call computes all pieces
                neurons[i, piece.first] = Tensors(self.weights.tensors | found[i].tensors)
        return Side(queue, self.weights, neurons, {}, *self._caches(handles, CPU, queue))

    def _cold(self, views: ggml.ContextP, i: int, piece: Piece) -> Tensors:
        if len(self.map.blocks[i].pieces) == 1 or self.map.structure.ffns[i].experts:
            return self.weights  # with their copies in other layouts; of experts, the operators pick their rows
        found = viewed(views, self.weights, self.map.neurons(i, piece))
        whole = self.weights.get(n.weight_of(i, n.PREDICTOR_IN))
        return Tensors(found.tensors | ({n.weight_of(i, n.PREDICTOR_IN): whole} if whole else {}))

    def _neurons(self, i: int, piece: Piece) -> list[Slice | Made]:
        """What a device computes a piece of block `i` with."""
        return [*self.map.neurons(i, piece), *self._members(i, piece)]

    def _members(self, i: int, piece: Piece) -> list[Made]:
        """What says which experts a piece of block `i` is of, where it is not of all."""
        experts = self.map.structure.ffns[i].experts
        if piece.experts is None or not experts:
            return []
        return [Made(members_name(i, piece.span), members(piece.span, experts.count, packed=piece.side != CPU))]

    def _pieces(self, side: int) -> list[tuple[int, Piece]]:
        return [(i, piece) for i, block in enumerate(self.map.blocks) for piece in block.on(side)]

    def _scored(self, side: int) -> list[tuple[int, Piece]]:
        return [(i, p) for i in self.map.homes(side) if self.map.scored_at_home(i) for p in self.map.blocks[i].on(CPU)]

    def _caches(self, handles: Handles, side: int, queue: Queue) -> tuple[KvCache, StateCache]:
        lengths = {i: length for i, length in self.map.kv_lengths(side).items() if i in self._blocks}
        mambas = {i: m for i, m in self.map.mambas(side).items() if i in self._blocks}
        kv = handles.enter_context(KvCache(queue.backend, self._kv_type, lengths, self._n_cells))
        return kv, handles.enter_context(StateCache(queue.backend, mambas, self._n_states, self._logged))

    def begin(self, row: int) -> None:
        """Let a row of states be as before the first token, on all sides."""
        for side in self.all:
            side.states.begin(row)

    def copy_states(self, source: int, row: int) -> None:
        """Let a row of states be as another one, on all sides."""
        for side in self.all:
            side.states.copy(source, row)

    def memories(self, handles: Handles) -> list[Memory]:
        """Each side's memory for subgraphs. Where there are devices all schedules share it; on the CPU alone it goes
        with `handles`.

        A prompt's subgraphs need much of it: main memory is cheap to ask for again, a device's and what a driver copies
        from is not.
        """
        if not self.devices:
            return [handles.enter_context(Memory("main memory", plain_kinds(), SHORTER))]
        return [self._main_memory, *self._memories]

    @property
    def device_bytes(self) -> tuple[int, ...]:
        """Bytes on each device: weights, keys and values, crossing tensors, compute buffers."""
        pairs = zip(self.devices, self._memories, strict=True)
        return tuple(side.nbytes + side.kv.nbytes + side.states.nbytes + memory.size for side, memory in pairs)

    @property
    def growths(self) -> int:
        """Changes whenever schedules that were made before have lost their memory."""
        return sum(memory.growths for memory in (self._main_memory, *self._memories)) if self.devices else 0

    def close(self) -> None:
        """Free everything but the mapped weights."""
        self._handles.close()
