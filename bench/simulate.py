"""What the planner expects of the machines and models of published measurements, beside these, and beside offloading
whole layers.

    python -m bench.simulate [--sync-us 50] [--candidates 1.5]

Measures nothing. All memory runs at its nominal bandwidth, for every contender alike, so all figures are upper bounds:
what they can say is where the bytes are.
A table of models larger than main memory, on disks, is at the end (docs/disk.md).
The last line is one JSON object. What differs from the published figures, and why, is in docs/hybrid.md.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.offload import dense_ffns_on_cpu, whole_layers
from bench.simulate_disk import MEMORY_RATE, PagedShape, simulate_disk
from bench.tables import console, table
from runtime.cli.help import HelpParser
from runtime.cli.program import run_command
from runtime.errors import UserError
from runtime.hybrid.costs import Floats, NeuronBytes, candidates, cuts_of, read_bytes
from runtime.hybrid.lengths import colder
from runtime.hybrid.planner import BlockCosts, Device, Machine, place

GIB = 1 << 30
N_CTX, POSITIONS, KV_SIZE = (
    2048,
    256,
    2,
)  # a context as the measurements had, of which a typical token sees 256 positions; F16
MARGIN = GIB  # left free on the card, for every contender
RESERVE = GIB // 2  # of the rest, for compute buffers
TYPES = {"F16": 16.0, "INT4": 4.5}  # bits per weight; INT4 as Q4_0 stores it
PREDICTOR_BITS = 4.5  # ours are quantised whatever the type of the weights


@dataclass(frozen=True)
class Shape:
    """A model's shape (its config.json), activity, and how uneven that is.

    active: share of the neurons that fire for a token. hot: share of a layer's neurons that carry 80 % of the
    activations.
    predictor: its parameters relative to the model's.
    """

    name: str
    layers: int
    d: int
    n_ff: int
    kv: int
    vocab: int
    gated: bool
    active: float
    hot: float
    predictor: float

    @property
    def attention(self) -> int:
        """Weights of one layer's attention."""
        return 2 * self.d * self.d + 2 * self.d * self.kv

    @property
    def matrices(self) -> int:
        """Of one FFN."""
        return 3 if self.gated else 2

    @property
    def weights(self) -> int:
        """All that a token may read."""
        return self.layers * (self.attention + self.matrices * self.d * self.n_ff) + self.d * self.vocab


# Shapes: config.json of tiiuae/falcon-40b (ReluFalcon-40B has it too), meta-llama/Llama-2-70b-hf, facebook/opt-30b and
# mistralai/Mistral-7B-v0.1 (whose shape Bamboo has).
# Activity and predictors: PowerInfer (SOSP'24), Tables 3 and 6; OPT-30B's predictor between those of OPT-13B and
# OPT-66B, Bamboo's the mean of all.
# hot: the same paper, for OPT-30B and LLaMA-70B. Assumed, not published: Falcon as OPT (both ungated ReLU), Bamboo as
# LLaMA-70B (both gated).
SHAPES = (
    Shape("Falcon-40B", 60, 8192, 32768, 8 * 64, 65024, False, active=0.05, hot=0.26, predictor=0.0868),
    Shape("Llama-70B", 80, 8192, 28672, 8 * 128, 32000, True, active=0.18, hot=0.43, predictor=0.0808),
    Shape("OPT-30B", 48, 7168, 28672, 7168, 50272, False, active=0.03, hot=0.26, predictor=0.058),
    Shape("Bamboo-7B", 32, 4096, 14336, 8 * 128, 32000, True, active=0.10, hot=0.43, predictor=0.0709),
)


@dataclass(frozen=True)
class Computer:
    """Nominal figures of its parts: GiB of card and main memory, GB/s of both."""

    name: str
    card: float
    memory: float
    card_rate: float
    memory_rate: float


COMPUTERS = (
    Computer("RTX 4090 + i9-13900K", 24, 192, 1008, 67.2),
    Computer("RTX 2080 Ti + i7-12700K", 11, 64, 616, 38.4),
    Computer("i9-13900K alone", 0, 192, 1008, 67.2),
)


@dataclass(frozen=True)
class Published:
    """Tokens/s as their authors published them; `at_least`: from 256 tokens and a prompt of 1,500 together."""

    powerinfer: float
    llama_cpp: float
    at_least: bool = False


