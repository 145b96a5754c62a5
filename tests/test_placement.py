"""The planner's arithmetic: equal to HiGHS's optimum, never over a budget, never slower with more of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise, product

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from runtime.hybrid.knapsack import MAX_UNITS
from runtime.hybrid.lengths import Longer, LongerCut
from runtime.hybrid.planner import (
    BlockCosts,
    Device,
    Machine,
    Placement,
    Planner,
    evaluate,
    place,
)

HUGE = 1 << 50


def random_block(rng: np.random.Generator, max_cuts: int, with_experts: bool = False) -> BlockCosts:
    """A short last piece, unequal bytes, frequencies that fall; some cannot be wholly on a device."""
    size, n = int(rng.integers(2, 9)), int(rng.integers(0, max_cuts))
    cuts = [size * i for i in range(n + 1)]
    neurons = cuts[-1] + int(rng.integers(1, size + 1))
    if rng.random() < 0.9:
        cuts.append(neurons)
    per_neuron = int(rng.integers(1, 7))
    freq = np.sort(rng.random(neurons) ** rng.integers(1, 5))[::-1]
    cold = per_neuron * np.array([rng.random() / 4 * (neurons - k) + freq[k:].sum() for k in cuts])
    cold = np.minimum.accumulate(cold)
    hot_read = float(rng.choice([1.0, 0.25]))
    longer = random_longer(rng, cuts[:8], cold, per_neuron, hot_read) if with_experts else ()
    return BlockCosts(
        stored=int(rng.integers(0, 60)),
        read=float(rng.integers(0, 60)),
        predictor=int(rng.choice([0, rng.integers(0, 20)])),
        neurons=neurons,
        cuts=tuple(cuts),
        hot=tuple(per_neuron * k for k in cuts),
        cold=tuple(cold.tolist()),
        hot_read=hot_read,
        longer=longer,
    )


def random_longer(
    rng: np.random.Generator, cuts: list[int], cold: npt.NDArray[np.float64], per_neuron: int, hot_read: float
) -> tuple[LongerCut, ...]:
    """Longer prefixes of some of four experts: of any two cuts, and between them in bytes."""
    found = []
    for a, b in combinations(range(len(cuts)), 2):
        n = int(rng.integers(1, 4))
        experts = tuple(sorted(rng.choice(4, n, replace=False).tolist()))
        more = per_neuron * (cuts[b] - cuts[a])
        found.append(
            LongerCut(
                first=cuts[a],
                longer=Longer(cuts[b], experts, n / 4),
                hot=per_neuron * cuts[a] + more * n // 4,
                read=hot_read * per_neuron * cuts[a] + hot_read * more * rng.uniform(n / 4, 1),
                cold=float(cold[a] + (cold[b] - cold[a]) * rng.uniform(n / 4, 1)),
                spread=float(rng.choice([0, rng.uniform(0, 5)])),
            )
        )
    return tuple(found)


def random_case(
    rng: np.random.Generator, n_devices: int = 1, max_blocks: int = 8, max_cuts: int = 32, with_experts: bool = False
) -> tuple[list[BlockCosts], int, Machine]:
    blocks = [random_block(rng, max_cuts, with_experts) for _ in range(rng.integers(1, max_blocks + 1))]
    head = int(rng.integers(0, 80))
    total = head + sum(b.stored + b.predictor + b.hot[-1] for b in blocks)
    devices = tuple(
        Device(int(rng.integers(0, 1.2 * total / n_devices + 20)), float(rng.uniform(1, 20)), int(rng.integers(0, 20)))
        for _ in range(n_devices)
    )
    return blocks, head, Machine(devices, cpu_bandwidth=1.0, sync=float(rng.uniform(0.1, 60)), longer=0.3)


def mean_of_max(fixed: float, mean: float, spread: float) -> float:
    """The integral of the larger of two numbers over the second one's normal distribution, by the middles of slices."""
    if not spread:
        return max(fixed, mean)
    z = np.linspace(-9, 9, 20_001)
    weights = np.exp(-(z**2) / 2)
    return float((np.maximum(fixed, mean + spread * z) * weights).sum() / weights.sum())


