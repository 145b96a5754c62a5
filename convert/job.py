"""One conversion from end to end: find the checkpoint, plan, write. `convert`'s signature is the command line.

Puts the other modules together; prints nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from convert.encode import Bytes, Encoder
from convert.formats import NUMBERS
from convert.plan import Plan
from convert.planned_job import ConvertOptions, Job, open_job
from convert.powerinfer.predictor import read_counts
from convert.verify.logits import Verdict
from convert.verify.logits import verify as verify_file
from predictors.adopted import adopt_model
from predictors.fit import DEFAULT_ENERGY, ModelFit, fit_model
from predictors.hot_order import order_by_counts
from predictors.kept_layers import KeptLayers
from predictors.matrices import Floats
from runtime.base.atomic import check_space, check_target, new_path, writing
from runtime.base.home import expanded
from runtime.base.phases import phase
from runtime.base.processors import default_threads
from runtime.base.progress import Progress, silent
from runtime.base.workspace import Workspace
from runtime.errors import UserError
from runtime.model_file.bundle_writer import bundled
from runtime.model_file.shard_writer import check_shards, check_sizes, old_shards, shard_size, split_model
from runtime.model_file.structure import ARCHITECTURE
from runtime.model_file.writer import NewTensor, write_parts


@dataclass(frozen=True)
class Report:
    """What a conversion did, or would do. files: one, or the shards, of which `path` is the first.

    bytes: of all files; of the tensors alone after a dry run.
    ffn_source: who said which activation it is: "config.json", "--ffn-type" or "models.toml". verified: see
    `convert.verify.logits.Verdict`.
    """

    path: str
    files: list[str]
    bytes: int
    tensors: int
    types: dict[str, int]
    fallbacks: dict[str, str]
    seconds: float
    structure: dict[str, Any]
    ffn_source: str
    verified: dict[str, Any] | None
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
    split_max_size: str | None = None,
    verify: bool = False,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> Report:
    """Convert `source` to the GGUF file `out`: a checkpoint (a folder, a Hub id, or a short name of the catalogue), a
    PowerInfer file, or a file of ours that is to get other predictors.

    type, output_type: format of the matrices (default f16) and of the output head (see `convert.formats.TYPES`); files
    keep their own.
    layout: "both" stores the down projection twice (default); "sparse" only as the sparse kernels read it (default for
    a PowerInfer file); "paged" so, too, and each neuron's rows side by side. A file of ours is copied with the layout.
    ffn_type: the activation, where neither the source nor the catalogue tell the truth. threads: None for one per
    processor, or what the CPU quota allows.
    import_predictor: a folder or Hub id with PowerInfer's predictors, to be taken in place of fitted ones.
    activations: a folder or Hub id with PowerInfer's activation counts, to order neurons by in place of how often they
    fire on the calibration text.
    calibration: the text on which neurons are ordered and predictors fitted or measured: a UTF-8 file, None for the one
    in the package, "none" to leave both out.
    calibration_tokens, predictor (default "lowrank"), predictor_type, energy, seed: see `predictors.fit.fit_model`.
    split_max_size: e.g. "45G": a larger model is written as shards of at most that size, `out` with -00001-of-0000N in
    its name.
    verify: compare the file's logits with the checkpoint's before it takes its name; see `convert.verify.logits`.
    progress: called with (what, done, of how much) as the work goes on.
    Raises UserError for whatever is wrong with the source, the options or the target; then nothing is written.
    """
    started = time.monotonic()
    max_bytes = shard_size(split_max_size)
    other_type = None if predictor_type == "auto" else predictor_type
    others, counted = (str(folder) if folder else None for folder in (import_predictor, activations))
    options = ConvertOptions(
        type, output_type, layout, ffn_type, predictor, other_type, energy, others, counted, verify or None
    )
    text = None if calibration is None else Path(calibration)
    if dry_run:
        job = open_job(str(source), options)
        check_sizes(job.stored, max_bytes)
        if activations:
            read_counts(str(activations), job.plan.structure)
        return _report(job, [str(out)] if out else [], job.nbytes, None, True, time.monotonic() - started)
    fitting = Fitting(
        predictor or "lowrank",
        DEFAULT_ENERGY if energy is None else energy,
        text,
        calibration_tokens,
        predictor_type,
        seed,
        threads or default_threads(per_processor=True),
    )
    calibrated = str(calibration) != "none"
    target = _target(out, force, max_bytes, [path for path in (source, import_predictor, activations, text) if path])
    # Held from the beginning: what cannot be written is not worth fetching anything for.
    with writing(target) as work:
        job = planned = open_job(str(source), options)
        check_sizes(job.stored, max_bytes)
        calibrated = calibrated and not job.copied
        check_space(work.target.parent, job.nbytes * (2 if calibrated else 1))
        job = _with_neurons(job, fitting if calibrated else None, options.activations, work, progress)
        size, written = _write(job, work, fitting.threads, progress, max_bytes)
        verdict = None
        if verify and job.checkpoint:
            verdict = verify_file(written[0], target, job.checkpoint, planned.plan)
        names = [path.name for path in written]
        work.publish(names, _obsolete(work.target, names) if max_bytes else ())
    where = work.target if target.is_symlink() else target
    files = [str(where.with_name(name)) for name in names] if len(names) > 1 else [str(target)]
    return _report(job, files, size, verdict, False, time.monotonic() - started)


def _obsolete(target: Path, names: Sequence[str]) -> list[Path]:
    """Other files of the model that is replaced: it may have been one file, or other shards."""
    return [path for path in (target, *old_shards(target)) if path.name not in names]


def _with_neurons(
    job: Job, fitting: Fitting | None, activations: str | None, work: Workspace, progress: Progress
) -> Job:
    """The job with neurons in order and predictors fitted or measured, by calibration (or without) and by counts (or
    not).
    """
    counts, counted = read_counts(activations, job.plan.structure) if activations else (None, "")
    if fitting:
        with _unordered(job, work, fitting.threads, progress) as file:
            kept = KeptLayers(work.kept)
            with phase("calibration"):
                fit = fitting.run(file, job, counts, progress, kept)
            job = job.changed(fit)
        if kept.note:
            job = replace(job, plan=replace(job.plan, notes=(*job.plan.notes, kept.note)))
    elif counts:
        job = job.changed(order_by_counts(counts))
    return replace(job, metadata=job.metadata | {f"{ARCHITECTURE}.calibration.counts": counted}) if counted else job


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

    def run(
        self, file: Path, job: Job, counts: Sequence[Floats] | None, progress: Progress, kept: KeptLayers
    ) -> ModelFit:
        """Fit the model in `file`, which is the job's; or measure the predictors that it came with.

        counts: what to order neurons by. kept: where fitted layers wait for the others.
        """
        if job.imported:
            shared = (self.calibration, self.tokens, self.seed, self.threads)
            return adopt_model(file, *shared, progress=progress, counts=counts, reorder=job.reorder)
        return fit_model(file, **self.__dict__, progress=progress, counts=counts, kept=kept)


@contextmanager
def _unordered(job: Job, work: Workspace, threads: int, progress: Progress) -> Iterator[Path]:
    """The model with its neurons in the source's order, for as long as it is calibrated."""
    _, (file,) = _write(job, work, threads, progress)
    yield file
    file.unlink()


