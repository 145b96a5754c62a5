"""Our own operators as nodes of a ggml graph: the sparse FFN and the choice of its candidates.

Shapes in comments are ggml's: the contiguous dimension first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.bindings import ggml, pager, sparse_ffn
from runtime.compute.paging import Paging

# What our own operators point to.
Userdata = sparse_ffn.Product | sparse_ffn.Attention | pager.Fetch


@dataclass(frozen=True)
class NativeTensors:
    """The rows of one FFN. Ungated: `gate` holds the up rows and `gate_bias` their bias; `up` is absent."""

    gate: ggml.TensorP
    down: ggml.TensorP
    up: ggml.TensorP | None = None
    gate_bias: ggml.TensorP | None = None
    up_bias: ggml.TensorP | None = None

    @property
    def types(self) -> tuple[int, int, int]:
        """ggml types of the gate, up and down rows."""
        return self.gate.type, (self.up or self.gate).type, self.down.type

    @property
    def strides(self) -> tuple[int, int, int]:
        """Bytes from one row of each to the next."""
        return self.gate.nb[1], (self.up or self.gate).nb[1], self.down.nb[1]

    @property
    def bundled(self) -> bool:
        """Whether all rows of a neuron lie side by side."""
        return self.gate.nb[1] > ggml.ggml_row_size(self.gate.type, self.gate.ne[0])


@dataclass(frozen=True)
class Chosen:
    """Which of an FFN's ranges of rows each token scans, and what their neurons are multiplied by.

    `sparse_ffn.divide` gives the FFN its table of ranges.
    A token's ranges must not overlap; an index outside of the table stands for no range.
    """

    ranges: ggml.TensorP  # I32 [k, n_tokens], k <= sparse_ffn.MAX_RANGES
    weights: ggml.TensorP  # F32 [k, n_tokens]


@dataclass(frozen=True)
class Asking:
    """Asks for rows that are read from the file. kept: what must live as long as the graph."""

    paging: Paging
    kept: list[Userdata]

    def rows(
        self,
        ctx: ggml.ContextP,
        a: ggml.TensorP,
        b: ggml.TensorP,
        what: int,
        matrices: tuple[ggml.TensorP | None, ...],
        ffn: sparse_ffn.Ffn,
    ) -> ggml.TensorP:
        """a, to be used from here on: then the rows are there. See `lzn_fetch_rows` for a and b."""
        return self._added(ctx, a, b, self.paging.rows(what, matrices, ffn))

    def whole(self, ctx: ggml.ContextP, x: ggml.TensorP, matrices: Sequence[ggml.TensorP]) -> ggml.TensorP:
        """x, to be used from here on: then whole matrices are there."""
        return self._added(ctx, x, x, self.paging.whole(matrices))

    def _added(self, ctx: ggml.ContextP, a: ggml.TensorP, b: ggml.TensorP, fetch: pager.Fetch) -> ggml.TensorP:
        self.kept.append(fetch)
        operator = sparse_ffn.operator("fetch_rows")
        return ggml.ggml_map_custom2_inplace(ctx, a, b, operator, 1, pager.address_of(fetch))


def add_native_ffn(
    ctx: ggml.ContextP,
    x: ggml.TensorP,
    ffn: sparse_ffn.Ffn,
    t: NativeTensors,
    candidates: ggml.TensorP | None = None,
    chosen: Chosen | None = None,
    gates: ggml.TensorP | None = None,
    asking: Asking | None = None,
) -> ggml.TensorP:
    """Add the operators of one sparse FFN: F32 [n_embd, n_tokens] -> its product, F32 [product_length, n_tokens].

    candidates: from `add_predictor`, or None for every neuron. chosen: where the FFN is divided into ranges.
    gates: those of all neurons, without bias, F32 [n_ff, n_tokens]; for more than FEW_TOKENS tokens. asking: where rows
    have to be asked for.
    `ffn` must outlive the graph, and counts its tokens.
    """
    n, made = x.ne[1], ffn.n_embd + ffn.squares
    sparse_ffn.count(ffn, n)
    ffn.scored = gates is not None
    few, quantized = n <= sparse_ffn.FEW_TOKENS, _custom(ctx, ffn, "quantize", ggml.I8, (ffn.x_stride, n), x)
    scanned = quantized
    if asking:
        # Of rows side by side, one read has all; else those that follow the gates are read of neurons that fire.
        at_once = not few or (t.bundled and candidates is not None)
        read = (t.gate if gates is None else None, *((t.down, t.up) if at_once else ()))
        if candidates is not None:
            candidates = asking.rows(ctx, candidates, quantized, pager.CANDIDATES, read, ffn)
        else:
            seen = chosen.ranges if chosen else quantized
            scanned = asking.rows(ctx, quantized, seen, pager.ALL, read, ffn)
    first = (
        t.gate if gates is None else gates,
        t.gate_bias,
        candidates,
        *((chosen.ranges, chosen.weights) if chosen else ()),
    )
    rest = (t.down, t.up, t.up_bias)
    if few:
        assert gates is None
        gate = _custom(ctx, ffn, "gate", ggml.I8, (sparse_ffn.gate_size(ffn, n), 1), scanned, *first)
        if asking and not at_once:
            gate = asking.rows(ctx, gate, quantized, pager.FIRED, (t.down, t.up), ffn)
        sums = _custom(ctx, ffn, "down", ggml.I8, (sparse_ffn.down_size(ffn, n), 1), quantized, gate, *rest)
        return _custom(ctx, ffn, "reduce", ggml.F32, (made, n), sums)
    size = -(-sparse_ffn.down_size(ffn, n) // 4)
    sums = _custom(ctx, ffn, "tokens", ggml.F32, (size, 1), scanned, *first, *rest)
    if sparse_ffn.tokens_alone(ffn, n):
        return ggml.ggml_view_2d(ctx, sums, made, n, 4 * made, 0)
    return _custom(ctx, ffn, "reduce", ggml.F32, (made, n), sums)


def add_predictor(
    ctx: ggml.ContextP,
    x: ggml.TensorP,
    ffn: sparse_ffn.Ffn,
    rows: ggml.TensorP,
    bias: ggml.TensorP,
    shift: float,
    chosen: Chosen | None = None,
) -> ggml.TensorP:
    """Add the operator that chooses an FFN's candidates: x F32 [rank, n_tokens] against predictor rows [rank, n_ff].

    Rows of type I8 are sign bits, and x is then F32 [n_embd, n_tokens]. chosen: as in `add_native_ffn`.
    """
    signs = rows.type == ggml.I8
    sparse_ffn.predict(ffn, x.ne[0], None if signs else rows.type, shift)
    size, ranges = sparse_ffn.predict_size(ffn, x.ne[1]), chosen.ranges if chosen else None
    return _custom(ctx, ffn, "predict_sign" if signs else "predict", ggml.I8, (size, 1), x, rows, bias, ranges)


def add_choice(
    ctx: ggml.ContextP,
    scores: ggml.TensorP,
    ffn: sparse_ffn.Ffn,
    bias: ggml.TensorP,
    shift: float,
    chosen: Chosen | None = None,
) -> ggml.TensorP:
    """Add the operator that chooses an FFN's candidates by given scores F32 [n_ff, n_tokens]; see `add_predictor`."""
    sparse_ffn.choose(ffn, shift)
    size, ranges = sparse_ffn.predict_size(ffn, scores.ne[1]), chosen.ranges if chosen else None
    return _custom(ctx, ffn, "choose", ggml.I8, (size, 1), scores, bias, ranges)


