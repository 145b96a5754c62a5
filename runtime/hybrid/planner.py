"""Which part of a model goes to which device: a cost model and its exact optimum.

Pure arithmetic on bytes and bandwidths: knows nothing of files, of ggml or of how a placement is carried out.
docs/hybrid.md explains the model.

A device holds the last blocks (attention, keys and values, norms, predictor), of each of these the k hottest neurons of
the FFN (with experts, of each of them, and more of some), and the head.
A block takes: its attention, then max(hot neurons on the device, cold neurons on the CPU), then `sync` if it needs both
sides.
The last term vanishes where a block is wholly on one side, so gains do not diminish and a greedy choice can be wrong
(tests/test_placement.py has an instance): the choice is a multiple-choice knapsack and is solved by dynamic programming
over the blocks and the units of the budget.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.hybrid.knapsack import Seconds, Sizes, Solver
from runtime.hybrid.lengths import Longer, LongerCut, expected_max


@dataclass(frozen=True)
class BlockCosts:
    """One transformer block, in bytes. Neurons are stored hottest first, so that a device holds a prefix of them.

    stored: what a device must hold whatever its share of the FFN (attention, norms, biases, keys and values, padding).
    read: how much of that one token reads. predictor: stored and read where a predictor chooses among neurons on the
    CPU.
    neurons: n_ff, or those of one expert. cuts: the prefixes that a device can hold, in neurons: 0 first, increasing;
    the last one may be all.
    hot: for each cut, the bytes of its neurons on a device, which stores them all and reads the share `hot_read`: with
    experts, those of the chosen ones.
    cold: for each cut, the bytes that the CPU reads of the others for one token.
    spared: how much less than `read` the CPU reads where the block is at home there: of a shared expert, rows of
    neurons that do not fire.
    longer: what a device can hold besides, with experts; it alone, since several devices share equal prefixes.
    """

    stored: int
    read: float
    predictor: int
    neurons: int
    cuts: tuple[int, ...]
    hot: tuple[int, ...]
    cold: tuple[float, ...]
    hot_read: float = 1.0
    spared: float = 0.0
    longer: tuple[LongerCut, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.cuts) == len(self.hot) == len(self.cold) or self.cuts[:1] != (0,) or self.hot[0] != 0:
            raise ValueError("a block needs one `hot` and one `cold` for each cut, and 0 as its first cut")
        if self.cuts[-1] > self.neurons or any(np.diff(self.cuts) <= 0) or any(np.diff(self.hot) < 0):
            raise ValueError("the cuts of a block must increase, up to its number of neurons, and so must `hot`")


@dataclass(frozen=True)
class Device:
    """budget: bytes that may be used. bandwidth: bytes/s. reserve: of the budget, bytes for compute buffers and staging
    if the device is used at all.
    """

    budget: int
    bandwidth: float
    reserve: int = 0


@dataclass(frozen=True)
class Machine:
    """cpu_bandwidth: bytes/s of main memory. sync: seconds for going to a device or the CPU and back. longer: seconds
    that a device needs in a block of which it holds more of some experts, to find out which of these a token uses.

    The first device does what only one can do: attention, head, predictors. Others hold neurons.
    """

    devices: tuple[Device, ...]
    cpu_bandwidth: float
    sync: float
    longer: float = 0.0

    def __post_init__(self) -> None:
        if not self.devices or min(self.cpu_bandwidth, *(d.bandwidth for d in self.devices)) <= 0 or self.sync < 0:
            raise ValueError("a machine needs a device, positive bandwidths and a sync cost of at least 0")


@dataclass(frozen=True)
class Placement:
    """Where everything is, and what that is expected to cost.

    resident_from: blocks from this one on have attention, keys and values and norms on the first device; those before
    are wholly on the CPU.
    head: whether the output head is on the first device. hot: for each block, the neurons on each device: consecutive
    pieces of its prefix. longer: for each block, of which experts the first device holds more; () for none anywhere.
    bytes: for each device, everything on it, reserve included; 0 where it is not used. parts: seconds per token of what
    the token waits for.
    slack: bytes by which rounding may have narrowed the choice: no placement within (budget - slack) is faster. 0:
    exact.
    """

    resident_from: int
    head: bool
    hot: tuple[tuple[int, ...], ...]
    bytes: tuple[int, ...]
    block_seconds: tuple[float, ...]
    block_limits: tuple[str, ...]
    parts: dict[str, float]
    slack: int = 0
    longer: tuple[Longer | None, ...] = ()

    @property
    def seconds(self) -> float:
        """Expected time per token."""
        return sum(self.parts.values())

    @property
    def limit(self) -> str:
        """The part that takes most of the time."""
        return max(self.parts, key=self.parts.__getitem__)


PARTS = ("attention (device)", "attention (CPU)", "hot neurons", "cold neurons", "head", "sync")


def evaluate(
    blocks: Sequence[BlockCosts],
    head: int,
    machine: Machine,
    resident_from: int,
    head_on_device: bool,
    hot: Sequence[Sequence[int]],
    slack: int = 0,
    longer: Sequence[Longer | None] = (),
) -> Placement:
    """What a given placement uses and is expected to take. head: bytes, stored and read by every token.

    Raises ValueError where neurons are on a device without their block's attention, or in pieces that are no cuts.
    """
    longer = tuple(longer) if any(longer) else ()
    first = machine.devices[0]
    parts = dict.fromkeys(PARTS, 0.0)
    used = [0] * len(machine.devices)
    costs = [
        _block_cost(b, machine, i >= resident_from, hot[i], longer[i] if longer else None, used)
        for i, b in enumerate(blocks)
    ]
    for cost, _ in costs:
        for name, seconds in cost.items():
            parts[name] += seconds
    if head_on_device:
        used[0] += head
    parts["head"] = head / (first.bandwidth if head_on_device else machine.cpu_bandwidth)
    if on_device := head_on_device or resident_from < len(blocks):
        parts["sync"] += machine.sync  # the token goes to the device once, and its logits come back
    reserves = [
        d.reserve if n or (on_device and not i) else 0
        for i, (d, n) in enumerate(zip(machine.devices, used, strict=True))
    ]
    return Placement(
        resident_from=resident_from,
        head=head_on_device,
        hot=tuple(tuple(pieces) for pieces in hot),
        bytes=tuple(n + reserve for n, reserve in zip(used, reserves, strict=True)),
        block_seconds=tuple(sum(cost.values()) for cost, _ in costs),
        block_limits=tuple(limit for _, limit in costs),
        parts=parts,
        slack=slack,
        longer=longer,
    )


def _block_cost(
    b: BlockCosts, machine: Machine, resident: bool, pieces: Sequence[int], longer: Longer | None, used: list[int]
) -> tuple[dict[str, float], str]:
    """Seconds by part and which side is waited for; adds the block's bytes to `used`."""
    if longer:
        return _longer_cost(b, machine, resident, pieces, longer, used)
    ends = np.cumsum(pieces)
    if (not resident and ends[-1]) or not set(ends.tolist()) <= set(b.cuts):
        raise ValueError(f"{list(pieces)} neurons are no prefix that a device can hold of this block")
    k = int(ends[-1])
    cold = b.cold[b.cuts.index(k)] / machine.cpu_bandwidth
    if not resident:
        read = b.read - b.spared + b.predictor
        return {"attention (CPU)": read / machine.cpu_bandwidth, "cold neurons": cold}, "CPU"
    predictor = b.predictor if k < b.neurons else 0
    used[0] += b.stored + predictor
    sizes = np.diff([b.hot[b.cuts.index(end)] for end in (0, *ends.tolist())])
    hot = 0.0
    for d, size in enumerate(sizes.tolist()):
        used[d] += size
        hot = max(hot, b.hot_read * size / machine.devices[d].bandwidth)
    crossings = (k < b.neurons) + sum(n > 0 for n in pieces[1:])
    return _both(b.read + predictor, hot, cold, crossings, machine)


