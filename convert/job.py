"""One conversion from end to end: find the checkpoint, plan, write. `convert`'s signature is the command line.

Puts the other modules together; prints nothing.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.hub import fetch
from convert.metadata import general_metadata
from convert.plan import Plan, Types, make_plan, with_neurons
from convert.quantize import NUMBERS, check_type
from convert.stream import Bytes, Encoder
from convert.tokenizer import tokenizer_metadata
from predictors.fit import DEFAULT_ENERGY, ModelFit, fit_model
from runtime.errors import UserError
from runtime.gguf_split import check_no_shards, check_sizes, shard_size, split_model
from runtime.gguf_write import Stream, check_target, write_files
from runtime.structure import required_tensors

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Report:
    """What a conversion did, or would do. files: one, or the shards, of which `path` is the first.

    bytes: of all files; of the tensors alone after a dry run.
    """

    path: str
    files: list[str]
    bytes: int
    tensors: int
    types: dict[str, int]
    fallbacks: dict[str, str]
    seconds: float
    structure: dict[str, Any]
    dry_run: bool
    plan: Plan = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values, without the plan."""
        return {name: value for name, value in self.__dict__.items() if name != "plan"}


def convert(
    source: str | Path,
    out: str | Path | None = None,
    type: str = "f16",  # noqa: A002 - the option's name
    output_type: str | None = None,
    layout: str = "both",
    threads: int | None = None,
    ffn_type: str | None = None,
    predictor: str = "lowrank",
    predictor_type: str = "auto",
    energy: float = DEFAULT_ENERGY,
    calibration: str | Path | None = None,
    calibration_tokens: int | None = None,
    seed: int = 0,
    split_max_size: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert the checkpoint `source` (a folder, or a Hub id) to the GGUF file `out`.

    type, output_type: format of the matrices and of the output head (see `convert.quantize.TYPES`).
    layout: "both" stores the down projection twice; "sparse" only as the sparse kernels read it.
    ffn_type: the activation, where config.json does not tell the truth. threads: None for one per CPU.
    calibration: the text on which neurons are ordered and predictors fitted: a UTF-8 file, None for the one in the package, "none" to leave both out.
    calibration_tokens, predictor, predictor_type, energy, seed: see `predictors.fit.fit_model`.
    split_max_size: e.g. "45G": a larger model is written as shards of at most that size, `out` with -00001-of-0000N in its name.
    progress: called with (what, done, of how much) as the work goes on.
    Raises UserError for whatever is wrong with the checkpoint or the target; then nothing is written.
    """
    started = time.monotonic()
    types = Types(check_type(type, "--type"), check_type(output_type, "--output-type") if output_type else "")
    max_bytes = shard_size(split_max_size)
    target = None if dry_run else _target(out, force, max_bytes)
    folder, repo = fetch(str(source))
    checkpoint = open_checkpoint(folder)
    plan = make_plan(checkpoint, types, layout, ffn_type)
    metadata = _metadata(folder, repo, plan)
    check_sizes(plan.tensors, max_bytes)
    size, files = plan.nbytes, [str(out)] if out else []
    if target:
        workers = threads or available_threads()
        calibrated = str(calibration) != "none"
        check_target(target, plan.nbytes * (2 if calibrated else 1), force)
        if calibrated:
            fitting = Fitting(predictor, energy, _text(calibration), calibration_tokens, predictor_type, seed, workers)
            with _unordered(checkpoint, plan, metadata, target, workers, progress) as file:
                fit = fitting.run(file, progress)
            plan = with_neurons(plan, fit)
            metadata |= plan.structure.to_metadata() | fit.metadata
        size, files = _write(checkpoint, plan, metadata, target, workers, progress, max_bytes)
    return _report(plan, files, size, dry_run, time.monotonic() - started)


def _text(calibration: str | Path | None) -> Path | None:
    return None if calibration is None else Path(calibration)


@dataclass(frozen=True)
class Fitting:
    """How to fit predictors: the parameters of `predictors.fit.fit_model`."""

    kind: str
    energy: float
    calibration: Path | None
    tokens: int | None
    predictor_type: str
    seed: int
    threads: int

    def run(self, file: Path, progress: Progress | None) -> ModelFit:
        """Fit the model in `file`."""

        def layers(layer: int, n_layers: int, share: float) -> None:
            if progress:
                progress(f"calibrating layer {layer}", round((layer + share) * 1000), n_layers * 1000)

        return fit_model(file, **self.__dict__, progress=layers)


@contextmanager
def _unordered(
    checkpoint: Checkpoint, plan: Plan, metadata: dict[str, Any], target: Path, threads: int, progress: Progress | None
) -> Iterator[Path]:
    """The model with its neurons in the checkpoint's order, for as long as it is calibrated: a temporary file beside the target."""
    sparse = replace(plan.structure, layout="sparse")
    tensors = tuple(t for t in plan.tensors if t.name in required_tensors(sparse))
    file = target.with_name(f".{target.name}.{os.getpid()}.unordered")
    try:
        _write(
            checkpoint, replace(plan, tensors=tensors), {**metadata, **sparse.to_metadata()}, file, threads, progress
        )
        yield file
    finally:
        file.unlink(missing_ok=True)


def available_threads() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _target(out: str | Path | None, force: bool, max_bytes: int) -> Path:
    """The file to write, known to be writable before anything is fetched for it. max_bytes: of a shard, 0 for one file."""
    if out is None:
        raise UserError("no output file given", "python -m convert REPO_OR_DIR OUT.gguf, or add --dry-run")
    check_target(Path(out), 0, force)
    if max_bytes:
        check_no_shards(Path(out), force)
    return Path(out)


def _metadata(folder: Path, repo: str, plan: Plan) -> dict[str, Any]:
    return {
        **general_metadata(folder, repo, plan.types.main),
        **plan.structure.to_metadata(),
        **tokenizer_metadata(folder, plan.structure.vocab_size),
    }


def _write(
    checkpoint: Checkpoint,
    plan: Plan,
    metadata: dict[str, Any],
    out: Path,
    threads: int,
    progress: Progress | None,
    max_bytes: int = 0,
) -> tuple[int, list[str]]:
    """Write the planned file, or its shards of at most `max_bytes`; returns their bytes and their names."""
    count = _Count(plan.nbytes, progress)
    with Encoder(checkpoint, threads) as encoder:
        streams = [
            Stream(t.name, t.shape, NUMBERS[t.type], t.nbytes, count.watch(t.name, encoder.pieces(t)))
            for t in plan.tensors
        ]
        files = split_model(out, metadata, streams, max_bytes)
        return write_files(files), [str(file.path) for file in files]


@dataclass
class _Count:
    """Adds up the bytes of all streams and reports the sum."""

    total: int
    progress: Progress | None
    done: int = 0

    def watch(self, name: str, pieces: Iterator[Bytes]) -> Iterator[Bytes]:
        for piece in pieces:
            yield piece
            self.done += piece.nbytes
            if self.progress:
                self.progress(name, self.done, self.total)


def _report(plan: Plan, files: list[str], size: int, dry_run: bool, seconds: float) -> Report:
    return Report(
        path=files[0] if files else "",
        files=files,
        bytes=size,
        tensors=len(plan.tensors),
        types=dict(Counter(tensor.type for tensor in plan.tensors)),
        fallbacks=plan.fallbacks,
        seconds=round(seconds, 3),
        structure=asdict(plan.structure),
        dry_run=dry_run,
        plan=plan,
    )