def add_product(
    ctx: ggml.ContextP, x: ggml.TensorP, weights: ggml.TensorP, product: sparse_ffn.Product
) -> ggml.TensorP:
    """Add the product of a matrix [n_in, n_out] as it is stored: x F32 [n_in, n_tokens] -> F32 [n_out, n_tokens].

    Each token has the same bits in any batch. `product` must outlive the graph.
    """
    n = x.ne[1]
    size = -(-sparse_ffn.product_size(product, n) // 4)
    made = _custom(ctx, product, "multiply", ggml.F32, (size, 1), x, weights)
    return ggml.ggml_view_2d(ctx, made, product.n_out, n, 4 * product.n_out, 0)


def add_tiled(ctx: ggml.ContextP, x: ggml.TensorP, matrix: sparse_ffn.Tiles) -> ggml.TensorP:
    """Add the operator that rounds x F32 [n_in, n_tokens] to 8 bits, for products with matrices of one type."""
    return _custom(ctx, matrix, "tiles_arrange", ggml.I8, (sparse_ffn.tiles_size(matrix, x.ne[1]), 1), x)


def add_tiled_product(
    ctx: ggml.ContextP, tiled: ggml.TensorP, weights: ggml.TensorP, matrix: sparse_ffn.Tiles, n_tokens: int
) -> ggml.TensorP:
    """Add the product of a matrix [n_in, n_out] as it is stored with many tokens: F32 [n_out, n_tokens].

    tiled: from `add_tiled`. A token has the same bits in any batch.
    """
    return _custom(ctx, matrix, "tiles_multiply", ggml.F32, (matrix.n_out, n_tokens), tiled, weights)


def add_attention(
    ctx: ggml.ContextP,
    q: ggml.TensorP,
    keys: ggml.TensorP,
    values: ggml.TensorP,
    mask: ggml.TensorP,
    shape: sparse_ffn.Attention,
) -> ggml.TensorP:
    """Add an attention of up to FEW_TOKENS tokens: q F32 [head_length, n_heads, n_tokens] over keys and values F16
    [head_length, n_cells, n_heads_kv] -> F32 [head_length * n_heads, n_tokens].

    mask: F16 [n_cells, n_tokens]. Each token has the same bits in any batch. `shape` must outlive the graph.
    """
    n, width = q.ne[2], shape.head_length * shape.n_heads
    size = -(-sparse_ffn.attention_size(shape, n) // 4)
    made = _custom(ctx, shape, "attend", ggml.F32, (size, 1), q, keys, values, mask)
    return ggml.ggml_view_2d(ctx, made, width, n, 4 * width, 0)


def _custom(
    ctx: ggml.ContextP,
    what: sparse_ffn.Ffn | sparse_ffn.Product | sparse_ffn.Tiles | sparse_ffn.Attention,
    name: str,
    type_id: int,
    ne: tuple[int, int],
    *sources: ggml.TensorP | None,
) -> ggml.TensorP:
    given = [s for s in sources if s is not None]
    args = (ggml.TensorP * len(given))(*given)
    address = sparse_ffn.address_of(what)
    n_tasks = ggml.N_TASKS_MAX if isinstance(what, sparse_ffn.Tiles) else what.n_threads
    return ggml.ggml_custom_4d(ctx, type_id, *ne, 1, 1, args, len(given), sparse_ffn.operator(name), n_tasks, address)