def _longer_cost(
    b: BlockCosts, machine: Machine, resident: bool, pieces: Sequence[int], longer: Longer, used: list[int]
) -> tuple[dict[str, float], str]:
    """The same of a block of whose experts the first device holds unequally many neurons."""
    found = [c for c in b.longer if (c.first, c.longer) == (pieces[0], longer)]
    if not found or not resident or any(pieces[1:]):
        raise ValueError(f"{list(pieces)} neurons, {longer}: nothing that a device can hold of this block")
    cut = found[0]
    used[0] += b.stored + b.predictor + cut.hot
    hot, cold = cut.read / machine.devices[0].bandwidth + machine.longer, cut.cold / machine.cpu_bandwidth
    cost, limit = _both(b.read + b.predictor, hot, cold, 1, machine)
    waited = float(_longer_waits([cut], machine)[0])
    return cost | {"hot neurons" if hot >= cold else "cold neurons": waited}, limit


def _longer_waits(cuts: Sequence[LongerCut], machine: Machine) -> Seconds:
    """Seconds until both sides have ended, of unequal experts: on average over tokens."""
    read, cold, spread = np.array([(c.read, c.cold, c.spread) for c in cuts], np.float64).reshape(-1, 3).T
    cpu = machine.cpu_bandwidth
    return expected_max(read / machine.devices[0].bandwidth + machine.longer, cold / cpu, spread / cpu)