def optimum(blocks: Sequence[BlockCosts], head: int, machine: Machine) -> float:
    """Least seconds per token by mixed-integer programming, from the definition: one choice per block, head and `device used` are 0 or 1."""
    device, cpu, sync = machine.devices[0], machine.cpu_bandwidth, machine.sync
    cost, size, rows, low, high = [], [], [], [], []
    choice = []  # (block, whether resident)
    for i, b in enumerate(blocks):
        cost.append((b.read + b.predictor + b.cold[0]) / cpu)
        size.append(0)
        choice.append((i, False))
        for k, hot, cold in zip(b.cuts, b.hot, b.cold, strict=True):
            predictor = b.predictor if k < b.neurons else 0
            both = max(b.hot_read * hot / device.bandwidth, cold / cpu) + (sync if k < b.neurons else 0)
            cost.append((b.read + predictor) / device.bandwidth + both)
            size.append(b.stored + predictor + hot)
            choice.append((i, True))
        for more in b.longer:
            there = more.read / device.bandwidth + machine.longer
            both = mean_of_max(there, more.cold / cpu, more.spread / cpu) + sync
            cost.append((b.read + b.predictor) / device.bandwidth + both)
            size.append(b.stored + b.predictor + more.hot)
            choice.append((i, True))
    n = len(cost)
    cost += [head / device.bandwidth - head / cpu, sync]
    size += [head, device.reserve]

    def add(row: dict[int, float], at_least: float, at_most: float) -> None:
        rows.append([row.get(j, 0.0) for j in range(n + 2)])
        low.append(at_least)
        high.append(at_most)

    resident = [{j: 1.0 for j, c in enumerate(choice) if c == (i, True)} for i in range(len(blocks))]
    for i, row in enumerate(resident):
        add({j: 1.0 for j, c in enumerate(choice) if c[0] == i}, 1, 1)
        add(row | {n + 1: -1.0}, -np.inf, 0)  # a resident block uses the device
        if i:
            add(resident[i - 1] | dict.fromkeys(row, -1.0), -np.inf, 0)  # then so is the next
    add({n: 1.0, n + 1: -1.0}, -np.inf, 0)
    add(dict(enumerate(map(float, size))), -np.inf, device.budget)
    solved = milp(
        cost,
        integrality=np.ones(n + 2),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(np.array(rows), low, high),
        options={"mip_rel_gap": 0},
    )
    assert solved.success
    return float(solved.fun) + head / cpu


def check(placement: Placement, blocks: Sequence[BlockCosts], machine: Machine, head: int) -> None:
    """Within the budgets, counted here once more, and as fast as it says."""
    used = [0] * len(machine.devices)
    for i, (b, pieces) in enumerate(zip(blocks, placement.hot, strict=True)):
        assert i >= placement.resident_from or not sum(pieces)
        assert sum(pieces) in b.cuts
        longer = placement.longer[i] if placement.longer else None
        if longer:
            (more,) = (c.hot for c in b.longer if (c.first, c.longer) == (pieces[0], longer))
            assert not any(pieces[1:])
            used[0] += b.stored + b.predictor + more
            continue
        at = 0
        for d, n in enumerate(pieces):
            used[d] += b.hot[b.cuts.index(at + n)] - b.hot[b.cuts.index(at)]
            at += n
        used[0] += (b.stored + b.predictor * (at < b.neurons)) * (i >= placement.resident_from)
    used[0] += head * placement.head
    anything = placement.head or placement.resident_from < len(blocks)
    for d, device in enumerate(machine.devices):
        total = used[d] + (device.reserve if used[d] or (anything and d == 0) else 0)
        assert placement.bytes[d] == total
        assert total == 0 or total <= device.budget
    assert placement.seconds == pytest.approx(
        sum(placement.block_seconds) + placement.parts["head"] + (machine.sync if anything else 0)
    )


@pytest.mark.parametrize("seed", range(200))
def test_it_equals_the_optimum_of_a_solver(seed: int) -> None:
    blocks, head, machine = random_case(np.random.default_rng(seed))
    found = place(blocks, head, machine)
    check(found, blocks, machine, head)
    assert found.slack == 0
    assert found.seconds == pytest.approx(optimum(blocks, head, machine), rel=1e-7)


@pytest.mark.parametrize("seed", range(100))
def test_with_longer_prefixes_of_some_experts_too(seed: int) -> None:
    blocks, head, machine = random_case(np.random.default_rng(seed), with_experts=True)
    found = place(blocks, head, machine)
    check(found, blocks, machine, head)
    assert found.slack == 0
    assert found.seconds == pytest.approx(optimum(blocks, head, machine), rel=1e-7)


