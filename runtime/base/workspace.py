"""A folder beside a file that is to be written: it is written there, then renamed into its place, so it is there whole
or not at all.

The folder's name follows from the file's, and a lock in it tells a run that writes from one that was killed: what the
latter left behind, the next run to the same file removes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from runtime.errors import UserError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NONE = -1  # no descriptor
_LOCK = "lock"
_COMING = "coming"  # names of the files of an exchange that is not finished
_ASIDE = "replaced"  # a folder of those that they replace
_KEPT = "kept"  # a folder: see `Workspace.kept`
_BUSY = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)  # how systems say that somebody else holds a lock


@dataclass(frozen=True)
class Workspace:
    """An open one. folder: what files are written to, each by the name it is to have; target: the absolute path of the
    one they are for; going: the names of those that are being published, once they are.
    """

    folder: Path
    target: Path
    going: list[str]

    @property
    def kept(self) -> Path:
        """A folder, which may not exist yet, for what a run that did not come to its end leaves to the next one. It
        goes at the end of one that has published files.
        """
        return self.folder / _KEPT

    def publish(self, names: Sequence[str], obsolete: Sequence[Path] = ()) -> None:
        """Move files of the folder to where `target` is, replacing what is there; then `obsolete` ones are gone. After
        an exception all is as it was.

        Of several files the first is what makes the others a whole: it is the first to be taken away and the last to
        come.
        """
        for name in names:
            _finish(self.folder / name, self.target.with_name(name))
        _sync(self.folder)
        self.going[:] = names
        if len(names) == 1 and not obsolete:  # at once: there is always an old one or a new one
            (self.folder / names[0]).replace(self.target.with_name(names[0]))
        else:
            self._exchange(names, obsolete)
        with suppress(OSError):  # some file systems cannot sync folders
            _sync(self.target.parent)

    def _exchange(self, names: Sequence[str], obsolete: Sequence[Path]) -> None:
        (self.folder / _ASIDE).mkdir()
        listed = self.folder / f"{_COMING}.new"
        listed.write_bytes(b"\0".join(map(os.fsencode, names)))
        _sync(listed)
        listed.rename(self.folder / _COMING)
        for name in (*names, *(path.name for path in obsolete)):
            with suppress(FileNotFoundError):
                self.target.with_name(name).rename(self.folder / _ASIDE / name)
        for name in reversed(names):
            (self.folder / name).replace(self.target.with_name(name))
        (self.folder / _COMING).unlink()


def _take_back(folder: Path, target: Path) -> None:
    """Undo an exchange of files that was not finished, here or in a run that was killed: new ones go, old ones
    return.
    """
    names = [os.fsdecode(name) for name in (folder / _COMING).read_bytes().split(b"\0") if name]
    if not any((folder / name).exists() for name in names):
        return  # it was finished, or had not begun
    for name in names:
        if not (folder / name).exists():
            target.with_name(name).replace(folder / name)
    for old in sorted((folder / _ASIDE).iterdir(), reverse=True):
        old.replace(target.with_name(old.name))


@contextmanager
def workspace(target: Path, name: Path) -> Iterator[Workspace]:
    """A workspace for `target`, emptied of what a killed run has left in it but what it kept, and removed at the end:
    all of it, unless something is kept and nothing was published.

    name: what errors about files in the workspace are to say instead. Raises UserError where another process (or
    thread) writes to the same target, and OSError where the folder cannot be written.
    """
    absolute = Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow links
    hold = _Hold(absolute)
    try:
        try:
            with _placing(absolute, name, hold.folder):
                hold.take(name)
            with _placing(absolute, name, hold.folder):
                _empty(hold.folder, absolute)
                yield Workspace(hold.folder, absolute, hold.going)
        finally:
            hold.release()
    finally:
        hold.release()  # an interrupt may have come on the way into the first, or within it


def kept_for(target: Path) -> Path:
    """Where an earlier run has kept something for `target`, if it has: see `Workspace.kept`."""
    return _folder_of(target) / _KEPT


def _folder_of(target: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]  # a name of any length fits
    return target.with_name(f".lazyneuron-{digest}")


class _Hold:
    """A target's folder, held by the lock in it.

    The lock's descriptor is stored before it is locked, and `release` may be called again, so that an interrupt at any
    moment leaves nothing behind.
    """

    def __init__(self, target: Path) -> None:
        self.folder = _folder_of(target)
        self.going: list[str] = []
        self._target = target
        self._lock = _NONE
        self._published: bool | None = None  # not known
        self._released = False

    def take(self, name: Path) -> None:
        """Make the folder and lock it.

        It becomes one with a name of its own, which nobody else will ever remove, where the folder is another user's or
        the file system has no locks.
        """
        while True:
            try:
                with suppress(FileExistsError):
                    self.folder.mkdir(0o700)
                if not _is_own(self.folder):
                    return self._make_another()
                self._lock = _open_lock(self.folder)
            except FileNotFoundError:
                if not self.folder.parent.is_dir():
                    raise
                continue  # whoever held the folder has just removed it
            held = _try_lock(self._lock)
            if held and _is_still(self._lock, self.folder / _LOCK):
                return None
            self._close()
            if held is None:
                (self.folder / _LOCK).unlink(missing_ok=True)
                _rmdir(self.folder)
                return self._make_another()
            if not held:
                raise UserError(
                    f"`{name}`: another process is writing it", "wait until it is done, or choose another name"
                )

    def release(self) -> None:
        """Remove the folder where it is ours, or nobody's."""
        if self._released:
            return
        if self._lock == _NONE:  # refused, or interrupted on the way
            with suppress(OSError):
                if _is_own(self.folder):
                    self._lock = os.open(self.folder / _LOCK, os.O_RDWR)
        # The one who held it may have gone since, and the folder be another run's, with a lock file of its own.
        if self._lock != _NONE and _try_lock(self._lock) is not False and _is_still(self._lock, self.folder / _LOCK):
            self._clear()
        self._close()
        _rmdir(self.folder)
        self._released = True

    def _make_another(self) -> None:
        self.folder = self.folder.with_name(f"{self.folder.name}-{secrets.token_hex(8)}")
        self.folder.mkdir(0o700)
        self._lock = _open_lock(self.folder)

    def _clear(self) -> None:
        """Remove all that the lock protects, then its file; the folder goes last, as NFS keeps a file until it is
        closed.
        """
        if self._published is None:  # an interrupt may lead here again, when files are removed already
            self._published = bool(self.going) and not any((self.folder / name).exists() for name in self.going)
        if self._published or self.folder != _folder_of(self._target):  # where no other run will look
            shutil.rmtree(self.folder / _KEPT, ignore_errors=True)
        with suppress(OSError):  # what cannot be removed now, the next run removes
            _empty(self.folder, self._target)
            (self.folder / _LOCK).unlink(missing_ok=True)

    def _close(self) -> None:
        lock, self._lock = self._lock, _NONE
        if lock != _NONE:
            os.close(lock)


