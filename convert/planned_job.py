"""What can be converted (a checkpoint, a PowerInfer file, a file of ours that is to get other predictors), each turned
into a planned `Job`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert.arch import adapted, config_activation
from convert.catalogue import named, recognise
from convert.checkpoint import Checkpoint, open_checkpoint, refuse_adapter
from convert.config import read_json
from convert.converted_file import in_stored_order, kept_keys, plan_again
from convert.fetch_checkpoint import fetch
from convert.formats import NUMBERS, check_type
from convert.metadata import general_metadata, read_card
from convert.plan import NewBlocks, Plan, Types, make_plan, outline, with_neurons
from convert.powerinfer.model_file import MAGIC as POWERINFER_MAGIC
from convert.powerinfer.model_file import PowerInferFile, import_metadata, plan_import, provenance
from convert.powerinfer.predictor import open_predictors, with_predictors
from convert.tokenizer.vocabulary import Converted, convert_tokenizer
from predictors.evaluate import total_bytes
from predictors.fit import ModelFit
from runtime.base.home import expanded
from runtime.errors import UserError
from runtime.model_file.bundle_writer import bundled
from runtime.model_file.reader import MAGIC, GgufFile
from runtime.model_file.writer import NewTensor

_OF_MATRICES = ("type", "output_type")
_OF_FITS = ("predictor", "energy")
_FILE = "the file"


@dataclass(frozen=True)
class ConvertOptions:
    """The options that say how the file is to be, None where they were not given; see `convert.convert`."""

    type: str | None = None
    output_type: str | None = None
    layout: str | None = None
    ffn_type: str | None = None
    predictor: str | None = None
    predictor_type: str | None = None
    energy: float | None = None
    import_predictor: str | None = None
    activations: str | None = None
    verify: bool | None = None

    def refuse(self, what: str, *options: str) -> None:
        """Raise UserError for the first of these options that was given, for it has no meaning for `what`."""
        for name in options:
            if getattr(self, name) is not None:
                raise UserError(f"--{name.replace('_', '-')}: does not apply to {what}", "leave the option out")


@dataclass(frozen=True)
class Job:
    """A planned conversion with the keys of its file.

    checkpoint: None where nothing comes from one. reorder: whether neurons may move. copied: whether all is as in
    another file, but for the layout.

    ffn_source: what told the activation: "--ffn-type", "config.json", "models.toml", or "the file" for one that is no
    checkpoint.
    """

    checkpoint: Checkpoint | None
    plan: Plan
    metadata: dict[str, Any]
    ffn_source: str
    reorder: bool = True
    copied: bool = False

    @property
    def stored(self) -> list[NewTensor]:
        """The tensors of the file, without their bytes: those of its layout."""
        tensors = [NewTensor(t.name, t.shape, NUMBERS[t.type], t.nbytes, ()) for t in self.plan.tensors]
        return bundled(self.plan.structure, {}, tensors)[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the file, without what lies between them."""
        return sum(tensor.nbytes for tensor in self.stored)

    @property
    def imported(self) -> bool:
        """Whether there are predictors before any are fitted."""
        return self.plan.structure.predictor != "none"

    def changed(self, new: NewBlocks) -> Job:
        """The job with neurons in a new order, with what was fitted, or with what was measured."""
        plan = with_neurons(self.plan, new)
        if isinstance(new, ModelFit) and self.imported:
            plan = replace(plan, notes=(*plan.notes, _measured(new)))
        if isinstance(new, ModelFit):
            plan = replace(plan, notes=(*plan.notes, *new.notes))
        return replace(self, plan=plan, metadata=self.metadata | plan.structure.to_metadata() | new.metadata)


def open_job(source: str, options: ConvertOptions) -> Job:
    """Plan the conversion of `source`: a folder, a Hub id or a file.

    Raises UserError for whatever is wrong with it or the options.
    """
    if options.import_predictor:
        options.refuse("imported predictors", *_OF_FITS)
    path = expanded(source)
    if not path.is_file():
        job = _checkpoint_job(source, options)
    elif (options.import_predictor or options.layout) and _magic(path) == MAGIC:
        return _converted_job(path, options)
    elif _magic(path) == MAGIC:
        raise UserError(
            f"`{path}`: a GGUF file, expected a checkpoint folder, a Hub id or a PowerInfer file",
            "a converted file can get another --layout, or other predictors: --import-predictor REPO_OR_DIR, or "
            "python -m predictors fit",
        )
    elif _magic(path) != POWERINFER_MAGIC and (path.parent / "config.json").is_file():
        raise UserError(
            f"`{path}`: a file of a checkpoint, expected its folder", f"python -m convert {path.parent} OUT.gguf"
        )
    else:
        job = _powerinfer_job(path, options)
    return _with_predictors(job, options) if options.import_predictor else job