def test_longer_prefixes_are_chosen_where_they_are_faster() -> None:
    """In some instances, and then no placement with equal prefixes is as fast."""
    n_longer = 0
    for seed in range(100):
        blocks, head, machine = random_case(np.random.default_rng(seed), with_experts=True)
        found = place(blocks, head, machine)
        equal = place([replace(b, longer=()) for b in blocks], head, machine)
        assert found.seconds < equal.seconds if any(found.longer) else found.seconds == pytest.approx(equal.seconds)
        n_longer += any(found.longer)
    assert n_longer > 15


def test_several_devices_share_equal_prefixes() -> None:
    for seed in range(50):
        blocks, head, machine = random_case(np.random.default_rng(seed), 2, max_cuts=8, with_experts=True)
        found = place(blocks, head, machine)
        check(found, blocks, machine, head)
        if any(pieces[1] for pieces in found.hot):
            assert not found.longer


def test_what_a_device_cannot_hold_is_no_placement() -> None:
    block = BlockCosts(
        0, 1.0, 0, 2, (0, 1, 2), (0, 4, 8), (2.0, 1.0, 0.0), longer=(LongerCut(0, Longer(2, (1,)), 2, 1, 1.0),)
    )
    machine = Machine((Device(99, 1.0), Device(99, 1.0)), cpu_bandwidth=1.0, sync=0.1)
    longer = block.longer[0].longer
    assert evaluate([block], 0, machine, 0, False, [(0, 0)], longer=[longer]).longer == (longer,)
    for first, hot, wrong in (
        (0, (1, 0), longer), (0, (0, 1), longer), (1, (0, 0), longer), (0, (0, 0), replace(longer, experts=(0,))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="a device can hold"):
            evaluate([block], 0, machine, first, False, [hot], longer=[wrong])


def test_the_instances_are_worth_solving() -> None:
    """Most of them are neither all on the CPU nor all on the device, and many split a block."""
    kinds = []
    for seed in range(200):
        blocks, head, machine = random_case(np.random.default_rng(seed))
        found = place(blocks, head, machine)
        kinds.append(
            (
                0 < sum(map(sum, found.hot)) < sum(b.neurons for b in blocks),
                any(0 < k < b.neurons for b, (k,) in zip(blocks, found.hot, strict=True)),
                0 < found.resident_from < len(blocks),
            )
        )
    shares = np.mean(kinds, axis=0)
    assert (shares > 0.15).all(), shares


def test_greedy_is_not_optimal() -> None:
    """Two pieces of A gain 1.0 and then 1.8, because the sync goes with the last one; each piece of B gains 1.05."""
    a = BlockCosts(0, 100.0, 0, 2, (0, 1, 2), (0, 1, 2), (2.0, 1.0, 0.0))
    b = BlockCosts(0, 100.0, 0, 3, (0, 1, 2), (0, 1, 2), (3.15, 2.10, 1.05))
    machine = Machine((Device(2, 1e9),), cpu_bandwidth=1.0, sync=0.8)

    def seconds(of_a: int, of_b: int) -> float:
        return evaluate([a, b], 0, machine, 0, False, [(of_a,), (of_b,)]).seconds

    greedy = [0, 0]
    for _ in range(2):
        gains = [
            seconds(*greedy) - seconds(greedy[0] + 1, greedy[1]),
            seconds(*greedy) - seconds(greedy[0], greedy[1] + 1),
        ]
        greedy[int(np.argmax(gains))] += 1
    found = place([a, b], 0, machine)
    assert greedy == [0, 2]
    assert found.hot == ((2,), (0,))
    assert found.seconds == pytest.approx(seconds(0, 2) - 0.7)
    assert found.seconds == pytest.approx(min(seconds(i, j) for i, j in product(range(3), repeat=2) if i + j <= 2))


def test_budgets_are_obeyed() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10_000):
        blocks, head, machine = random_case(rng, int(rng.integers(1, 4)), max_blocks=3, max_cuts=6)
        check(place(blocks, head, machine), blocks, machine, head)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("scale", [1, 999_983], ids=["exact", "rounded"])