def _both(read: float, hot: float, cold: float, crossings: int, machine: Machine) -> tuple[dict[str, float], str]:
    """Seconds of a resident block by part, and which side is waited for. read: bytes of its attention and predictor;
    hot, cold: seconds.
    """
    cost = {
        "attention (device)": read / machine.devices[0].bandwidth,
        "hot neurons" if hot >= cold else "cold neurons": max(hot, cold),
        "sync": machine.sync * crossings,
    }
    return cost, "device" if hot >= cold else "CPU"


def place(blocks: Sequence[BlockCosts], head: int, machine: Machine) -> Placement:
    """The fastest placement within the budgets. head: bytes of the output head, all read by every token.

    With one device it is the optimum (up to `Placement.slack`), hence never slower with more budget. With several, each
    block's prefix is cut in proportion to what the devices have room for; it is never slower than with fewer of them.
    """
    cpu_only = evaluate(blocks, head, machine, len(blocks), False, [(0,) * len(machine.devices)] * len(blocks))
    found = [cpu_only]
    for n in range(1, len(machine.devices) + 1):
        found += _Search(blocks, head, machine, n).best()
    return min(found, key=lambda placement: placement.seconds)


class Planner:
    """Places one model on a machine's only device within any budget up to the device's own: what all budgets share is
    computed once.

    Each placement is the one that `place` finds for that budget.
    """

    def __init__(self, blocks: Sequence[BlockCosts], head: int, machine: Machine) -> None:
        if len(machine.devices) != 1:
            raise ValueError(f"{len(machine.devices)} devices, expected one")
        self._search = _Search(blocks, head, machine, 1)
        self._cpu_only = evaluate(blocks, head, machine, len(blocks), False, [(0,)] * len(blocks))
        self._largest = machine.devices[0].budget
        self._search.best()

    def place(self, budget: int) -> Placement:
        """The fastest placement within `budget` bytes. Raises ValueError for more than the device's."""
        if budget > self._largest:
            raise ValueError(f"a budget of {budget} bytes, expected at most the device's {self._largest}")
        return min([self._cpu_only, *self._search.within(budget).best()], key=lambda placement: placement.seconds)