def _magic(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(MAGIC))


def _checkpoint_job(source: str, options: ConvertOptions) -> Job:
    output = check_type(options.output_type, "--output-type") if options.output_type else ""
    types = Types(check_type(options.type or "f16", "--type"), output)
    layout = options.layout or "both"

    def described(folder: Path, repo: str) -> tuple[str, str | None, str | None]:
        known = recognise(repo, folder)
        return layout, options.ffn_type, known.ffn_type if known else None

    def check(folder: Path, repo: str) -> None:
        """What config.json alone tells, before weights are fetched, or looked for."""
        refuse_adapter(f"`{folder}`", [path.name for path in folder.iterdir()])
        outline(read_json(folder / "config.json"), *described(folder, repo))

    folder, repo = fetch(named(source), check)
    checkpoint = open_checkpoint(folder)
    plan = make_plan(checkpoint, types, *described(folder, repo))
    told = "--ffn-type" if options.ffn_type else _ffn_source(plan, checkpoint)
    tokenizer = convert_tokenizer(folder, plan.structure.vocab_size)
    plan = replace(plan, notes=(*plan.notes, *read_card(folder / "README.md")[1], *tokenizer.notes))
    return Job(checkpoint, plan, _metadata(folder, repo, plan, tokenizer), told)


def _ffn_source(plan: Plan, checkpoint: Checkpoint) -> str:
    assert plan.arch
    told = config_activation(plan.arch, adapted(plan.arch, checkpoint.config))
    return "config.json" if told == plan.structure.ffn_activation else "models.toml"


def _metadata(folder: Path, repo: str, plan: Plan, tokenizer: Converted) -> dict[str, Any]:
    return {
        **general_metadata(folder, repo, plan.types.main),
        **plan.structure.to_metadata(),
        **tokenizer.metadata,
    }


def _powerinfer_job(path: Path, options: ConvertOptions) -> Job:
    options.refuse("a PowerInfer file", *_OF_MATRICES, *_OF_FITS, "predictor_type", "import_predictor", "verify")
    file = PowerInferFile(path)
    plan = plan_import(file, options.layout or "sparse", options.ffn_type)
    told = "--ffn-type" if options.ffn_type else _FILE
    return Job(None, plan, import_metadata(file, plan.structure), told)


def _converted_job(path: Path, options: ConvertOptions) -> Job:
    what = "a file that is converted already"
    options.refuse(what, *_OF_MATRICES, "ffn_type", "activations", "verify")
    with GgufFile(path) as file:
        if not options.import_predictor:
            options.refuse(what, *_OF_FITS, "predictor_type")
            plan = plan_again(file, options.layout, predictors=True)
            return Job(None, plan, kept_keys(path, plan, predictors=True), _FILE, reorder=False, copied=True)
        options.refuse(what, "layout")
        plan = plan_again(file)
        job = _with_predictors(Job(None, plan, kept_keys(path, plan), _FILE, reorder=False), options)
        return replace(job, plan=in_stored_order(job.plan, file))


def _with_predictors(job: Job, options: ConvertOptions) -> Job:
    found = open_predictors(str(options.import_predictor), job.plan.structure)
    plan = with_predictors(job.plan, found, options.predictor_type or "auto")
    keys = plan.structure.to_metadata() | provenance(found.source, found.threshold)
    return replace(job, plan=plan, metadata=job.metadata | keys)


def _measured(fit: ModelFit) -> str:
    """What imported predictors achieve on the calibration text, in one line."""
    figures = [block.figures for block in fit.blocks]
    n = len(figures)
    fire, predicted = sum(f.active_share for f in figures) / n, sum(f.predicted_share for f in figures) / n
    recall = sum(f.recall * f.active_share for f in figures) / n / max(fire, 1e-12)
    read = total_bytes(figures)
    advice = "" if read["predicted"] < read["exact"] else ": they do not pay, so run it with --ffn exact"
    return (
        f"the imported predictors find {recall:.1%} of the neurons that fire ({fire:.1%} do, {predicted:.1%} are "
        "predicted); "
        f"a token reads {read['predicted']:.1%} of the FFNs' bytes with them, {read['exact']:.1%} in exact mode{advice}"
    )
