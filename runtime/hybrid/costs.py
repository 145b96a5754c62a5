"""What the planner has to know of a model file: the bytes of every part, on a device and read by the CPU, from the
file's exact sizes and frequencies.

`plan_for` is the door for whoever wants a placement for a file. Knows tensors and how often neurons fire; the choice
itself is runtime/hybrid/planner.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from runtime.bindings import ggml
from runtime.bindings.ffn_shape import FfnShape
from runtime.compute.dense_threshold import candidate_shares, expected
from runtime.compute.kv_cache import padded_cells
from runtime.errors import UserError
from runtime.hybrid.lengths import colder, longer_cuts
from runtime.hybrid.planner import BlockCosts, Device, Machine, Placement, place
from runtime.model_file import tensor_names as names
from runtime.model_file.frequencies import by_expert, of_experts
from runtime.model_file.reader import GgufFile, TensorInfo
from runtime.model_file.structure import Structure
from runtime.options import SettledOptions

# A byte of a row that is picked takes as long as this many bytes of a matrix read from end to end: 21 against 13 GB/s
# (docs/predictors.md).
SCATTERED = 1.5
LOGITS = 32  # positions whose logits a device computes at once
MARGIN = 1 << 28  # bytes left free on a device: contexts of drivers and libraries, which nobody reports
_ALIGNMENT = 256  # bytes; no backend of ggml asks for more
_ROW_PADDING = 512  # elements; CUDA pads the last row of a quantised matrix to a multiple of this
_FINE, _COARSE, _MANY = (
    32,
    256,
    4096,
)  # neurons: a device's products like multiples of 256, where that leaves enough choice
# Seconds that a device needs to find out which experts of a token it holds more of: six small operations and three
# products. Assumed, not measured.
LONGER = 20e-6
_FEWEST_BATCH = 32  # tokens from which on a device may turn a quantised matrix into F16 first

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PlanOptions:
    """What a model is planned for. budgets: bytes of each device, with bandwidths in bytes/s beside them; sync:
    seconds.

    n_positions: how many positions a token is expected to see, None for half of the context.
    reserve: bytes for compute buffers on each device that is used, None to estimate them. margin: part of the estimate,
    for what drivers take for themselves.
    scattered: how many times as long a row takes that is picked.
    """

    run: SettledOptions
    budgets: tuple[int, ...]
    device_bandwidths: tuple[float, ...]
    cpu_bandwidth: float
    sync: float = 50e-6
    n_positions: int | None = None
    reserve: int | None = None
    margin: int = MARGIN
    scattered: float = SCATTERED

    @property
    def ffn(self) -> str:
        """The mode; of `verified` that of its drafts, which are most of its work."""
        return "predicted" if self.run.predicts else self.run.ffn

    @property
    def n_ctx(self) -> int:
        """Positions of the context."""
        return self.run.n_ctx

    @property
    def n_batch(self) -> int:
        """Tokens computed at once, at most."""
        return min(self.run.n_batch, self.run.n_ctx)

    @property
    def kv_size(self) -> int:
        """Bytes of one element of keys and values."""
        return ggml.ggml_row_size(self.run.kv_type_id, 1)


@dataclass(frozen=True)
class NeuronBytes:
    """Bytes of one neuron. first: the row that decides whether it fires (gate; ungated: up); rest: the rows read if it
    does; device: all that a device holds.
    """

    first: float
    rest: float
    device: float


def plan_for(file: GgufFile, options: PlanOptions) -> Placement:
    """The fastest placement of a file's model. Raises UserError for options that make no sense."""
    blocks, head = model_costs(file, options)
    return place(blocks, head, machine_of(file.structure, options))


def machine_of(s: Structure, options: PlanOptions) -> Machine:
    """The machine that the options describe."""
    if len(options.budgets) != len(options.device_bandwidths) or not options.budgets:
        raise UserError(
            f"{len(options.budgets)} memory budgets and {len(options.device_bandwidths)} device bandwidths, "
            "expected one of each per device"
        )
    if min(options.budgets) < 0 or min(*options.device_bandwidths, options.cpu_bandwidth) <= 0 or options.sync < 0:
        raise UserError("budgets and sync cost must not be negative, bandwidths must be positive")
    reserve = reserve_of(s, options) if options.reserve is None else options.reserve
    devices = zip(options.budgets, options.device_bandwidths, strict=True)
    return Machine(tuple(Device(b, w, reserve) for b, w in devices), options.cpu_bandwidth, options.sync, LONGER)


