"""One FFN for several tokens at once: time, bytes, and what bounds it; from how many tokens, and from which share of
neurons on, whole matrices are faster than the row kernels (`runtime/compute/dense_threshold.py`).

    python -m bench.batches --type q4_0 q8_0 [--shape mistral-7b] [--tokens 1 4 16] [--active 0.1 1.0] [--threads N]

Tokens fire neurons independently of each other. Milliseconds per token: ggml's products on plain and on repacked
matrices (without the time that repacking takes), our products of whole matrices, and our operators with every gate and
with those of the predictor's candidates, predictor included. `of bytes`: what `exact`'s bytes allow at the memory's
bandwidth, over its time. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

from bench.case import Case
from bench.copies import Copies
from bench.resident_memory import DenseProduct
from bench.shapes import WITHOUT_EXPERTS, shape
from bench.tables import console, table
from convert.formats import NUMBERS
from runtime.base.processors import default_threads
from runtime.base.worker import on_worker
from runtime.bindings.logs import captured_log
from runtime.cli.help import HelpParser
from runtime.cli.program import run_command
from runtime.errors import UserError

_COLUMNS = ("plain", "repacked", "whole", "exact", "predicted")
_PASSES = 5


def measure(case: Case, tokens: int) -> dict[str, float]:
    """Milliseconds per token of one FFN, by way of computing it: the best of a few passes, which take turns."""

    def best() -> dict[str, float]:
        with captured_log():
            copies = Copies(case, tokens, independent=True)
        try:
            passes = [{name: made.run() for name, made in copies.prepared.items()} for _ in range(_PASSES)]
            runs = {name: min(one[name] for one in passes) for name in copies.prepared}
        finally:
            copies.close()
        return {name: seconds * 1e3 / tokens / case.copies for name, seconds in runs.items()}

    found = on_worker(best)
    found["predicted"] = found.pop("listed") + found.pop("predictor")
    return found


def limits(results: Sequence[Mapping[str, float]], n_matrices: int) -> list[float]:
    """For each result with its `active` share: from which share of rows on the fastest product beats `exact`, if time
    grows with the rows that are read.
    """
    return [
        min(r["plain"], r.get("repacked", r["plain"])) / r["exact"] * (1 + (n_matrices - 1) * r["active"]) / n_matrices
        for r in results
    ]


def main() -> None:
    parser = HelpParser(prog="python -m bench.batches", description="FFNs of several tokens at once.")
    parser.add_argument("--type", nargs="+", default=["q4_0"], help=f"formats: {', '.join(NUMBERS)}")
    parser.add_argument("--shape", choices=WITHOUT_EXPERTS, default="mistral-7b")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 3, 4, 6, 8, 12, 16, 32])
    parser.add_argument("--active", nargs="+", type=float, default=[0.1], help="shares of neurons that fire")
    parser.add_argument("--threads", type=int, default=default_threads())
    args = parser.parse_args()
    if min(args.tokens) < 1 or not all(0 < share <= 1 for share in args.active):
        raise UserError("--tokens: expected at least 1; --active: expected more than 0, and at most 1")
    s, results, yardstick = shape(args.shape), [], DenseProduct(args.threads)
    for kind, n, share in ((k, n, a) for k in args.type for n in args.tokens for a in args.active):
        case = Case(s, kind, share, args.threads, copies=3)
        times, nbytes = measure(case, n), case.nbytes("exact", n)
        bound = nbytes / yardstick.bandwidth() * 1e3 / n
        results.append({"type": kind, "tokens": n, "active": share, "bytes": nbytes, "bound": bound, **times})
    yardstick.close()
    found = limits(results, 3 if s.ffns[0].gated else 2)
    rows = [
        (
            f"{r['type']}, {r['tokens']}, {r['active']:.0%}",
            *(f"{r[c]:.3f}" if c in r else "" for c in _COLUMNS),
            f"{r['bytes'] / 1e6:.1f}",
            f"{r['bound'] / r['exact']:.0%}",
            f"{limit:.2f}",
        )
        for r, limit in zip(results, found, strict=True)
    ]
    title = f"{args.shape}, one FFN, {args.threads} threads: ms per token"
    console().print(table(title, ("type, tokens, active", *_COLUMNS, "MB", "of bytes", "limit"), rows))
    print(json.dumps({"shape": args.shape, "threads": args.threads, "results": results, "limits": found}))


if __name__ == "__main__":
    sys.exit(run_command(main))
