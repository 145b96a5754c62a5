"""Ways to use a device's memory for the experts of a mixture, compared by simulation.

    python -m bench.expert_placement [--shape smallthinker-21b] [--again 0.45] [--skew 0.5] [--pcie 25]

`planned`: what the runtime's planner chooses: the hottest neurons of every expert, and more of some, where that pays.
`experts`: the most wanted experts are on the device, whole. `neurons`: equally many of the hottest neurons of every
expert. `cache`: whole experts that were used last are; one that is missed is computed by the CPU and copied meanwhile.
`slow cache`: the same, but of those that are missed only one in twenty is copied.

Measures nothing: bytes over bandwidths, the experts' part of a token alone, `exact` on the CPU. What is assumed, and
what came out, is in docs/experts.md. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from bench.simulate import frequencies
from bench.tables import console, table
from runtime.cli.help import HelpParser
from runtime.cli.program import run_command
from runtime.errors import UserError
from runtime.hybrid.costs import LONGER, cuts_of
from runtime.hybrid.lengths import colder, longer_cuts
from runtime.hybrid.planner import BlockCosts, Device, Machine, place

_DOWN_BLOCK = 32  # elements of a block of Q4_0
TOKENS = 4000  # of one layer that are simulated
SHARES = (0.125, 0.25, 0.5, 0.75)  # of all experts' bytes that the device has room for
HOT = 0.3  # share of an expert's neurons that carry 80 % of its activations: between the published 0.26 and 0.43
Doubles = npt.NDArray[np.float64]
Choices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Mixture:
    """A model's experts. active: share of the neurons of a chosen expert that fire. row: bytes of a neuron's row."""

    layers: int
    count: int
    used: int
    n_ff: int
    row: float
    active: float
    gated: bool = True

    @property
    def rows(self) -> int:
        """Matrices with a row for each neuron."""
        return 3 if self.gated else 2


@dataclass(frozen=True)
class Speeds:
    """Bytes per second: of the device's memory, of main memory, and between them."""

    device: float
    cpu: float
    link: float


MIXTURES = {
    "smallthinker-4b": Mixture(32, 32, 4, 768, 1536 * 0.5625, 0.3),
    "smallthinker-21b": Mixture(52, 64, 6, 768, 2560 * 0.5625, 0.3),
    "mixtral-8x7b": Mixture(32, 8, 2, 14336, 4096 * 0.5625, 0.15),
    "nemotron-3-nano-30b-a3b": Mixture(23, 128, 6, 1856, 2688 * 0.5625, 0.1, gated=False),
}


def routed(m: Mixture, again: float, skew: float, n: int = TOKENS, seed: int = 0) -> Choices:
    """Which experts n tokens use, int64 [n, used].

    Each expert of a token is one of the next token's, too, with probability `again`. The others are drawn by how much
    experts are wanted: `skew` is the spread of the logarithms of that, 0 for equally.
    """
    rng, normal = np.random.default_rng(seed), NormalDist()
    wanted = np.array([skew * normal.inv_cdf(1 - (e + 0.5) / m.count) for e in range(m.count)])
    found = np.empty((n, m.used), np.int64)
    kept = np.zeros(0, np.int64)
    for t in range(n):
        scores = wanted + rng.gumbel(size=m.count)
        scores[kept] = np.inf
        found[t] = np.argpartition(-scores, m.used - 1)[: m.used]
        kept = found[t][rng.random(m.used) < again]
    return found


@dataclass(frozen=True)
class Cost:
    """Bytes of one layer and token: read on the device, read by the CPU, and copied to the device. extra: seconds of
    the device."""

    device: float
    cpu: float
    copied: float = 0.0
    extra: float = 0.0

    def seconds(self, speeds: Speeds) -> float:
        """Both sides at once; what is copied is read from main memory as well."""
        device, cpu = self.device / speeds.device + self.extra, (self.cpu + self.copied) / speeds.cpu
        return max(device, cpu, self.copied / speeds.link)


Policy = Callable[[Mixture, Choices, float, Doubles], Iterator[Cost]]


def by_experts(m: Mixture, chosen: Choices, share: float, fired: Doubles) -> Iterator[Cost]:
    """The experts that are used most often of all tokens' are on the device."""
    counts = np.bincount(chosen.ravel(), minlength=m.count)
    there = set(np.argsort(-counts, kind="stable")[: int(share * m.count)].tolist())
    for token in chosen.tolist():
        hits = sum(e in there for e in token)
        yield Cost(hits * _whole(m), (m.used - hits) * _on_cpu(m, fired, 0))


def by_neurons(m: Mixture, chosen: Choices, share: float, fired: Doubles) -> Iterator[Cost]:
    """The hottest neurons of every expert are on the device: every token costs the same."""
    k = int(share * m.n_ff)
    cost = Cost(m.used * k * m.rows * m.row, m.used * _on_cpu(m, fired, k))
    return (cost for _ in chosen)