_HIGH, _LOW, _CPU = (computer.name for computer in COMPUTERS)
# PowerInfer (SOSP'24) and the model cards of Bamboo. The paper does not give LLaMA-70B's format there: in F16
# llama.cpp's figure is beyond the memory's bandwidth.
# Bamboo on the 2080 Ti was measured with an i7-13700 and its format is not given: in INT4 the model would fit on the
# card, which llama.cpp's figure rules out.
PUBLISHED = {
    (_HIGH, "Falcon-40B", "F16"): Published(256 / 56.48, 256 / 321.63, at_least=True),
    (_HIGH, "Llama-70B", "INT4"): Published(256 / 37.17, 256 / 92.76, at_least=True),
    (_HIGH, "OPT-30B", "F16"): Published(12.0, 1.1),
    (_HIGH, "Bamboo-7B", "F16"): Published(92.46, 58.34),
    (_LOW, "Bamboo-7B", "F16"): Published(33.50, 7.64),
    (_CPU, "Bamboo-7B", "F16"): Published(9.94, 4.78),
}


def frequencies(n: int, active: float, hot: float) -> Floats:
    """How often each of `n` neurons fires, hottest first: `active` on average, and the first `hot` of them carry 80 %
    of the activations.

    Assumed: the first x of the neurons carry 1 - (1 - x)^b of the activations, the b that `hot` says. No measured curve
    is published.
    """
    b = math.log(0.2) / math.log(1 - hot)
    left = (1 - np.arange(n + 1) / n) ** b
    shares: Floats = np.minimum(1.0, -active * n * np.diff(left))
    return shares


def blocks_of(shape: Shape, bits: float, ffn: str, per_active: float) -> tuple[list[BlockCosts], int]:
    """The planner's blocks and the head's bytes. per_active: candidates of the predictor for each neuron that fires."""
    per_weight = bits / 8
    row = shape.d * per_weight
    freq = frequencies(shape.n_ff, shape.active, shape.hot)
    chosen = candidates(freq, min(1.0, per_active * shape.active)) if ffn == "predicted" else np.ones(shape.n_ff)
    cuts = cuts_of(shape.n_ff, 32)
    neuron = NeuronBytes(first=row, rest=(shape.matrices - 1) * row, device=shape.matrices * row)
    attention = int(shape.attention * per_weight)
    kv = 2 * shape.kv * KV_SIZE
    block = BlockCosts(
        stored=attention + kv * N_CTX,
        read=attention + kv * POSITIONS,
        predictor=_predictor(shape) if ffn == "predicted" else 0,
        neurons=shape.n_ff,
        cuts=cuts,
        hot=tuple(int(neuron.device * k) for k in cuts),
        cold=tuple(colder(read_bytes(ffn, neuron, freq, chosen, scattered=1.0)[None])[0, list(cuts)].tolist()),
    )
    return [block] * shape.layers, int(shape.vocab * row)


def _predictor(shape: Shape) -> int:
    return int(shape.predictor * shape.weights / shape.layers * PREDICTOR_BITS / 8)


def machine_of(computer: Computer, sync: float) -> Machine:
    """The computer with all of its card but the margin as the budget."""
    budget = max(0, int(computer.card * GIB) - MARGIN)
    return Machine((Device(budget, computer.card_rate * 1e9, RESERVE),), computer.memory_rate * 1e9, sync)


def simulate(sync: float = 50e-6, per_active: float = 1.5) -> Iterator[dict[str, Any]]:
    """One row for each computer, model and format that its memory can hold."""
    for computer in COMPUTERS:
        machine = machine_of(computer, sync)
        for shape in SHAPES:
            for name, bits in TYPES.items():
                if shape.weights * bits / 8 < (computer.memory + computer.card) * GIB:
                    row = {"computer": computer.name, "model": shape.name, "type": name}
                    published = PUBLISHED.get((computer.name, shape.name, name))
                    yield (
                        row | _expected(shape, bits, machine, per_active) | {"published": published and vars(published)}
                    )