def _target(out: str | Path | None, force: bool, max_bytes: int, sources: Sequence[str | Path]) -> Path:
    """The file to write, known to be writable before anything is fetched for it.

    max_bytes: of a shard, 0 for one file.
    """
    if out is None:
        raise UserError("no output file given", "python -m convert REPO_OR_DIR OUT.gguf, or add --dry-run")
    target = new_path(out)
    inputs = [file for source in sources for file in _files(expanded(source))]
    check_target(target, 0, force, inputs=inputs)
    if max_bytes:
        check_shards(target, force, inputs)
    return target


def _files(source: Path) -> list[Path]:
    """What may be read of a source; in a folder, what was converted before is not."""
    if source.is_dir():
        return [path for path in source.iterdir() if path.suffix != ".gguf"]
    return [source]


def _write(job: Job, work: Workspace, threads: int, progress: Progress, max_bytes: int = 0) -> tuple[int, list[Path]]:
    """Write the job's file, or its shards of at most `max_bytes`, into the workspace; returns their bytes and their
    paths.
    """
    count = _Count(job.plan.nbytes, progress)
    with Encoder(job.checkpoint, threads) as encoder:
        streams = [
            NewTensor(t.name, t.shape, NUMBERS[t.type], t.nbytes, count.watch(t.name, encoder.pieces(t)))
            for t in job.plan.tensors
        ]
        files = split_model(
            work.folder / work.target.name, *bundled(job.plan.structure, job.metadata, streams), max_bytes
        )
        with phase("writing"):
            return write_parts(files), [file.path for file in files]


@dataclass
class _Count:
    """Adds up the bytes of all streams and reports the sum."""

    total: int
    progress: Progress
    done: int = 0

    def watch(self, name: str, pieces: Iterator[Bytes]) -> Iterator[Bytes]:
        for piece in pieces:
            yield piece
            self.done += piece.nbytes
            self.progress(name, self.done, self.total)


def _report(job: Job, files: list[str], size: int, verdict: Verdict | None, dry_run: bool, seconds: float) -> Report:
    plan = job.plan
    return Report(
        path=files[0] if files else "",
        files=files,
        bytes=size,
        tensors=len(plan.tensors),
        types=dict(Counter(tensor.type for tensor in plan.tensors)),
        fallbacks=plan.fallbacks,
        seconds=round(seconds, 3),
        structure=asdict(plan.structure),
        ffn_source=job.ffn_source,
        verified=asdict(verdict) if verdict else None,
        dry_run=dry_run,
        notes=plan.notes,
        plan=plan,
    )