def test_more_budget_is_never_slower(seed: int, scale: int) -> None:
    rng = np.random.default_rng(seed)
    blocks, head, machine = random_case(rng)
    if scale > 1:  # unequal sizes far beyond the number of units
        blocks = [
            BlockCosts(
                scale * b.stored + 1,
                b.read,
                scale * b.predictor,
                b.neurons,
                b.cuts,
                tuple((scale + i) * h for h in b.hot),
                b.cold,
            )
            for i, b in enumerate(blocks)
        ]
    total = head + sum(b.stored + b.predictor + b.hot[-1] for b in blocks) + machine.devices[0].reserve
    budgets = np.sort(rng.integers(0, int(1.1 * total), 40))
    device = machine.devices[0]
    seconds = []
    for budget in budgets:
        limited = Machine((Device(int(budget), device.bandwidth, device.reserve),), machine.cpu_bandwidth, machine.sync)
        found = place(blocks, head, limited)
        check(found, blocks, limited, head)
        seconds.append(found.seconds)
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(seconds))


def test_rounding_costs_no_more_than_it_says() -> None:
    """Sizes without a common divisor: no placement within budget - slack is faster."""
    rng = np.random.default_rng(3)
    slacks = []
    for _ in range(20):
        blocks, head, machine = random_case(rng)
        blocks = [
            BlockCosts(
                b.stored,
                b.read,
                b.predictor,
                b.neurons,
                b.cuts,
                tuple(h * 10_007 + j for j, h in enumerate(b.hot)),
                b.cold,
            )
            for b in blocks
        ]
        device = Device(int(rng.uniform(0, 0.8) * sum(b.hot[-1] for b in blocks)), 1e5, 0)
        found = place(blocks, head, Machine((device,), machine.cpu_bandwidth, machine.sync))
        slacks.append(found.slack)
        assert found.slack <= len(blocks) * 2 * (sum(b.hot[-1] for b in blocks) // MAX_UNITS + 1)
        smaller = Machine((Device(device.budget - found.slack, device.bandwidth),), machine.cpu_bandwidth, machine.sync)
        assert found.seconds <= optimum(blocks, head, smaller) * (1 + 1e-9)
    assert max(slacks) > 0


@pytest.mark.parametrize("seed", range(40))
def test_a_planner_finds_for_every_budget_what_place_finds(seed: int) -> None:
    blocks, head, machine = random_case(np.random.default_rng(seed), n_devices=1)
    (device,) = machine.devices
    most = replace(device, budget=device.reserve + head + sum(b.stored + b.predictor + b.hot[-1] for b in blocks) + 9)
    planner = Planner(blocks, head, replace(machine, devices=(most,)))
    for budget in np.linspace(0, most.budget, 23).astype(int).tolist():
        found = place(blocks, head, replace(machine, devices=(replace(device, budget=budget),)))
        assert planner.place(budget) == found
    with pytest.raises(ValueError, match="at most the device's"):
        planner.place(most.budget + 1)


def llama_70b(rows_per_weight: float, predictor: int = 0) -> tuple[list[BlockCosts], int]:
    """80 blocks of 112 pieces of 256 neurons."""
    d, n_ff, step = 8192, 28672, 256
    freq = np.clip(0.18 * 2.86 * (1 - np.arange(n_ff) / n_ff) ** 1.86, 0, 1)
    fired = np.append(np.cumsum(freq[::-1])[::-1], 0.0)
    row = d * rows_per_weight
    cuts = tuple(range(0, n_ff + 1, step))
    attention = int((2 * d * d + 2 * d * 1024) * rows_per_weight)
    block = BlockCosts(
        stored=attention + (1 << 23),
        read=attention + (1 << 22),
        predictor=predictor,
        neurons=n_ff,
        cuts=cuts,
        hot=tuple(int(3 * row * k) for k in cuts),
        cold=tuple(float(row * (0.25 * (n_ff - k) + 2 * fired[k])) for k in cuts),
    )
    return [block] * 80, int(32000 * row)


@pytest.mark.parametrize("predictor", [0, 78_643_207], ids=["one unit fits all", "rounded"])
def test_eighty_layers_are_solved_fast(predictor: int) -> None:
    blocks, head = llama_70b(2.0, predictor)
    machine = Machine((Device(60 << 30, 1008e9, 1 << 29),), 67.2e9, 50e-6)
    start = time.process_time()
    found = place(blocks, head, machine)
    assert time.process_time() - start < 10
    check(found, blocks, machine, head)
    assert (found.slack == 0) == (predictor == 0)
    assert found.bytes[0] > 0.99 * (60 << 30)


def test_no_budget_is_the_cpu_alone() -> None:
    for seed in range(20):
        blocks, head, machine = random_case(np.random.default_rng(seed), n_devices=1 + seed % 2)
        none = Machine(
            tuple(Device(0, d.bandwidth, d.reserve) for d in machine.devices), machine.cpu_bandwidth, machine.sync
        )
        found = place(blocks, head, none)
        assert (found.resident_from, found.head, set(found.bytes)) == (len(blocks), False, {0})
        assert not any(map(sum, found.hot))
        read = head + sum(b.read + b.predictor + b.cold[0] for b in blocks)
        assert found.seconds == pytest.approx(read / machine.cpu_bandwidth)
        assert found.parts["sync"] == 0


@pytest.mark.parametrize("predictor", [0, 78_643_207])
def test_a_huge_budget_puts_everything_on_a_fast_device(predictor: int) -> None:
    blocks, head = llama_70b(2.0, predictor)
    everything = head + sum(b.stored + b.hot[-1] for b in blocks)
    for budget in (HUGE, everything + 5 + (1 << 28 if predictor else 0)):  # where sizes are rounded, some room is lost
        found = place(blocks, head, Machine((Device(budget, 1e14, 5),), 67.2e9, 50e-6))
        assert found.resident_from == 0
        assert found.head
        assert set(found.hot) == {(28672,)}
        assert found.bytes == (everything + 5,)
        assert found.parts["sync"] == 50e-6


def test_a_device_too_small_for_all_keys_and_values_takes_the_last_blocks() -> None:
    blocks, head = llama_70b(0.5625)
    full = sum(b.stored for b in blocks)
    found = place(blocks, head, Machine((Device(full // 2, 1008e9),), 67.2e9, 50e-6))
    assert 40 <= found.resident_from < 80
    assert found.bytes[0] <= full // 2
    tiny = place(blocks, head, Machine((Device(head, 1008e9),), 67.2e9, 50e-6))
    assert (tiny.resident_from, tiny.head, tiny.bytes) == (80, True, (head,))


@pytest.mark.parametrize("seed", range(40))
def test_more_devices_are_never_slower_than_fewer(seed: int) -> None:
    blocks, head, machine = random_case(np.random.default_rng(seed), n_devices=3)
    seconds = []
    for n in (1, 2, 3):
        used = Machine(machine.devices[:n], machine.cpu_bandwidth, machine.sync)
        found = place(blocks, head, used)
        check(found, blocks, used, head)
        seconds.append(found.seconds)
    assert seconds == sorted(seconds, reverse=True)


def test_several_devices_hold_consecutive_pieces_of_what_one_could_not() -> None:
    blocks, head = llama_70b(0.5625)
    devices = (Device(12 << 30, 1008e9), Device(8 << 30, 616e9), Device(4 << 30, 616e9))
    machine = Machine(devices, 67.2e9, 50e-6)
    found = place(blocks, head, machine)
    check(found, blocks, machine, head)
    assert all(min(pieces) > 0 for pieces in found.hot)
    assert all(used > 0.97 * device.budget for used, device in zip(found.bytes, devices, strict=True))
    assert found.seconds < place(blocks, head, Machine(devices[:1], 67.2e9, 50e-6)).seconds


def test_the_limit_is_the_longest_part() -> None:
    blocks, head = llama_70b(2.0)
    found = place(blocks, head, Machine((Device(20 << 30, 1008e9),), 67.2e9, 50e-6))
    assert found.limit == "cold neurons"
    assert set(found.block_limits) == {"CPU"}
    whole = place(blocks, head, Machine((Device(HUGE, 1e13),), 67.2e9, 50e-6))
    assert whole.limit == "hot neurons"
    assert sum(whole.parts.values()) == pytest.approx(whole.seconds)


def test_pieces_that_no_device_can_hold_are_refused() -> None:
    block = BlockCosts(0, 0.0, 0, 4, (0, 2, 4), (0, 2, 4), (2.0, 1.0, 0.0))
    machine = Machine((Device(9, 1.0), Device(9, 1.0)), 1.0, 0.0)
    for resident_from, pieces in ((0, (1, 1)), (0, (3, 0)), (1, (2, 0))):
        with pytest.raises(ValueError, match="no prefix"):
            evaluate([block], 0, machine, resident_from, False, [pieces])
    with pytest.raises(ValueError, match="first cut"):
        BlockCosts(0, 0.0, 0, 4, (2, 4), (0, 2), (1.0, 0.0))
    with pytest.raises(ValueError, match="increase"):
        BlockCosts(0, 0.0, 0, 4, (0, 8), (0, 2), (1.0, 0.0))
    with pytest.raises(ValueError, match="bandwidth"):
        Machine((Device(9, 0.0),), 1.0, 0.0)
