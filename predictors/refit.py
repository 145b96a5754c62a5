"""A model file written again with other predictors. The order of its neurons stays: only a conversion changes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from predictors.fit import ModelFit, fit_model
from predictors.replace_predictors import with_new_predictors
from runtime.base.atomic import check_target, writing
from runtime.model_file.bundle_writer import laid_out
from runtime.model_file.reader import GgufFile
from runtime.model_file.writer import write_parts


@dataclass(frozen=True)
class Refit:
    """What was written: bytes of the new file, and the fit in it."""

    bytes: int
    fit: ModelFit


def refit(model: Path, out: Path, force: bool = False, layout: str | None = None, **options: Any) -> Refit:
    """Write `model` to `out` with other predictors. layout: of the new file (default: as it is). options: those of
    `fit_model`. Raises UserError as it does, and for an `out` that exists, unless forced, or is read.
    """
    with GgufFile(model) as file:
        read = [part.path for part in file.parts]
        laid_out(file.structure, layout, f"`{model}`")
        check_target(out, file.size, force, inputs=[*read, *filter(None, [options.get("calibration")])])
    with writing(out) as work:
        made = fit_model(model, reorder=False, **options)
        new = work.folder / work.target.name
        tensors = [block.tensors for block in made.blocks]
        size = write_parts([with_new_predictors(model, new, tensors, made.metadata, layout)])
        work.publish([new.name])
    return Refit(size, made)