def _expected(shape: Shape, bits: float, machine: Machine, per_active: float) -> dict[str, Any]:
    ours = {ffn: place(*blocks_of(shape, bits, ffn, per_active), machine) for ffn in ("predicted", "exact")}
    dense, head = blocks_of(shape, bits, "dense", per_active)
    theirs = {
        "n_gpu_layers": whole_layers(dense, head, machine),
        "n_cpu_ffn": dense_ffns_on_cpu(dense, head, machine),
    }
    split = ours["predicted"]
    return {
        **{name: placed and 1 / placed.seconds for name, placed in (ours | theirs).items()},
        "limit": split.limit,
        "resident_blocks": shape.layers - split.resident_from,
        "hot_share": sum(map(sum, split.hot)) / (shape.layers * shape.n_ff),
        "weights_bytes": shape.weights * bits / 8,
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    published, sign = row["published"], ""
    if published:
        sign = ">= " if published["at_least"] else ""
    return (
        f"{row['model']} {row['type']}",
        f"{row['weights_bytes'] / 1e9:.0f}",
        *(
            "-" if row[key] is None else f"{row[key]:.1f}"
            for key in ("predicted", "exact", "n_gpu_layers", "n_cpu_ffn")
        ),
        f"{row['hot_share']:.0%}",
        row["limit"],
        f"{sign}{published['powerinfer']:.1f}" if published else "",
        f"{sign}{published['llama_cpp']:.1f}" if published else "",
    )


_COLUMNS = ("", "GB", "predicted", "exact", "-ngl", "-ncffn", "hot", "limited by", "PowerInfer", "llama.cpp")


# On disks: OPT-6.7B is what "LLM in a flash" was measured with (arXiv:2312.11514; 3 % of its neurons fire, its
# predictors are 4 % of the model), in half of its memory.
ON_DISKS = (
    (Shape("OPT-6.7B", 32, 4096, 16384, 4096, 50272, False, active=0.03, hot=0.26, predictor=0.04), "F16"),
    (SHAPES[3], "INT4"),
    (SHAPES[1], "INT4"),
)


def on_disks(per_active: float) -> Iterator[dict[str, Any]]:
    """One row for each model, disk and budget of main memory."""
    for shape, name in ON_DISKS:
        bits = TYPES[name]
        always = shape.layers * shape.attention + shape.d * shape.vocab
        always += round(shape.predictor * shape.weights * PREDICTOR_BITS / bits)
        neurons = shape.layers * shape.n_ff
        paged = PagedShape(f"{shape.name} {name}", always, neurons, shape.d, shape.matrices, bits, shape.active)
        often = np.repeat(frequencies(shape.n_ff, shape.active, shape.hot), shape.layers)
        yield from simulate_disk(paged, often, per_active)


def _disk_cells(row: dict[str, Any]) -> tuple[str, ...]:
    speeds = (f"{row[key]:.2f}" if row[key] else "-" for key in ("naive", "mapped", "rows", "bundles"))
    return (f"{row['model']}, {row['disk']}", f"{row['bytes'] / 1e9:.0f}", f"{row['budget']:.0%}", *speeds)


_DISK_COLUMNS = ("", "GB", "budget", "all from disk", "mapped, dense", "rows", "bundles")


def main() -> None:
    parser = HelpParser(prog="python -m bench.simulate", description="Expected speeds beside published ones.")
    parser.add_argument("--sync-us", type=float, default=50.0, help="microseconds from device to CPU and back (50)")
    parser.add_argument("--candidates", type=float, default=1.5, help="per neuron that fires, of a predictor (1.5)")
    args = parser.parse_args()
    if not (args.sync_us >= 0 and args.candidates >= 1):
        raise UserError("--sync-us: expected 0 or more; --candidates: 1 or more")
    rows = list(simulate(args.sync_us * 1e-6, args.candidates))
    out = console()
    for computer in COMPUTERS:
        cells = [_cells(row) for row in rows if row["computer"] == computer.name]
        title = f"{computer.name}: tokens/s expected (upper bounds), and published in the last two columns"
        out.print(table(title, _COLUMNS, cells))
    out.print(
        "hot: share of all neurons on the card in `predicted`. >=: from a measurement that includes a prompt of "
        "1,500 tokens."
    )
    disks = list(on_disks(args.candidates))
    title = f"disks, {MEMORY_RATE / 1e9:.0f} GB/s of main memory, no device: tokens/s expected (upper bounds)"
    out.print(table(title, _DISK_COLUMNS, [_disk_cells(row) for row in disks]))
    print(json.dumps({"sync_s": args.sync_us * 1e-6, "candidates": args.candidates, "rows": rows, "disks": disks}))


if __name__ == "__main__":
    sys.exit(run_command(main))
