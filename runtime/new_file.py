"""Writes a file whole or not at all: to a temporary name beside the target, then renamed.

Knows nothing of what is in it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import UserError


def check_target(out: Path, nbytes: int, force: bool, example: str = "model.gguf") -> None:
    """Raise UserError unless a file of `nbytes` can be put at `out`. example: a name for it, where `out` is a folder."""
    if out.is_dir():
        raise UserError(f"`{out}`: a folder, expected a file name", f"for example {out / example}")
    if not out.parent.is_dir():
        raise UserError(f"`{out.parent}`: no such folder", "make it first, or write elsewhere")
    if out.exists() and not force:
        raise UserError(f"`{out}`: exists already", "add --force to replace it, or choose another name")
    check_space(out.parent, nbytes)


def check_space(folder: Path, nbytes: int) -> None:
    """Raise UserError unless files of `nbytes` together fit into `folder`."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise UserError(
            f"`{folder}`: {free / 1e9:.2f} GB free, expected at least the {nbytes / 1e9:.2f} GB of the file",
            "free some space, or write to another disk",
        )


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A temporary path in the same folder that takes `out`'s place at the end, or goes away."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(out)
        _sync_folder(out.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system has folders to sync."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
