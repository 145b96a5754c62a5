"""One FFN for one token: our operators against their bytes bound and against ggml's own products, plain and repacked.

    python -m bench.kernels [--shape mistral-7b ...] [--type q4_0 ...] [--active 0.1 ...] [--threads N] [--rounds N]

All variants take turns over several copies of the weights, so that caches do not help. `listed` is the FFN when the
list of neurons is known: gate, up and down rows of those alone.
The last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from bench.case import VARIANTS, Case
from bench.copies import Copies
from bench.resident_memory import DenseProduct
from bench.shapes import WITHOUT_EXPERTS, shape
from bench.tables import console, table
from convert.formats import NUMBERS, fitting
from runtime.base.processors import default_threads
from runtime.base.worker import on_worker
from runtime.bindings import ggml
from runtime.bindings.logs import captured_log
from runtime.cli.help import HelpParser
from runtime.cli.program import run_command
from runtime.errors import UserError


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Time every variant of a case; the first of the rounds warms up. Raises UserError for a type that does not fit."""
    _check(case)
    with captured_log():  # ggml reports every tensor that it repacks
        copies = on_worker(lambda: Copies(case))
    try:
        seconds: dict[str, list[float]] = {variant: [] for variant in copies.prepared}
        for _ in range(rounds + 1):
            for variant, prepared in copies.prepared.items():
                seconds[variant].append(on_worker(prepared.run) / case.copies)
        fired = {variant: copies.prepared[variant].fired(case.ffn.n_ff) for variant in ("exact", "listed")}
    finally:
        on_worker(copies.close)
    return {"seconds": {variant: times[1:] for variant, times in seconds.items()}, "fired": fired}


def _check(case: Case) -> None:
    number = NUMBERS.get(case.type)
    usable = number is not None and ggml.ggml_get_type_traits_cpu(number).contents.vec_dot
    if not usable or any(fitting(case.type, n) != case.type for n in (case.ffn.n_embd, case.ffn.n_ff)):
        raise UserError(f"--type {case.type}: expected a type of matrices whose blocks fit the shape's rows")
    if not 0 < case.active <= 1:
        raise UserError(f"--active {case.active}: expected more than 0 and at most 1")


def figures(case: Case, measured: dict[str, Any], bandwidth: float, shape_name: str) -> dict[str, Any]:
    """Medians, spread, bytes, bounds and ratios of one case."""
    result: dict[str, Any] = {"shape": shape_name, "type": case.type, "active": case.active, "fired": measured["fired"]}
    medians = {variant: statistics.median(times) for variant, times in measured["seconds"].items()}
    for variant, median in medians.items():
        nbytes, times = case.nbytes(variant), measured["seconds"][variant]
        result[variant] = {
            "ms": median * 1e3,
            "min": min(times) * 1e3,
            "max": max(times) * 1e3,
            "bytes": nbytes,
            "bound_ms": nbytes / bandwidth * 1e3,
            "share_of_bound": nbytes / bandwidth / median,
            "speedup": {base: medians[base] / median for base in ("plain", "repacked") if base in medians},
        }
    return result


def show(results: Sequence[dict[str, Any]], threads: int, bandwidth: float, out: Console) -> None:
    """Print one table for people."""
    rows: list[tuple[str, ...]] = []
    for r in results:
        rows.append((f"{r['shape']} {r['type']} {r['active']:.0%}",))
        rows += [_row(variant, r[variant]) for variant in VARIANTS if variant in r]
    title = f"one FFN, one token, {threads} threads, memory {bandwidth / 1e9:.1f} GB/s"
    out.print(table(title, ("", "ms", "min - max", "MB", "bound ms", "of bound", "x plain", "x repacked"), rows))


def _row(variant: str, v: dict[str, Any]) -> tuple[str, ...]:
    ratios = [f"{v['speedup'][base]:.2f}" if base in v["speedup"] else "-" for base in ("plain", "repacked")]
    times = (f"{v['ms']:.3f}", f"{v['min']:.3f} - {v['max']:.3f}", f"{v['bytes'] / 1e6:.1f}", f"{v['bound_ms']:.3f}")
    return (f"  {variant}", *times, f"{v['share_of_bound']:.0%}", *ratios)


def main() -> None:
    parser = HelpParser(prog="python -m bench.kernels", description="Time one FFN in all its forms.")
    parser.add_argument(
        "--shape", nargs="+", default=["mistral-7b"], choices=WITHOUT_EXPERTS, help="default: mistral-7b"
    )
    parser.add_argument("--type", nargs="+", default=["q4_0"], help="ggml types, default: q4_0")
    parser.add_argument("--active", nargs="+", type=float, default=[0.1], help="shares of neurons, default: 0.1")
    parser.add_argument("--threads", type=int, default=default_threads(), help="default: physical cores")
    parser.add_argument("--copies", type=int, default=6, help="FFNs in rotation (default: 6)")
    parser.add_argument("--rounds", type=int, default=15, help="turns that count (default: 15)")
    args = parser.parse_args()
    yardstick = DenseProduct(args.threads)
    bandwidths, results = [], []
    for name in args.shape:
        for kind in (k.lower() for k in args.type):
            for active in args.active:
                case = Case(shape(name), kind, active, args.threads, args.copies)
                measured = measure(case, args.rounds)
                bandwidths.append(yardstick.bandwidth())
                results.append((case, measured, name))
    yardstick.close()
    bandwidth = statistics.median(bandwidths)
    printed = [figures(case, measured, bandwidth, name) for case, measured, name in results]
    show(printed, args.threads, bandwidth, console())
    print(json.dumps({"threads": args.threads, "bandwidth_bytes_per_s": bandwidth, "cases": printed}))


if __name__ == "__main__":
    sys.exit(run_command(main))
