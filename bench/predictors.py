"""What predictors of every kind are worth on a model: fitted, written, and judged end to end on a text that no fit saw.

    python -m bench.predictors MODEL.gguf TEXT [--kinds lowrank,signbit] [--types auto] [--energies 0.98,0.997]
    [--tokens N]

Prints a table of kinds x types of their matrices x energies, and one JSON object in the last line. The model's own
predictors, if any, play no part.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from bench.tables import console, table
from predictors.evaluate import Evaluation, evaluate
from predictors.fit import DEFAULT_ENERGY, Candidates, fit_candidates
from predictors.replace_predictors import replace_predictors
from runtime.cli.help import HelpParser
from runtime.cli.program import run_command

_COLUMNS = (
    "predictor",
    "energy",
    "ranks",
    "perplexity",
    "to dense",
    "KL, nats",
    "recall",
    "precision",
    "bytes",
    "exact",
)


def measure(
    model: Path,
    text: Path,
    kinds: Sequence[str],
    types: Sequence[str],
    energies: Sequence[float],
    tokens: int | None = None,
    calibration: Path | None = None,
    calibration_tokens: int | None = None,
) -> Iterator[dict[str, Any]]:
    """One row for each kind, matrix type and energy; tokens: of the text, None for `evaluate`'s own number;
    calibration, calibration_tokens: as in `fit_candidates`.
    """
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        for kind, type_name in product(kinds, types):
            started = time.perf_counter()
            fitted = fit_candidates(model, kind, calibration, calibration_tokens, type_name)
            seconds = time.perf_counter() - started
            for energy in energies:
                row = {"kind": kind, "type": type_name, "energy": energy, "fit_s": seconds}
                yield row | _judged(fitted, energy, model, Path(folder) / "fitted.gguf", text, tokens)


def _judged(
    fitted: Candidates, energy: float, model: Path, out: Path, text: Path, tokens: int | None
) -> dict[str, Any]:
    fit = fitted.at(energy, reorder=False)
    replace_predictors(model, out, [block.tensors for block in fit.blocks], fit.metadata)
    ranks = [block.rank for block in fit.blocks]
    return {"ranks": ranks, **_figures(evaluate(out, text, tokens), ranks)}


def _figures(found: Evaluation, ranks: Sequence[int]) -> dict[str, Any]:
    """End to end; recall and precision are those of all layers that have predictors together."""
    modes = {mode.mode: mode for mode in found.modes}
    reference, exact = found.modes[0], modes["exact"]
    used = modes.get("predicted", exact)
    layers = [f for f, rank in zip(found.layers, ranks, strict=True) if rank]
    fired, predicted = sum(f.active_share for f in layers), sum(f.predicted_share for f in layers)
    hits = sum(f.recall * f.active_share for f in layers)
    return {
        "tokens": found.tokens,
        "reference": reference.perplexity,
        "perplexity": used.perplexity,
        "kl": used.kl,
        "recall": hits / fired if fired else 1.0,
        "precision": hits / predicted if predicted else 1.0,
        "bytes": used.bytes,
        "bytes_exact": exact.bytes,
    }


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["kind"] if row["type"] == "auto" else f"{row['kind']} {row['type']}",
        f"{row['energy']:g}",
        " ".join(map(str, row["ranks"])),
        f"{row['perplexity']:.3f}",
        f"{row['perplexity'] / row['reference'] - 1:+.2%}",
        *(f"{row[key]:.3f}" for key in ("kl", "recall", "precision", "bytes")),
    )


def _words(text: str) -> list[str]:
    return text.split(",")


def _shares(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def main() -> None:
    parser = HelpParser(prog="python -m bench.predictors", description="Fit predictors and judge them.")
    parser.add_argument("model", type=Path, help="a converted GGUF file")
    parser.add_argument("text", type=Path, help="a UTF-8 text to judge on")
    parser.add_argument("--kinds", type=_words, default=["lowrank"], help="separated by commas (default: lowrank)")
    parser.add_argument("--types", type=_words, default=["auto"], help="types of their matrices (default: auto)")
    parser.add_argument("--energies", type=_shares, default=[DEFAULT_ENERGY], help=f"(default: {DEFAULT_ENERGY})")
    parser.add_argument("--tokens", type=int, help="of the text (default: 16,384)")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="text to fit on (default: one in the package)")
    parser.add_argument("--calibration-tokens", type=int, help="of it (default: as `python -m convert`)")
    args = parser.parse_args()
    rows = []
    for row in measure(**vars(args)):
        rows.append(row)
        print(f"{row['kind']} {row['type']} {row['energy']:g}: {row['perplexity']:.3f}", file=sys.stderr)
    first = rows[0]
    title = (
        f"{args.model.name}, {first['tokens']} tokens: dense {first['reference']:.3f}, "
        f"exact reads {first['bytes_exact']:.3f}"
    )
    console().print(table(title, _COLUMNS, [_cells(row) for row in rows]))
    print(json.dumps({"model": str(args.model), "text": str(args.text), "rows": rows}))


if __name__ == "__main__":
    sys.exit(run_command(main))
