"""Where a file may be written, asked before anything is computed for it; and one file written whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.base.figures import size
from runtime.base.workspace import Workspace, naming, workspace
from runtime.errors import UserError

_Is = Callable[[int], bool]
_KINDS: tuple[tuple[_Is, str], ...] = (
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def new_path(text: str | Path, example: str = "model.gguf") -> Path:
    """The name of a file to be written, as a user gave it. Raises UserError for what names none: "", "-", or a
    folder.
    """
    given = os.fspath(text)
    if given in ("", "-") or "\0" in given:
        found = "standard output" if given == "-" else "no name of a file"
        raise UserError(f"`{given}`: {found}, expected a file name", f"for example {example}")
    if given.endswith(("/", os.sep)):
        raise UserError(f"`{given}`: a folder, expected a file name", f"for example {given}{example}")
    return Path(given)


def place_of(out: Path, example: str = "model.gguf") -> Path:
    """Where a file called `out` is to be put: where that points to, if it is a symbolic link.

    Raises UserError for what is there and is no regular file, and for a missing folder; OSError for names that are too
    long, and links in a circle.
    """
    mode = _mode(out)
    if stat.S_ISDIR(mode):
        raise UserError(f"`{out}`: a folder, expected a file name", f"for example {out / example}")
    for is_kind, kind in _KINDS:
        if is_kind(mode):
            raise UserError(f"`{out}`: {kind}, expected a regular file or a new name", f"for example {example}")
    place = Path(os.path.realpath(out)) if out.is_symlink() else out
    if not place.parent.is_dir():
        where = f"`{place.parent}`" if place == out else f"`{out}`: points to `{place}`"
        raise UserError(f"{where}: no such folder", "make it first, or write elsewhere")
    return place


def _mode(path: Path) -> int:
    """Of what is there, links followed; 0 where nothing is."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def check_target(out: Path, nbytes: int, force: bool, example: str = "model.gguf", inputs: Iterable[Path] = ()) -> None:
    """Raise UserError or OSError unless a file of `nbytes` can be put at `out`.

    It must be a new name in a folder that can be written to, or with `force` a file that can be replaced and is none of
    `inputs`.
    example: a name for it, where `out` is a folder.
    """
    place = place_of(out, example)
    if place.exists():
        if any(path.exists() and place.samefile(path) for path in inputs):
            raise UserError(f"`{out}`: is the source itself, expected another file", "write to a new name")
        if not force:
            raise UserError(f"`{out}`: exists already", "add --force to replace it, or choose another name")
        if not os.access(place, os.W_OK):
            raise UserError(
                f"`{out}`: is protected from being written", "choose another name, or change its permissions"
            )
    check_space(place.parent, nbytes)
    with writing(out):
        pass


def check_space(folder: Path, nbytes: int) -> None:
    """Raise UserError unless files of `nbytes` together fit into `folder`."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise UserError(
            f"`{folder}`: {size(free)} free, expected at least the {size(nbytes)} of the file",
            "free some space, or write to another disk",
        )


@contextmanager
def writing(out: Path) -> Iterator[Workspace]:
    """A workspace for the file `out`, or what it points to: see `runtime.base.workspace`. Raises what `place_of`
    raises.
    """
    with workspace(place_of(out), out) as work:
        yield work


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A temporary path whose file takes `out`'s place at the end, or goes away. An OSError that names no file names
    `out`.
    """
    with writing(out) as work:
        partial = work.folder / work.target.name
        with naming(out):
            yield partial
        work.publish([partial.name])


@contextmanager
def folder_made(folder: Path) -> Iterator[None]:
    """Make a folder, and those above it, where they are missing; after an exception they are missing again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise
