"""Inputs that failed once, kept to be run again: `corpus/TARGET/DIGEST.zip`, each with the files of one input."""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import replace
from pathlib import Path

from fuzz.worker import Files, Target

FOLDER = Path(__file__).parent / "corpus"
_LARGEST = 100_000  # bytes of an input in the corpus
_TIME = (1980, 1, 1, 0, 0, 0)  # the same bytes every time


def packed(files: Files) -> bytes:
    """An input as one file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, _TIME), data, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def unpacked(path: Path) -> Files:
    """The files of an input."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def keep(folder: Path, target: str, files: Files) -> Path:
    """Put an input into a corpus; where it is."""
    data = packed(files)
    path = folder / target / f"{hashlib.sha256(data).hexdigest()[:12]}.zip"
    path = path if len(data) <= _LARGEST else Path("build/fuzz") / path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _paths(target: Target) -> list[Path]:
    return sorted((FOLDER / target.name).glob("*.zip"))


def size(target: Target) -> int:
    """How many inputs of a target there are."""
    return len(_paths(target))


def replayed(target: Target) -> Target:
    """The target with its inputs from the corpus."""
    paths = _paths(target)
    return replace(target, make=lambda index: unpacked(paths[index]))