def _is_own(folder: Path) -> bool:
    """Whether it is a folder of this user, and not a link that somebody has put there."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and (os.name == "nt" or found.st_uid == os.geteuid())


def _open_lock(folder: Path) -> int:
    return os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)


def _try_lock(descriptor: int) -> bool | None:
    """Whether the file could be locked; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _BUSY else None
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _rmdir(folder: Path) -> None:
    with suppress(OSError):  # not empty: another run has it, or it could not be cleared
        folder.rmdir()


def _empty(folder: Path, target: Path) -> None:
    if (folder / _COMING).exists():
        _take_back(folder, target)
        (folder / _COMING).unlink()
    for path in folder.iterdir():
        if path.name == _KEPT:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _finish(new: Path, place: Path) -> None:
    """Put the bytes on the disk, with the permissions of the file that is replaced."""
    _sync(new)
    with suppress(OSError):
        shutil.copymode(place, new)


def _sync(path: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _placing(target: Path, name: Path, folder: Path) -> Iterator[None]:
    """Let errors speak of the target, not of the workspace."""

    def placed(text: str) -> str:
        return text.replace(str(folder / target.name), str(name)).replace(str(folder), str(target.parent))

    try:
        yield
    except UserError as error:
        raise UserError(placed(error.message), placed(error.hint)) from error
    except OSError as error:
        if not any(str(folder) in str(path) for path in (error.filename, error.filename2)):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(name)) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the operating system that name no file name this one: reads and writes do not say which file it
    was.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