def by_cache(m: Mixture, chosen: Choices, share: float, fired: Doubles, admitted: float = 1.0) -> Iterator[Cost]:
    """The experts that were used last are on the device. admitted: of those that are missed, the share that is copied
    to it.
    """
    room, there, rng = int(share * m.count), OrderedDict[int, None](), np.random.default_rng(1)
    for token in chosen.tolist():
        missed = [e for e in token if e not in there]
        new = [e for e in missed if rng.random() < admitted]
        for e in token:
            if e in there or e in new:
                there[e] = None
                there.move_to_end(e)
        while len(there) > room:
            there.popitem(last=False)
        copied = sum(e in there for e in new)
        hits = m.used - len(missed)
        yield Cost(hits * _whole(m), len(missed) * _on_cpu(m, fired, 0), copied * _whole(m))


def by_plan(m: Mixture, chosen: Choices, share: float, fired: Doubles, speeds: Speeds) -> Iterator[Cost]:
    """What the planner makes of one layer, with no other cost than its experts' and that of a second length."""
    wanted = np.bincount(chosen.ravel(), minlength=m.count) / len(chosen)
    read = wanted[:, None] * m.row * (1 + (m.rows - 1) * fired)
    cold, cuts, neuron = colder(read), cuts_of(m.n_ff, _DOWN_BLOCK), m.rows * m.row
    hot, longer = tuple(round(neuron * m.count * k) for k in cuts), longer_cuts(read, wanted, cuts, m.used, neuron)
    cold_bytes = tuple(cold[:, list(cuts)].sum(0).tolist())
    block = BlockCosts(0, 0.0, 0, m.n_ff, cuts, hot, cold_bytes, m.used / m.count, longer=longer)
    device = Device(int(share * m.count * _whole(m)), speeds.device)
    found = place([block], 0, Machine((device,), speeds.cpu, 0.0, LONGER))
    first, more = found.hot[0][0], found.longer[0] if found.longer else None
    lengths, there = np.full(m.count, first), m.used * first
    if more:
        lengths[list(more.experts)] = more.end
        there += min(m.used, len(more.experts)) * (more.end - first)
    each = np.array([_on_cpu(m, fired, k) for k in range(m.n_ff + 1)])[lengths]
    for token in chosen:
        yield Cost(there * neuron, float(each[token].sum()), extra=LONGER if more else 0.0)


POLICIES: dict[str, Policy] = {
    "experts": by_experts,
    "neurons": by_neurons,
    "cache": by_cache,
    "slow cache": partial(by_cache, admitted=0.05),
}


def _whole(m: Mixture) -> float:
    """Bytes of one expert."""
    return m.n_ff * m.rows * m.row


def _on_cpu(m: Mixture, fired: Doubles, k: int) -> float:
    """Bytes that `exact` reads of one expert without its k hottest neurons."""
    return m.row * ((m.n_ff - k) + (m.rows - 1) * float(fired[k:].sum()))


def simulate(m: Mixture, speeds: Speeds, again: float, skew: float) -> dict[str, list[float]]:
    """Milliseconds of all layers' experts for one token, by policy, for each of SHARES."""
    chosen, fired = routed(m, again, skew), frequencies(m.n_ff, m.active, HOT)
    policies: dict[str, Policy] = {"planned": partial(by_plan, speeds=speeds), **POLICIES}
    return {
        name: [
            1e3 * m.layers * float(np.mean([cost.seconds(speeds) for cost in policy(m, chosen, share, fired)]))
            for share in SHARES
        ]
        for name, policy in policies.items()
    }


def main() -> None:
    parser = HelpParser(prog="python -m bench.expert_placement", description="Compare placements of experts.")
    parser.add_argument("--shape", choices=MIXTURES, help="one of them (default: all)")
    parser.add_argument("--again", type=float, default=0.45, help="share of experts used by the next token too (0.45)")
    parser.add_argument("--skew", type=float, default=0.5, help="spread of how much experts are wanted (0.5)")
    parser.add_argument("--device", type=float, default=360, help="GB/s of the device's memory (360)")
    parser.add_argument("--cpu", type=float, default=50, help="GB/s of main memory (50)")
    parser.add_argument("--pcie", type=float, default=25, help="GB/s between them (25)")
    args = parser.parse_args()
    if not (0 <= args.again < 1 and args.skew >= 0 and min(args.device, args.cpu, args.pcie) > 0):
        raise UserError("--again must be 0 to 1, --skew 0 or more, speeds more than 0")
    speeds = Speeds(args.device * 1e9, args.cpu * 1e9, args.pcie * 1e9)
    results = {}
    for name in [args.shape] if args.shape else MIXTURES:
        results[name] = simulate(MIXTURES[name], speeds, args.again, args.skew)
        rows = [(policy, *(f"{ms:.2f}" for ms in found)) for policy, found in results[name].items()]
        title = f"{name}: ms of a token's experts, by the share of them that the device has room for"
        console().print(table(title, ("on the device", *(f"{share:.1%}" for share in SHARES)), rows))
    print(json.dumps({"again": args.again, "skew": args.skew, **asdict(speeds), "shares": SHARES, "ms": results}))


if __name__ == "__main__":
    sys.exit(run_command(main))
