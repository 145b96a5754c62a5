"""Mamba-2: a causal convolution of few tokens, and a scan whose state is all that a sequence keeps of its past.

Source: Dao and Gu, "Transformers are SSMs" (arXiv:2405.21060). Shapes in comments are ggml's: the contiguous dimension
first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from runtime.bindings import ggml
from runtime.compute.builder import Builder, equal_runs
from runtime.model_file import tensor_names as n
from runtime.model_file.structure import Mamba2

_F32 = 4  # bytes


@dataclass(frozen=True)
class _Part:
    """Sequences with equally many tokens of a batch: where the first of their tokens stands, and of their numbers."""

    token: int
    length: int
    sequence: int
    sequences: int


class Mamba2Mixer:
    """The Mamba-2 mixer of block `i`."""

    def __init__(self, b: Builder, shape: Mamba2, i: int) -> None:
        self.b, self.shape, self.i = b, shape, i
        self.norm = n.in_block(i, n.ATTN_NORM)

    def replayed(self) -> None:
        """Change states as the logged tokens of one sequence, the first ones, have changed them."""
        n, log = self.b.spec.n_tokens, self._log()
        self._scanned(ggml.ggml_view_2d(self.b.ctx, log, log.ne[0], n, log.nb[1], 0), _Part(0, n, 0, 1))

    def mixed(self, x: ggml.TensorP) -> ggml.TensorP:
        """What the new tokens' mixer gives: [n_embd, n_tokens] -> as long. Changes the states of their sequences."""
        b, m = self.b, self.shape
        x = b.repacked_for_batch(x, [n.weight_of(self.i, stem) for stem in n.MAMBA_MATRICES])
        made = b.linear(x, n.in_block(self.i, n.SSM_IN))  # z, x, B, C, and a step for each head
        z = ggml.ggml_cont(b.ctx, ggml.ggml_view_2d(b.ctx, made, m.inner_length, made.ne[1], made.nb[1], 0))
        width, skipped = m.log_length, made.nb[0] * m.inner_length
        made = ggml.ggml_view_2d(b.ctx, made, width, made.ne[1], made.nb[1], skipped)
        if b.spec.logged:
            log = self._log()
            place = ggml.ggml_view_2d(b.ctx, log, width, made.ne[1], log.nb[1], 0)
            b.also(ggml.ggml_cpy(b.ctx, made, place))
        parts = [self._scanned(made, part) for part in self._parts()]
        y = reduce(lambda one, other: ggml.ggml_concat(b.ctx, one, other, 1), parts)
        y = ggml.ggml_mul(b.ctx, y, ggml.ggml_silu(b.ctx, z))
        grouped = ggml.ggml_reshape_3d(b.ctx, y, m.inner_length // m.group_count, m.group_count, y.ne[1])
        normed = ggml.ggml_rms_norm(b.ctx, grouped, b.s.norm_epsilon)
        normed = ggml.ggml_mul(b.ctx, normed, b.w[n.weight_of(self.i, n.SSM_NORM)])
        y = ggml.ggml_reshape_2d(b.ctx, normed, m.inner_length, y.ne[1])
        return b.linear(y, n.in_block(self.i, n.SSM_OUT))

    def _parts(self) -> list[_Part]:
        parts, token, sequence = [], 0, 0
        for length, count in equal_runs(self.b.spec.runs):
            parts.append(_Part(token, length, sequence, count))
            token, sequence = token + length * count, sequence + count
        return parts

    def _log(self) -> ggml.TensorP:
        assert self.b.states
        return self.b.states.log(self.i)

    def _scanned(self, made: ggml.TensorP, part: _Part) -> ggml.TensorP:
        """Of some sequences, the heads' results before gate and norm, from all that comes of the first product but z:
        [log_length, n] -> [inner_length, their tokens].
        """
        b, m, ctx = self.b, self.shape, self.b.ctx
        assert b.states
        ids, written = (
            ggml.ggml_view_1d(ctx, rows, part.sequences, part.sequence * rows.nb[0]) for rows in b.inputs.states
        )
        kept, memory = b.states.of(self.i)
        seen = self._convolved(self._of_part(made, part, 0, m.conv_channels), kept, (ids, written), part)
        step = self._of_part(made, part, m.conv_channels, m.head_count)
        step = ggml.ggml_add(ctx, ggml.ggml_cont(ctx, step), b.w[n.bias_of(self.i, n.SSM_DT)])
        x = self._split(seen, 0, m.head_length, m.head_count)
        width, group = m.group_count * m.state_length, (m.state_length, m.group_count)
        before, after = (self._split(seen, m.inner_length + k * width, *group) for k in range(2))
        scanned = ggml.ggml_ssm_scan(
            ctx,
            ggml.ggml_reshape_4d(ctx, memory, m.state_length, m.head_length, m.head_count, memory.ne[1]),
            x,
            step,
            b.w[n.in_block(self.i, n.SSM_A)],
            before,
            after,
            ids,
            1,
        )
        n_tokens = part.length * part.sequences
        size = m.inner_length * n_tokens * _F32  # the states stand behind the results
        states = ggml.ggml_view_2d(ctx, scanned, m.scan_state, part.sequences, m.scan_state * _F32, size)
        b.also(ggml.ggml_set_rows(ctx, memory, states, written))
        y = ggml.ggml_view_2d(ctx, scanned, m.inner_length, n_tokens, m.inner_length * _F32, 0)
        skipped = ggml.ggml_mul(ctx, x, b.w[n.in_block(self.i, n.SSM_D)])
        return ggml.ggml_add(ctx, y, ggml.ggml_reshape_2d(ctx, skipped, m.inner_length, n_tokens))

    def _convolved(
        self, new: ggml.TensorP, kept: ggml.TensorP, rows: tuple[ggml.TensorP, ggml.TensorP], part: _Part
    ) -> ggml.TensorP:
        """Of channels [conv_channels, n, sequences], each over its last few tokens: as long. Keeps the last ones.

        rows: of `kept`, that are read and written.
        """
        b, m, ctx = self.b, self.shape, self.b.ctx
        n_before, n_sequences = m.conv_length - 1, part.sequences
        ids, written = rows
        before = ggml.ggml_reshape_3d(ctx, ggml.ggml_get_rows(ctx, kept, ids), n_before, m.conv_channels, n_sequences)
        both = ggml.ggml_concat(ctx, before, ggml.ggml_cont(ctx, ggml.ggml_permute(ctx, new, 1, 0, 2, 3)), 0)
        last = ggml.ggml_view_3d(
            ctx, both, n_before, m.conv_channels, n_sequences, both.nb[1], both.nb[2], part.length * _F32
        )
        last = ggml.ggml_reshape_2d(ctx, ggml.ggml_cont(ctx, last), m.conv_state, n_sequences)
        b.also(ggml.ggml_set_rows(ctx, kept, last, written))
        seen = ggml.ggml_ssm_conv(ctx, both, b.w[n.weight_of(self.i, n.SSM_CONV)])
        return ggml.ggml_silu(ctx, b.biased(seen, n.in_block(self.i, n.SSM_CONV)))

    def _of_part(self, made: ggml.TensorP, part: _Part, first: int, width: int) -> ggml.TensorP:
        """Rows of the first product, of the tokens of some sequences: [width, n, sequences]."""
        row = made.nb[1]
        return ggml.ggml_view_3d(
            self.b.ctx, made, width, part.length, part.sequences, row, row * part.length,
            part.token * row + first * _F32,
        )  # fmt: skip

    def _split(self, seen: ggml.TensorP, first: int, length: int, count: int) -> ggml.TensorP:
        """Some channels as so many vectors: [length, count, n, sequences]."""
        return ggml.ggml_view_4d(
            self.b.ctx, seen, length, count, seen.ne[1], seen.ne[2], length * _F32, seen.nb[1], seen.nb[2], first * _F32
        )
