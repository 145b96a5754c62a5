"""One conversion from end to end: find the checkpoint, plan, write. `convert`'s signature is the command line.

Puts the other modules together; prints nothing.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.hub import fetch
from convert.metadata import general_metadata
from convert.plan import NewBlocks, Plan, Types, make_plan, with_neurons
from convert.powerinfer import PowerInferFile, import_metadata, plan_import, provenance
from convert.powerinfer_predictor import open_predictors, read_counts, with_predictors
from convert.quantize import NUMBERS, check_type
from convert.stream import Bytes, Encoder
from convert.tokenizer import tokenizer_metadata
from predictors.adopt import adopt_model
from predictors.fit import DEFAULT_ENERGY, ModelFit, fit_model
from predictors.heat import order_by_counts
from predictors.quantized import Floats
from runtime.errors import UserError
from runtime.gguf_write import Stream, check_target, write_gguf
from runtime.structure import ARCHITECTURE, required_tensors

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Report:
    """What a conversion did, or would do. bytes: of the file; of its tensors alone after a dry run."""

    path: str
    bytes: int
    tensors: int
    types: dict[str, int]
    fallbacks: dict[str, str]
    seconds: float
    structure: dict[str, Any]
    dry_run: bool
    notes: tuple[str, ...]
    plan: Plan = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values, without the plan."""
        return {name: value for name, value in self.__dict__.items() if name != "plan"}


