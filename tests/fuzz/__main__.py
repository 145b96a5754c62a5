"""`python -m fuzz` (with tests/ on the path): feeds damaged input to every reader for some seconds, or the corpus once; `make fuzz` calls it.

Exit status 1 where an input failed. What failed is put into the corpus, to be mended and kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from random import Random

from fuzz import corpus
from fuzz.targets import all_targets
from fuzz.worker import Counts, Failure, Target, run, write
from runtime.cli.program import run_command

_PROOF = 1000  # inputs of which some must come to the end, or the target says nothing


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed makes other inputs; the same one makes the same"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="NAME[=SHARE]",
        help="only this one, with its share of the time (may be given again)",
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--replay", action="store_true", help="run the corpus instead")
    parser.add_argument(
        "--one", type=int, help="run input ONE of a target in this process, under a debugger for example"
    )
    parser.add_argument("--found", type=Path, default=corpus.FOLDER, help="where inputs that fail are kept")
    parser.add_argument("--counts", type=Path, help="append the counts to this file, one JSON object a line")
    return parser.parse_args()


def main() -> int:
    """Run; returns the exit status."""
    options = _arguments()
    sanitized = "libasan" in os.environ.get("LD_PRELOAD", "")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        targets = all_targets(folder, lambda target, index: Random(f"{options.seed} {target} {index}"))
        chosen = _chosen(targets, options.target)
        if options.one is not None:
            return _one(chosen[0], options.one, folder)
        shares = sum(t.share for t in chosen)
        failed = 0
        for target in chosen:
            if options.replay:
                replayed = corpus.replayed(target)
                counts = run(replayed, 600, 1, folder, stop=corpus.size(target), limited=not sanitized)
            else:
                seconds = options.seconds * target.share / shares
                counts = run(target, seconds, options.jobs, folder, options.first, limited=not sanitized)
            failed += _report(target, counts, options)
    return 1 if failed else 0


def _chosen(targets: list[Target], wanted: list[str]) -> list[Target]:
    shares = {name: share for name, _, share in (one.partition("=") for one in wanted)}
    if unknown := set(shares) - {target.name for target in targets}:
        sys.exit(f"no target {', '.join(sorted(unknown))}, expected some of {', '.join(t.name for t in targets)}")
    return [replace(t, share=float(shares.get(t.name) or t.share)) for t in targets if t.name in shares or not shares]


def _one(target: Target, index: int, folder: Path) -> int:
    write(folder / "one", target.make(index))
    return run_command(lambda: print(target.run(folder / "one")))


def _report(target: Target, counts: Counts, options: argparse.Namespace) -> int:
    kinds: dict[str, list[Failure]] = {}
    for failure in counts.failures:
        kinds.setdefault(failure.kind, []).append(failure)
    speed = counts.inputs / counts.seconds if counts.seconds else 0
    print(
        f"{target.name:<18} {counts.inputs:>8} inputs ({speed:>6.0f}/s) {counts.reached:>8} came to the end {counts.refused:>8} refused {len(counts.failures):>5} failed",
        flush=True,
    )
    for kind, failures in kinds.items():
        first = failures[0]
        kept = (
            "" if options.replay else f", kept as {corpus.keep(options.found, target.name, target.make(first.index))}"
        )
        print(f"  {len(failures)} x {kind}, first input {first.index}{kept}\n{_indented(first.report)}", flush=True)
    if options.counts:
        figures = {
            "time": int(time.time()),
            "target": target.name,
            "seed": options.seed,
            "first": options.first,
            "inputs": counts.inputs,
            "reached": counts.reached,
        }
        figures |= {
            "refused": counts.refused,
            "failed": len(counts.failures),
            "kinds": sorted(kinds),
            "seconds": round(counts.seconds, 1),
        }
        with options.counts.open("a") as file:
            file.write(json.dumps(figures) + "\n")
    if counts.inputs > _PROOF and not counts.reached:
        print("  none came to the end: the target itself is broken", flush=True)
        return 1
    return len(counts.failures)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-12:])


if __name__ == "__main__":
    sys.exit(main())