def reserve_of(s: Structure, options: PlanOptions) -> int:
    """Bytes that a device needs beside weights, keys and values: activations of a batch, logits, a matrix in F16,
    staging, and the margin.

    An upper estimate: a graph's allocator reuses buffers of which it here gets one each.
    """
    batch, d, (ff, q) = options.n_batch, s.embedding_length, _widest(s)
    activations = 4 * batch * (4 * d + 3 * q + 3 * ff)
    mask = 2 * batch * padded_cells(options.run.cells) * len(s.windows)
    logits = 4 * s.vocab_size * min(batch, LOGITS)
    staging = 4 * 2 * batch * (2 * d + ff)  # two blocks in flight: states both ways, scores
    return activations + mask + logits + staging + scratch_of(s, options)


def scratch_of(s: Structure, options: PlanOptions) -> int:
    """Bytes that a device's backend takes beside the buffers that it is asked for: the largest matrix turned into F16,
    and the margin.
    """
    largest = 2 * s.embedding_length * max(_widest(s))
    return (largest if options.n_batch >= _FEWEST_BATCH else 0) + options.margin


def _widest(s: Structure) -> tuple[int, int]:
    """The most neurons that a token may use in a block, and the longest queries of one."""
    return max(block.n_reached for block in s.blocks), max(a.query_length for a in s.attentions.values())


def model_costs(file: GgufFile, options: PlanOptions) -> tuple[list[BlockCosts], int]:
    """The planner's blocks, and the bytes of the output head (its norm and projection included)."""
    s = file.structure
    bias = options.run.predictor_bias
    fired = expected(file, options.ffn, bias).fired
    gates = candidate_shares(file, options.ffn, bias, fired)
    blocks = [
        replace(
            _block(file, i, options, gates[i]),
            spared=_spared(file, i, options, fired[i]) if i in s.shared else 0.0,
        )
        for i in range(s.block_count)
    ]
    output = names.weight(names.TOKEN_EMBD if s.tied_output else names.OUTPUT)
    ends = (names.OUTPUT_NORM, names.OUTPUT_PROJ)
    head = (output, *(name for name in file.tensors if name.startswith(ends)))
    return blocks, sum(_stored(file.tensors[name]) for name in head)


def candidates(freq: Floats, share: float) -> Floats:
    """How often each neuron is a predictor's candidate, if `share` of all are on average: in proportion to how often it
    fires, at most always.

    What is left where even all that ever fire are not enough is spread over the others.
    """
    wanted = share * len(freq)
    live = int((freq > 0).sum())
    if wanted >= live:
        rest = (wanted - live) / max(1, len(freq) - live)
        return np.where(freq > 0, 1.0, min(1.0, rest))
    # The hottest n are always candidates and the others in proportion: the first n for which none of the others is
    # above 1.
    colder = np.append(np.cumsum(freq[::-1])[::-1], 0.0)
    factors = (wanted - np.arange(live)) / colder[:live]
    n = int(np.argmax(factors * freq[:live] <= 1))
    shares: Floats = np.minimum(1.0, factors[n] * freq)
    return shares


def cuts_of(n_ff: int, block_size: int) -> tuple[int, ...]:
    """The prefixes that a device can hold: whole blocks of the down projection's type, in steps of 32 or 256 neurons;
    and all.
    """
    step = max(block_size, _COARSE if n_ff >= _MANY else _FINE)
    return (*range(0, n_ff, step), n_ff)


def read_bytes(
    ffn: str, neuron: NeuronBytes, freq: Floats, candidate: Floats, scattered: float, shares: Floats | float = 1.0
) -> Floats:
    """Bytes that the CPU reads of each neuron for one token, on average, if the CPU has it: as if rows that are picked
    were `scattered` times as long.

    freq, candidate: how often each neuron fires, and has its first row read. shares: how often its expert is used; all
    of one shape.
    """
    always = np.broadcast_to(np.asarray(shares, np.float64), freq.shape)
    if ffn == "dense":
        return neuron.device * always
    # Where most neurons are read, rows follow each other.
    picked, fired = np.minimum(always, scattered * candidate), np.minimum(always, scattered * freq)
    read: Floats = neuron.first * (picked if ffn == "predicted" else always) + neuron.rest * fired
    return read


def _block(file: GgufFile, i: int, options: PlanOptions, share: float) -> BlockCosts:
    s, tensors = file.structure, _tensors(file, i)
    attention, ffn = s.attentions.get(i), s.blocks[i].ffn
    always = [t for name, t in tensors.items() if name.startswith(_ALWAYS_READ)]
    kv = 2 * attention.kv_length * options.kv_size if attention else 0
    positions = options.n_ctx / 2 if options.n_positions is None else options.n_positions
    if attention and attention.window:
        positions = min(positions, attention.window)
    mamba = s.mambas.get(i)
    state = mamba.state_bytes if mamba else 0
    stored = sum(map(_stored, always)) + _slack(tensors) + kv * padded_cells(options.run.cells)
    stored += mamba.held_bytes(options.run.kept_states, options.run.logged) if mamba else 0
    read = sum(t.nbytes for t in always) + kv * positions + 2 * state  # which is written, too
    block = BlockCosts(stored=stored, read=read, predictor=0, neurons=0, cuts=(0,), hot=(0,), cold=(0.0,))
    return _with_neurons(block, ffn, file, i, options, share) if ffn else block