def convert(
    source: str | Path,
    out: str | Path | None = None,
    type: str | None = None,  # noqa: A002 - the option's name
    output_type: str | None = None,
    layout: str | None = None,
    threads: int | None = None,
    ffn_type: str | None = None,
    predictor: str | None = None,
    predictor_type: str = "auto",
    energy: float | None = None,
    import_predictor: str | Path | None = None,
    activations: str | Path | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int | None = None,
    seed: int = 0,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert the checkpoint `source` (a folder, or a Hub id) or the PowerInfer file `source` to the GGUF file `out`.

    type, output_type: format of the matrices (default f16) and of the output head (see `convert.quantize.TYPES`); a PowerInfer file keeps its own.
    layout: "both" stores the down projection twice (default); "sparse" only as the sparse kernels read it (default for a PowerInfer file).
    ffn_type: the activation, where the source does not tell the truth. threads: None for one per CPU.
    import_predictor: a folder or Hub id with PowerInfer's predictors, to be taken in place of fitted ones.
    activations: a folder or Hub id with PowerInfer's activation counts, to order neurons by in place of how often they fire on the calibration text.
    calibration: the text on which neurons are ordered and predictors fitted or measured: a UTF-8 file, None for the one in the package, "none" to leave both out.
    calibration_tokens, predictor (default "lowrank"), predictor_type, energy, seed: see `predictors.fit.fit_model`.
    progress: called with (what, done, of how much) as the work goes on.
    Raises UserError for whatever is wrong with the source, the options or the target; then nothing is written.
    """
    started = time.monotonic()
    target = None if dry_run else _target(out, force)
    if import_predictor:
        _refuse("imported predictors", predictor=predictor, energy=energy)
    path = Path(source).expanduser()
    if path.is_file():
        own = {"predictor": predictor, "energy": energy, "import_predictor": import_predictor}
        other_type = None if predictor_type == "auto" else predictor_type
        _refuse("a PowerInfer file", type=type, output_type=output_type, predictor_type=other_type, **own)
        job = _powerinfer_job(path, layout or "sparse", ffn_type)
    else:
        types = Types(
            check_type(type or "f16", "--type"), check_type(output_type, "--output-type") if output_type else ""
        )
        job = _checkpoint_job(str(source), types, layout or "both", ffn_type)
        if import_predictor:
            job = _with_predictors(job, str(import_predictor), predictor_type)
    counts, counted = read_counts(str(activations), job.plan.structure) if activations else (None, "")
    size = job.plan.nbytes
    if target:
        workers = threads or available_threads()
        calibrated = str(calibration) != "none"
        check_target(target, size * (2 if calibrated else 1), force)
        if calibrated:
            text = None if calibration is None else Path(calibration)
            fitting = Fitting(
                predictor or "lowrank",
                DEFAULT_ENERGY if energy is None else energy,
                text,
                calibration_tokens,
                predictor_type,
                seed,
                workers,
                counts,
            )
            with _unordered(job, target, workers, progress) as file:
                job = job.changed(fitting.run(file, job.imported, progress))
        elif counts:
            job = job.changed(order_by_counts(counts))
        if counted:
            job.metadata[f"{ARCHITECTURE}.calibration.counts"] = counted
        size = _write(job, target, workers, progress)
    return _report(job.plan, str(out or ""), size, dry_run, time.monotonic() - started)


def _refuse(what: str, **given: object) -> None:
    """Raise UserError for the first option that was given although it says nothing to `what`."""
    for name, value in given.items():
        if value is not None:
            raise UserError(f"--{name.replace('_', '-')}: does not apply to {what}", "leave the option out")


@dataclass(frozen=True)
class _Job:
    """A planned conversion with the keys of its file. checkpoint: None where nothing comes from one."""

    checkpoint: Checkpoint | None
    plan: Plan
    metadata: dict[str, Any]

    @property
    def imported(self) -> bool:
        """Whether the source has predictors, before any are fitted."""
        return self.plan.structure.predictor != "none"

    def changed(self, new: NewBlocks) -> _Job:
        """The job with neurons in a new order, with what was fitted, or with what was measured."""
        plan = with_neurons(self.plan, new)
        if isinstance(new, ModelFit) and self.imported:
            plan = replace(plan, notes=(*plan.notes, _measured(new)))
        return replace(self, plan=plan, metadata=self.metadata | plan.structure.to_metadata() | new.metadata)


def _measured(fit: ModelFit) -> str:
    """What imported predictors achieve on the calibration text, in one line."""
    figures = [block.figures for block in fit.blocks]
    fire, predicted = (
        sum(getattr(f, name) for f in figures) / len(figures) for name in ("active_share", "predicted_share")
    )
    recall = sum(f.recall * f.active_share for f in figures) / max(sum(f.active_share for f in figures), 1e-12)
    return (
        f"imported predictors find {recall:.1%} of the neurons that fire: {fire:.1%} do, {predicted:.1%} are predicted"
    )


def _checkpoint_job(source: str, types: Types, layout: str, ffn_type: str | None) -> _Job:
    folder, repo = fetch(source)
    checkpoint = open_checkpoint(folder)
    plan = make_plan(checkpoint, types, layout, ffn_type)
    return _Job(checkpoint, plan, _metadata(folder, repo, plan))


def _powerinfer_job(path: Path, layout: str, ffn_type: str | None) -> _Job:
    file = PowerInferFile(path)
    plan = plan_import(file, layout, ffn_type)
    return _Job(None, plan, import_metadata(file, plan.structure))


def _with_predictors(job: _Job, source: str, matrix_type: str) -> _Job:
    found = open_predictors(source, job.plan.structure)
    plan = with_predictors(job.plan, found, matrix_type)
    keys = plan.structure.to_metadata() | provenance(found.source, found.threshold)
    return replace(job, plan=plan, metadata=job.metadata | keys)


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
    counts: Sequence[Floats] | None

    def run(self, file: Path, imported: bool, progress: Progress | None) -> ModelFit:
        """Fit the model in `file`; or measure the predictors that it came with."""

        def layers(layer: int, n_layers: int, share: float) -> None:
            if progress:
                progress(f"calibrating layer {layer}", round((layer + share) * 1000), n_layers * 1000)

        if imported:
            return adopt_model(
                file, self.calibration, self.tokens, self.seed, self.threads, progress=layers, counts=self.counts
            )
        return fit_model(file, **self.__dict__, progress=layers)


@contextmanager
def _unordered(job: _Job, target: Path, threads: int, progress: Progress | None) -> Iterator[Path]:
    """The model with its neurons in the source's order, for as long as it is calibrated: a temporary file beside the target."""
    sparse = replace(job.plan.structure, layout="sparse")
    tensors = tuple(t for t in job.plan.tensors if t.name in required_tensors(sparse))
    file = target.with_name(f".{target.name}.{os.getpid()}.unordered")
    plain = replace(job, plan=replace(job.plan, tensors=tensors), metadata=job.metadata | sparse.to_metadata())
    try:
        _write(plain, file, threads, progress)
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


def _write(job: _Job, out: Path, threads: int, progress: Progress | None) -> int:
    count = _Count(job.plan.nbytes, progress)
    with Encoder(job.checkpoint, threads) as encoder:
        streams = [
            Stream(t.name, t.shape, NUMBERS[t.type], t.nbytes, count.watch(t.name, encoder.pieces(t)))
            for t in job.plan.tensors
        ]
        return write_gguf(out, job.metadata, streams)


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


def _report(plan: Plan, path: str, size: int, dry_run: bool, seconds: float) -> Report:
    return Report(
        path=path,
        bytes=size,
        tensors=len(plan.tensors),
        types=dict(Counter(tensor.type for tensor in plan.tensors)),
        fallbacks=plan.fallbacks,
        seconds=round(seconds, 3),
        structure=asdict(plan.structure),
        dry_run=dry_run,
        notes=plan.notes,
        plan=plan,
    )
