"""python tests/make_models.py FOLDER NAME..: converts tiny checkpoints for tests that run where transformers is not."""

from __future__ import annotations

import sys
from pathlib import Path

from checkpoints import CHECKPOINTS
from experts import MODELS

from convert import convert

if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    for name in names:
        make = MODELS[name].make if name in MODELS else CHECKPOINTS[name]
        make(Path(folder) / name)
        convert(Path(folder) / name, Path(folder) / f"{name}.gguf", type="f32", calibration="none", force=True)