class _Search:
    """The best placement on the first `n` devices that uses any of them."""

    def __init__(self, blocks: Sequence[BlockCosts], head: int, machine: Machine, n: int) -> None:
        self.blocks, self.head, self.machine = blocks, head, machine
        self.devices = machine.devices[:n]
        self.several = n > 1
        # A device may get one block of neurons more than its proportion.
        margin = max(_step(b) for b in blocks) if self.several else 0
        self.rooms = [d.budget - d.reserve - margin for d in self.devices]
        self.fixed = [b.stored + (b.predictor if self.several else 0) for b in blocks]
        self._solvers: dict[tuple[float, ...], Solver] = {}

    def within(self, budget: int) -> _Search:
        """The same with another, smaller budget of the first device, sharing what does not depend on it."""
        other = copy.copy(self)
        other.rooms = [self.rooms[0] + budget - self.devices[0].budget, *self.rooms[1:]]
        return other

    def best(self) -> list[Placement]:
        """One placement, or none where not even the head or one block fits."""
        if self.several:
            options = [option for head in (False, True) for option in self._with_several(head)]
        else:
            rooms = {(i, head): self._room(i, head) for head in (False, True) for i in range(len(self.blocks))}
            options = self._solved([1.0], rooms)
        if self._room(len(self.blocks), True) >= 0:
            nothing = [(0,) * len(self.machine.devices)] * len(self.blocks)
            options.append(evaluate(self.blocks, self.head, self.machine, len(self.blocks), True, nothing))
        return [min(options, key=lambda placement: placement.seconds)] if options else []

    def _room(self, first: int, head: bool) -> int:
        """Bytes for neurons on the first device, with blocks `first`.. resident."""
        return self.rooms[0] - sum(self.fixed[first:]) - (self.head if head else 0)

    def _with_several(self, head: bool) -> list[Placement]:
        """As many resident blocks as the first device can hold; neurons in proportion to the room that is left."""
        fitting = [i for i in range(len(self.blocks)) if self._room(i, head) >= 0]
        if not fitting:
            return []
        room = np.maximum(0, [self._room(fitting[0], head), *self.rooms[1:]])
        total = int(room.sum())
        return self._solved((room / total).tolist(), {(fitting[0], head): total}) if total else []

    def _solved(self, shares: list[float], rooms: dict[tuple[int, bool], int]) -> list[Placement]:
        """The best for those pairs of first resident block and head on the device whose room for neurons, in bytes, is
        given.
        """
        solver = self._solver(tuple(shares), max(rooms.values()))
        units = {(i, head): solver.units(i, room) for (i, head), room in rooms.items()}
        units = {option: n for option, n in units.items() if n >= 0}
        if not units:
            return []
        cpu = np.cumsum([0.0, *(self._cpu_seconds(b) for b in self.blocks)])
        gain = self.head / self.machine.cpu_bandwidth - self.head / self.devices[0].bandwidth
        programme = solver.programme
        first, head = min(units, key=lambda o: (cpu[o[0]] + programme.seconds(o[0], units[o]) - gain * o[1], o))
        chosen = [0] * first + programme.choices(first, units[first, head])
        more = [self._longer(b, n) for b, n in zip(self.blocks, chosen, strict=True)]
        longer = [cut.longer if cut else None for cut in more]
        equal = [b.cuts.index(cut.first) if cut else n for b, cut, n in zip(self.blocks, more, chosen, strict=True)]
        hot = self._pieces(equal, shares)
        return [evaluate(self.blocks, self.head, self.machine, first, head, hot, solver.slack, longer)]

    def _longer(self, b: BlockCosts, n: int) -> LongerCut | None:
        """What entry `n` of a block's table is, where it is none of its cuts."""
        return b.longer[n - len(b.cuts)] if n >= len(b.cuts) else None

    def _solver(self, shares: tuple[float, ...], room: int) -> Solver:
        """What solves for devices that share so, within `room` bytes and less: made once, since it is the same for
        every budget.
        """
        known = self._solvers.get(shares)
        if known is None or known.room < room:
            known = self._solvers[shares] = Solver([self._table(b, list(shares)) for b in self.blocks], room)
        return known

    def _cpu_seconds(self, b: BlockCosts) -> float:
        return (b.read - b.spared + b.predictor + b.cold[0]) / self.machine.cpu_bandwidth

    def _table(self, b: BlockCosts, shares: list[float]) -> tuple[Sizes, Seconds]:
        """For each cut of a resident block, and what else a single device can hold: bytes beside those that every
        resident block needs, and seconds.
        """
        cuts, hot, cold = np.array(b.cuts), np.array(b.hot, np.int64), np.array(b.cold, np.float64)
        split = cuts < b.neurons
        slowest = max(share / d.bandwidth for share, d in zip(shares, self.devices, strict=True))
        attention = (b.read + b.predictor * split) / self.devices[0].bandwidth
        crossings = split + (cuts > 0) * (len(self.devices) - 1)
        computing = np.maximum(b.hot_read * hot * slowest, cold / self.machine.cpu_bandwidth)
        seconds = attention + computing + self.machine.sync * crossings
        # Pieces are counted in whole blocks of neurons; a predictor that is not needed frees its bytes on a single
        # device only.
        if self.several:
            return np.arange(len(cuts)) * _step(b), seconds
        longer = self._longer_seconds(b)
        sizes = np.append(hot + b.predictor * split, [b.predictor + cut.hot for cut in b.longer])
        return sizes.astype(np.int64), np.append(seconds, longer)

    def _longer_seconds(self, b: BlockCosts) -> Seconds:
        """Of a resident block, for each of `b.longer`."""
        computing = _longer_waits(b.longer, self.machine)
        attention = (b.read + b.predictor) / self.devices[0].bandwidth
        seconds: Seconds = attention + computing + self.machine.sync
        return seconds

    def _pieces(self, chosen: Sequence[int], shares: list[float]) -> list[tuple[int, ...]]:
        """Each block's prefix cut into pieces, so that no device gets a block of neurons more than its share of all.

        chosen: index of each block's cut. What is left after rounding down goes where most is missing, so that less
        than one block ever is too many.
        """
        missing = np.zeros(len(shares))
        unused = (0,) * (len(self.machine.devices) - len(shares))
        pieces = []
        for b, n in zip(self.blocks, chosen, strict=True):
            counts = np.floor(n * np.array(shares)).astype(int)
            missing += (n * np.array(shares) - counts) * _step(b)
            for _ in range(n - int(counts.sum())):
                d = int(missing.argmax())
                counts[d] += 1
                missing[d] -= _step(b)
            ends = [b.cuts[end] for end in (0, *np.cumsum(counts).tolist())]
            pieces.append((*np.diff(ends).tolist(), *unused))
        return pieces


def _step(b: BlockCosts) -> int:
    """Bytes of the largest block of neurons."""
    return int(np.diff(b.hot).max(initial=0))
