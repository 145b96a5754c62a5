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

from convert.arch import adapted, config_activation
from convert.catalogue import named, recognise
from convert.checkpoint import Checkpoint, open_checkpoint
from convert.hub import fetch
from convert.metadata import general_metadata
from convert.plan import Plan, Types, make_plan, with_neurons
from convert.quantize import NUMBERS, check_type
from convert.stream import Bytes, Encoder
from convert.tokenizer import tokenizer_metadata
from convert.verify import Verdict
from convert.verify import verify as verify_file
from predictors.fit import DEFAULT_ENERGY, ModelFit, fit_model
from runtime.errors import UserError
from runtime.gguf_write import Stream, check_target, write_gguf
from runtime.structure import required_tensors

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Report:
    """What a conversion did, or would do. bytes: of the file; of its tensors alone after a dry run.

    ffn_source: who said which activation it is: "config.json", "--ffn-type" or "models.toml". verified: see `convert.verify.Verdict`.
    """

    path: str
    bytes: int
    tensors: int
    types: dict[str, int]
    fallbacks: dict[str, str]
    seconds: float
    structure: dict[str, Any]
    ffn_source: str
    verified: dict[str, Any] | None
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
    verify: bool = False,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert the checkpoint `source` (a folder, a Hub id, or a short name of the catalogue) to the GGUF file `out`.

    type, output_type: format of the matrices and of the output head (see `convert.quantize.TYPES`).
    layout: "both" stores the down projection twice; "sparse" only as the sparse kernels read it.
    ffn_type: the activation, where neither config.json nor the catalogue tell the truth. threads: None for one per CPU.
    calibration: the text on which neurons are ordered and predictors fitted: a UTF-8 file, None for the one in the package, "none" to leave both out.
    calibration_tokens, predictor, predictor_type, energy, seed: see `predictors.fit.fit_model`.
    verify: compare the file's logits with the checkpoint's before it takes its name; see `convert.verify`.
    progress: called with (what, done, of how much) as the work goes on.
    Raises UserError for whatever is wrong with the checkpoint or the target; then nothing is written.
    """
    started = time.monotonic()
    types = Types(check_type(type, "--type"), check_type(output_type, "--output-type") if output_type else "")
    target = None if dry_run else _target(out, force)
    folder, repo = fetch(named(str(source)))
    checkpoint = open_checkpoint(folder)
    known = recognise(repo, folder)
    plan = make_plan(checkpoint, types, layout, ffn_type, known.ffn_type if known else None)
    metadata = _metadata(folder, repo, plan)
    size, verdict, planned = plan.nbytes, None, plan
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
        with _checked(target, verify) as file:
            size = _write(checkpoint, plan, metadata, file, workers, progress)
            if verify:
                verdict = verify_file(file, target, checkpoint, planned)
    ffn_source = "--ffn-type" if ffn_type else _ffn_source(plan, checkpoint)
    return _report(plan, str(out or ""), size, ffn_source, verdict, dry_run, time.monotonic() - started)


@contextmanager
def _checked(target: Path, verify: bool) -> Iterator[Path]:
    """The file to write: the target, or one beside it that takes the target's name once it has been verified."""
    if not verify:
        yield target
        return
    file = target.with_name(f".{target.name}.{os.getpid()}.unverified")
    try:
        yield file
        file.replace(target)
    finally:
        file.unlink(missing_ok=True)


def _ffn_source(plan: Plan, checkpoint: Checkpoint) -> str:
    told = config_activation(plan.arch, adapted(plan.arch, checkpoint.config))
    return "config.json" if told == plan.structure.ffn_activation else "models.toml"


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


def _target(out: str | Path | None, force: bool) -> Path:
    """The file to write, known to be writable before anything is fetched for it."""
    if out is None:
        raise UserError("no output file given", "python -m convert REPO_OR_DIR OUT.gguf, or add --dry-run")
    check_target(Path(out), 0, force)
    return Path(out)


def _metadata(folder: Path, repo: str, plan: Plan) -> dict[str, Any]:
    return {
        **general_metadata(folder, repo, plan.types.main),
        **plan.structure.to_metadata(),
        **tokenizer_metadata(folder, plan.structure.vocab_size),
    }


def _write(
    checkpoint: Checkpoint, plan: Plan, metadata: dict[str, Any], out: Path, threads: int, progress: Progress | None
) -> int:
    count = _Count(plan.nbytes, progress)
    with Encoder(checkpoint, threads) as encoder:
        streams = [
            Stream(t.name, t.shape, NUMBERS[t.type], t.nbytes, count.watch(t.name, encoder.pieces(t)))
            for t in plan.tensors
        ]
        return write_gguf(out, metadata, streams)


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


def _report(
    plan: Plan, path: str, size: int, ffn_source: str, verdict: Verdict | None, dry_run: bool, seconds: float
) -> Report:
    return Report(
        path=path,
        bytes=size,
        tensors=len(plan.tensors),
        types=dict(Counter(tensor.type for tensor in plan.tensors)),
        fallbacks=plan.fallbacks,
        seconds=round(seconds, 3),
        structure=asdict(plan.structure),
        ffn_source=ffn_source,
        verified=asdict(verdict) if verdict else None,
        dry_run=dry_run,
        plan=plan,
    )
