"""Builds schedules: the subgraphs of each side, and the steps that compute them and carry tensors between them.

Hidden states start in main memory. Each block is computed at its home; where some of its neurons lie elsewhere, the
block is cut at its FFN: the input goes to the sides that hold a share of the neurons, and their products come back and
are added at home. Whatever stays on one side is one subgraph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

from runtime.base.closing import Handles
from runtime.bindings import ggml, sparse_ffn
from runtime.compute.blocks import AtFfn, Blocks
from runtime.compute.builder import Builder, GraphSpec, Inputs, equal_runs
from runtime.compute.ffns import ffn_of
from runtime.compute.ffns.neurons import FfnInputs
from runtime.compute.mixers.mamba2 import Mamba2Mixer
from runtime.compute.operators import Chosen, Userdata
from runtime.compute.repack import Repacked
from runtime.hybrid.schedule import Compute, Download, InOneOrder, Schedule, SetMark, Step, Upload, Wait
from runtime.hybrid.sides import Sides
from runtime.hybrid.subgraphs import Subgraph, Subgraphs, check_supported
from runtime.hybrid.tensor_map import CPU, Piece

_TENSORS_PER_BLOCK = 20  # that cross, on one side, beside those of each piece
_EXPERTS, _WEIGHTS = "experts", "weights of experts"  # roles of each token's choice


def build(spec: GraphSpec, sides: Sides, scratch: Repacked | None = None) -> Schedule:
    """The schedule of a spec. Raises UserError where memory does not suffice, and for what a device cannot compute.

    Other schedules of the same sides may lose their memory by it: see `Sides.growths`.
    """
    with Handles() as handles:
        s = sides.map.structure
        n_tensors = 64 + _TENSORS_PER_BLOCK * s.block_count + 8 * sum(len(b.pieces) for b in sides.map.blocks)
        graphs = [handles.enter_context(Subgraphs(m, n_tensors)) for m in sides.memories(handles)]
        building = _Building(spec, sides, graphs, scratch)
        if spec.replays:
            building.replay()
        result = None if spec.replays else building.all()
        for side, there in zip(sides.all, graphs, strict=True):
            for subgraph in there.all:
                check_supported(subgraph.graph, side.queue.device)
        for there in graphs:
            there.allocate()
        return Schedule(
            spec,
            (building.input, *building.inputs[CPU].tensors),
            result,
            building.steps,
            [d.queue for d in sides.devices],
            building.ffns,
            building.products,
            building.taps,
            scratch,
            sides.cpu.queue.trace,
            sum(there.nbytes for there in graphs),
            handles.pop_all(),
        )


class _Building:
    """One schedule while it is built: where the hidden states are, the subgraph that is open there, and the steps so
    far.
    """

    def __init__(self, spec: GraphSpec, sides: Sides, graphs: list[Subgraphs], scratch: Repacked | None) -> None:
        self._spec, self._sides, self._graphs, self._scratch = spec, sides.all, graphs, scratch
        self._map, self._s, self._choices = sides.map, sides.map.structure, sides.choices
        self._paging = sides.weights.paging
        self._first = spec.first or 0
        self._end = self._s.block_count if spec.end is None else spec.end
        few = spec.n_tokens <= sparse_ffn.FEW_TOKENS and spec.run.by_rows
        self.steps: list[Step] = [InOneOrder(sides.cpu.queue, few or spec.run.deterministic)]
        self.ffns: dict[int, list[sparse_ffn.Ffn]] = {}
        self.products: list[Userdata] = []
        self.taps: dict[str, ggml.TensorP] = {}
        self.inputs = {side: self._new_inputs(side) for side in range(len(self._sides)) if self._computes(side)}
        for side in self.inputs:
            if side != CPU:
                pairs = zip(self.inputs[side].tensors, self._sources(side), strict=True)
                self.steps += [Upload(self._sides[side].queue, source, target) for target, source in pairs]
        self._side = CPU
        self._open: Subgraph | None = None
        self._downloads: list[Step] = []
        self._at = self._first  # the next block
        self._held: list[int] = []  # the blocks that the open subgraph holds, or a part of
        self._front = spec.first is None  # whether it holds the embeddings

    # --- inputs ------------------------------------------------------------------------------------------------------

    def _computes(self, side: int) -> bool:
        return side == CPU or any(self._first <= i < self._end for i in self._map.homes(side))

    def _new_inputs(self, side: int) -> Inputs:
        spec, there = self._spec, self._graphs[side]
        n, attentions, homes = spec.n_tokens, self._s.attentions, self._map.homes(side)
        windows = sorted({a.window for i, a in attentions.items() if side == CPU or i in homes})
        return Inputs(
            positions=there.at("positions", n, 1, ggml.I32),
            cells=there.at("cells", n, 1, ggml.I64),
            outputs=there.at("outputs", spec.n_outputs, 1, ggml.I32),
            masks={w: there.at(f"mask {w}", spec.n_kv, n, ggml.F16) for w in windows},
            states=tuple(there.at(f"states {k}", len(spec.runs), 1, ggml.I32) for k in range(2) if spec.runs),
        )

    def _sources(self, side: int) -> list[ggml.TensorP]:
        """What a device's inputs are copied from, in the order of `Inputs.tensors`."""
        host, masks = self.inputs[CPU], sorted(self.inputs[side].masks)
        return [host.positions, host.cells, host.outputs, *host.states, *(host.masks[w] for w in masks)]

    # --- the whole ---------------------------------------------------------------------------------------------------

    def all(self) -> ggml.TensorP:
        """Add everything; returns where the result is found in main memory: logits, or hidden states."""
        spec, host = self._spec, self._graphs[CPU]
        if spec.first is None:
            self.input = host.at("tokens", spec.n_tokens, 1, ggml.I32)
            x = self._blocks().embeddings(self.input)
        else:
            self.input = x = host.at("input", self._s.embedding_length, spec.n_tokens)
        for i in range(self._first, self._end):
            x = self._block(self._moved(x, self._map.blocks[i].home), i)
        if spec.end is None:
            x = self._moved(x, self._map.head)
            x = self._blocks().head(x)
        result = self._left(x, "result")
        self._ended(last=True)
        return result

    def replay(self) -> None:
        """Add what changes states as logged tokens did; there is no result."""
        self.input = self._graphs[CPU].at("tokens", self._spec.n_tokens, 1, ggml.I32)
        self._front = False
        for side in self.inputs:
            self._side = side
            for i, shape in self._map.mambas(side).items():
                self._held.append(i)
                Mamba2Mixer(self._builder(), shape, i).replayed()
            if self._open:
                self.steps += self._ended()

    def _moved(self, x: ggml.TensorP, side: int) -> ggml.TensorP:
        """Hidden states on another side."""
        if side == self._side:
            return x
        host = self._left(x, "hidden")
        self.steps += self._ended()
        self._side = side
        return self._uploaded(side, "hidden", host)

    def _block(self, x: ggml.TensorP, i: int) -> ggml.TensorP:
        """The whole of block `i`, at its home."""
        self._at = i
        blocks = self._blocks()
        self._held.append(i)
        if self._s.blocks[i].ffn is None:
            return blocks.block(x, i)
        at = blocks.until_ffn(x, i)
        if blocks.b.ffns:  # a shared expert's
            self.ffns.setdefault(i, []).extend(blocks.b.ffns.values())
        if self._spec.tapped:
            roles = {"ffn_input": at.inputs.x, "residual": at.inputs.stream}
            if chosen := at.inputs.chosen:
                roles |= {_EXPERTS: chosen.ranges, _WEIGHTS: chosen.weights}
            if (beside := self._s.blocks[i].shared) and (made := blocks.b.taps.get("gate" if beside.gated else "up")):
                roles["shared"] = made
            self.taps |= {role: self._left(t, role) for role, t in roles.items()}
        if self._map.blocks[i].divided:
            at, product = self._divided(at, i)
        else:
            product = self._share(self._subgraph(), self._side, at.inputs, i)
        return self._blocks().after_ffn(at, product, i)

    # --- an FFN on several sides -------------------------------------------------------------------------------------

    def _divided(self, at: AtFfn, i: int) -> tuple[AtFfn, ggml.TensorP]:
        """Compute the FFN of block `i` on all sides that have neurons of it: where the block goes on at home, and the
        FFN's product.
        """
        home, there, d = self._side, self._graphs[self._side], self._s.embedding_length
        width = self._s.ffns[i].n_embd  # of latent experts another one
        given = at.inputs
        n = given.x.ne[1]
        sides = self._map.blocks[i].sides
        there.keep(self._subgraph(), at.residual, "kept residual")
        x = self._left(given.x, "x")
        stream = self._left(given.stream, "stream") if self._sees_stream(i) else x
        chosen = self._left_choice(given.chosen) if given.chosen else None
        self._leave_scores(given, i)
        arrived = self._ended()
        if home != CPU and home in sides:  # which goes on while the CPU waits
            at_home = there.at("x", width, n)
            self._compute_share(home, FfnInputs(at_home, at_home, self._choice_on(home, chosen)), i)
        self.steps += arrived
        waits: list[Step] = []
        for side in (side for side in sides if side not in (CPU, home)):
            there_x, there_chosen = self._uploaded(side, "x", x), self._uploaded_choice(side, chosen)
            product = self._compute_share(side, FfnInputs(there_x, there_x, there_chosen), i)
            waits += self._fetched(side, [self._download(side, product, _product_of(side))])
        if CPU in sides:
            self._compute_share(CPU, FfnInputs(x, stream, chosen), i)
        self.steps += waits
        self._at = i + 1
        length, host = self._s.ffns[i].product_length, self._graphs[CPU]
        others = [
            self._uploaded(home, _product_of(side), host.at(_product_of(side), length, n))
            for side in sides
            if side != home
        ]
        products = [self._sum(others)] if others else []
        if home in sides:
            products.insert(0, there.at(_product_of(home), length, n))
        residual, x = there.at("kept residual", d, n), there.at("x", width, n)
        return AtFfn(FfnInputs(x, residual), residual), self._sum(products)

    def _sees_stream(self, i: int) -> bool:
        """Whether the CPU chooses among neurons of block `i` by the hidden states before the FFN's norm."""
        s, here = self._s, bool(self._map.blocks[i].on(CPU)) and not self._map.scored_at_home(i)
        return here and self._predicts and s.rank(i) > 0 and s.predictor_tap == "residual"

    @property
    def _predicts(self) -> bool:
        return self._map.predicted and self._spec.run.chooses

    def _scored_at_home(self, i: int) -> bool:
        return self._predicts and self._map.scored_at_home(i)

    def _leave_scores(self, given: FfnInputs, i: int) -> None:
        """Where a device is home to block `i`: the predictor's scores of the CPU's neurons."""
        if not self._scored_at_home(i):
            return
        seen = given.stream if self._s.predictor_tap == "residual" else given.x
        for k, piece in enumerate(self._map.blocks[i].on(CPU)):
            builder = replace(self._builder(), w=self._sides[self._side].scorers[i, piece.first])
            self._left(ffn_of(builder, i).scores(seen), f"scores {k}")

    def _compute_share(self, side: int, given: FfnInputs, i: int) -> ggml.TensorP:
        """Compute a side's share of block `i`'s product; it lies there as `_product_of` that side."""
        there = self._graphs[side]
        subgraph = there.new(len(self._map.blocks[i].on(side)))
        subgraph.name = f"{'cold' if side == CPU else 'hot'} {i}"
        product = there.keep(subgraph, self._share(subgraph, side, given, i), _product_of(side))
        self.steps.append(Compute(self._sides[side].queue, subgraph))
        return product

    def _share(self, subgraph: Subgraph, side: int, given: FfnInputs, i: int) -> ggml.TensorP:
        """The product of block `i`'s neurons on a side, from what the FFN reads there."""
        pieces = self._map.blocks[i].on(side)
        # Our own operators take each expert's neurons from where they begin: one call does them all.
        at_once = side == CPU and self._map.blocks[i].of_some_experts
        groups = [pieces] if at_once else [(piece,) for piece in pieces]
        products = [self._piece(subgraph, group, given, i, k) for k, group in enumerate(groups)]
        return reduce(lambda a, b: ggml.ggml_add(subgraph.ctx, a, b), products)

    def _piece(self, subgraph: Subgraph, group: Sequence[Piece], given: FfnInputs, i: int, k: int) -> ggml.TensorP:
        """The product of block `i`'s piece number `k` on a side, or of several that are computed at once."""
        piece = group[0]
        side = self._sides[piece.side]
        whole = i in self._map.whole_on_cpu
        spec = self._spec_on(piece.side) if whole else replace(self._spec_on(piece.side), dense_from=())
        ffns: dict[int, sparse_ffn.Ffn] = {}
        scratch = self._scratch if whole else None
        builder = Builder(
            subgraph.ctx,
            self._s,
            side.neurons[i, piece.first],
            None,
            spec,
            self.inputs[CPU],
            side.queue.device,
            piece.side == CPU,
            scratch,
            ffns,
            self.products,
            choices=self._choices,
            paging=self._paging,
        )
        ffn = ffn_of(builder, i, [p.span for p in group])
        if piece.side == CPU and self._scored_at_home(i):
            scores = self._graphs[CPU].at(f"scores {k}", piece.length, given.x.ne[1])
            product = ffn.native(given.x, ffn.chosen(scores))
        else:
            product = ffn.product(given)
        if spec.tapped:
            self.taps |= {role: self._left(t, role) for role, t in builder.taps.items()}
        if ffns:
            self.ffns.setdefault(i, []).extend(ffns.values())
        return product

    def _sum(self, products: list[ggml.TensorP]) -> ggml.TensorP:
        return reduce(lambda a, b: ggml.ggml_add(self._subgraph().ctx, a, b), products)

    # --- the open subgraph -------------------------------------------------------------------------------------------

    def _subgraph(self) -> Subgraph:
        """The open subgraph on the present side."""
        if self._open is None:
            self._open = self._graphs[self._side].new(self._room())
        return self._open

    def _room(self) -> int:
        """How many blocks a subgraph that is opened now may hold; both ends, and each piece, count as one."""
        blocks = self._map.blocks[self._at : self._end]
        cut = next((k for k, b in enumerate(blocks) if b.divided or b.home != blocks[0].home), len(blocks))
        groups = len(equal_runs(self._spec.runs))  # which a Mamba block computes one after the other
        return 2 + sum(max(1, len(b.pieces)) + groups for b in blocks[: cut + 1])

    def _spec_on(self, side: int) -> GraphSpec:
        return (
            self._spec if side == CPU else replace(self._spec, run=replace(self._spec.run, ffn="dense"), dense_from=())
        )

    def _builder(self) -> Builder:
        side, inputs = self._sides[self._side], self.inputs.get(self._side, self.inputs[CPU])
        there, spec = self._subgraph(), self._spec_on(self._side)
        own = self._side == CPU
        scratch = self._scratch if own else None
        return Builder(
            there.ctx, self._s, side.tensors, side.kv, spec, inputs, side.queue.device, own, scratch, {},
            self.products, paging=self._paging, states=side.states, graph=there.graph,
        )  # fmt: skip

    def _blocks(self) -> Blocks:
        return Blocks(self._builder())

    def _ended(self, last: bool = False) -> list[Step]:
        """Compute the open subgraph and fetch what was left; returns what to wait for before that is read. last:
        `Schedule.run` waits.
        """
        subgraph, downloads = self._subgraph(), self._downloads
        subgraph.name = self._name(last)
        self.steps.append(Compute(self._sides[self._side].queue, subgraph))
        self._open, self._downloads, self._held, self._front = None, [], [], False
        if not last:
            return self._fetched(self._side, downloads)
        self.steps += downloads
        return []

    def _name(self, last: bool) -> str:
        """What a trace calls the open subgraph."""
        head, held = last and self._spec.end is None, sorted({*self._held[:1], *self._held[-1:]})
        if self._front or head:
            return "model" if self._front and head else "front" if self._front else "head"
        return f"block{'s' if len(held) > 1 else ''} {'-'.join(map(str, held))}" if held else "sum"

    # --- between sides -----------------------------------------------------------------------------------------------

    def _left(self, x: ggml.TensorP, role: str) -> ggml.TensorP:
        """Keep a result of the open subgraph; returns where it is found in main memory."""
        kept = self._graphs[self._side].keep(self._subgraph(), x, role)
        if self._side != CPU:
            self._downloads.append(self._download(self._side, kept, role))
        return self._graphs[CPU].like(role, kept)

    def _left_choice(self, chosen: Chosen) -> Chosen:
        """Keep each token's experts; returns where they are found in main memory."""
        return Chosen(self._left(chosen.ranges, _EXPERTS), self._left(chosen.weights, _WEIGHTS))

    def _choice_on(self, side: int, chosen: Chosen | None) -> Chosen | None:
        """Where each token's experts lie on the side that chose them; None where there are none."""
        if chosen is None:
            return None
        there = self._graphs[side]
        return Chosen(there.like(_EXPERTS, chosen.ranges), there.like(_WEIGHTS, chosen.weights))

    def _uploaded_choice(self, side: int, chosen: Chosen | None) -> Chosen | None:
        """Each token's experts on another side; None where there are none."""
        if chosen is None:
            return None
        return Chosen(self._uploaded(side, _EXPERTS, chosen.ranges), self._uploaded(side, _WEIGHTS, chosen.weights))

    def _download(self, side: int, tensor: ggml.TensorP, role: str) -> Download:
        return Download(self._sides[side].queue, tensor, self._graphs[CPU].like(role, tensor))

    def _fetched(self, side: int, downloads: list[Step]) -> list[Step]:
        """Let a device make some downloads; returns what to wait for before they are read."""
        if not downloads:
            return []
        mark = SetMark(self._sides[side].queue)
        self.steps += [*downloads, mark]
        return [Wait(mark)]

    def _uploaded(self, side: int, role: str, source: ggml.TensorP) -> ggml.TensorP:
        """A tensor of main memory on another side."""
        if side == CPU:
            return source
        target = self._graphs[side].like(role, source)
        self.steps.append(Upload(self._sides[side].queue, source, target))
        return target


def _product_of(side: int) -> str:
    return f"product {side}"