def _spared(file: GgufFile, i: int, options: PlanOptions, fired: float) -> float:
    """Bytes of a shared expert that the CPU does not read and a device does, which computes all of it."""
    tensors, shared = _tensors(file, i), file.structure.shared[i]
    if options.ffn == "dense":
        return 0.0
    _, *rest = (tensors[names.weight(stem)].nbytes for stem in names.row_matrices(shared))
    return (1 - min(1.0, options.scattered * fired)) * sum(rest)


_ALWAYS_READ = (
    "attn_",
    "ssm_",
    names.FFN_NORM,
    names.bias(names.FFN_DOWN),
    *names.ROUTERS,
    *names.LATENTS,
    *names.SHARED_MATRICES,
)


def _with_neurons(
    block: BlockCosts, ffn: FfnShape, file: GgufFile, i: int, options: PlanOptions, share: float
) -> BlockCosts:
    tensors, n, stems, experts = _tensors(file, i), ffn.expert_length, names.stems(ffn), ffn.experts
    count, used = (experts.count, experts.used) if experts else (1, 1)
    predicted = options.ffn == "predicted" and file.structure.rank(i) > 0
    # What the CPU reads of a predictor for each of its neurons, where no device computes the scores.
    own = (stems.predictor_sign, names.weight(stems.predictor_out)) if experts else (stems.predictor_sign,)
    scored = sum(tensors[name].nbytes for name in own if predicted and name in tensors) / ffn.n_ff
    inner = tensors[names.weight(names.PREDICTOR_IN)].nbytes if predicted and experts else 0
    down = tensors.get(names.weight(stems.down)) if file.structure.layout == "both" else None
    cuts = cuts_of(n, _block_size(down)) if down else (0,)
    neuron, freq, shares = _neuron(ffn, tensors), by_expert(file, i), of_experts(file, i)
    always = np.broadcast_to(shares[:, None], freq.shape)
    candidate = always * candidates(freq.sum(0) / used, share) if predicted else always
    mode = "predicted" if predicted else _exact(options.ffn)
    read = read_bytes(mode, neuron, freq, candidate, options.scattered, always) + scored * always
    cold = colder(read).sum(0)
    longer = longer_cuts(read, shares, cuts, used, neuron.device, inner) if experts else ()
    return replace(
        block,
        # The pieces of a second length, and what finds their experts.
        stored=block.stored + (_slack(tensors) + 4 * count**2 + _ALIGNMENT if longer else 0),
        predictor=_predictor(tensors) if predicted and not scored else 0,
        neurons=n,
        cuts=cuts,
        hot=tuple(round(neuron.device * k * count) for k in cuts),
        cold=tuple(float(cold[k]) + inner * (k < n) for k in cuts),
        hot_read=used / count,
        longer=longer,
    )


def _tensors(file: GgufFile, i: int) -> dict[str, TensorInfo]:
    """Those of block `i`, by short name."""
    return {at[1]: t for name, t in file.tensors.items() if (at := names.parsed(name)) and at[0] == i}


def _exact(ffn: str) -> str:
    return "exact" if ffn == "predicted" else ffn


def _neuron(ffn: FfnShape, tensors: Mapping[str, TensorInfo]) -> NeuronBytes:
    def row(*short: str) -> float:
        return sum(tensors[name].nbytes for name in short if name in tensors) / ffn.n_ff

    first, *rest = (names.weight(stem) for stem in names.row_matrices(ffn))
    stems = names.stems(ffn)
    biases = row(names.bias(stems.gate), names.bias(stems.up))
    device = row(*(names.weight(stem) for stem in stems.matrices))
    return NeuronBytes(row(first) + biases, row(*rest), device + biases)


def _predictor(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(_stored(t) for name, t in tensors.items() if name.startswith("predictor_"))


def _slack(tensors: Mapping[str, TensorInfo]) -> int:
    """Alignment and padding of the pieces of the FFN's tensors on a device."""
    return sum(_ALIGNMENT + _padding(t) for name, t in tensors.items() if name.startswith(names.MULTIPLIED))


def _stored(t: TensorInfo) -> int:
    """Bytes of a whole tensor on a device, padded and aligned."""
    return _padded(t.nbytes + _padding(t), _ALIGNMENT)


def _padding(t: TensorInfo) -> int:
    block = _block_size(t)
    return 0 if block == 1 else ggml.ggml_row_size(t.type_id, _ROW_PADDING)


def _block_size(t: TensorInfo) -> int:
    return int(ggml.ggml_blck_size(t.type_id))


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
