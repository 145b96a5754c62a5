"""Files from the Hugging Face Hub through huggingface_hub: its cache, its resuming, its tokens; their sha256 checked
once.

huggingface_hub compares sizes only. Knows nothing of which files make up a model: the caller chooses.
"""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download
from huggingface_hub.utils.tqdm import disable_progress_bars

from runtime.errors import UserError
from runtime.hub.names import Listing, Reference, RemoteFile

# The HTTP library's own base class; which library that is depends on huggingface_hub's version.
_TRANSPORT: type[Exception] = errors.HfHubHTTPError.__mro__[1]
_UNREACHABLE = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, _TRANSPORT)
_WAITS = (1, 2, 4)  # seconds before a transfer is tried again, besides what huggingface_hub itself retries
_MOVES = 3  # times that a branch may move between listing and fetching it
_CHECKED = ".sha256"  # folder in a repository's cache: one note per file whose sha256 was found right
_LONG = 1 << 30  # bytes whose hashing takes so long that people are told
_PIECE = 1 << 24  # bytes hashed at a time

Choose = Callable[[Listing], list[str]]
More = Callable[[Listing, Path], list[str]]


def fetch(reference: Reference, choose: Choose, more: More | None = None) -> tuple[Path, list[str]]:
    """The files that `choose` takes from the repository's list: the folder that holds them in the cache, and their
    names there.

    more: what else to fetch, once these are there to be read: called with the list and that folder.

    Only what is not in the cache yet is transferred, and resumed where the connection drops. Where the Hub cannot be
    reached, or HF_HUB_OFFLINE is set, the cache serves. Raises UserError when that is not enough, and for a file whose
    sha256 differs from the Hub's, which is removed.
    """
    prepare()
    with hub_errors(str(reference)):
        for _ in range(_MOVES):
            try:
                listing = list_files(reference)
            except _UNREACHABLE as error:
                return _fetch_cached(reference, choose, more, _why_unreachable(error))
            names = choose(listing)
            # The first one by the branch's name, for the cache to learn which commit that is now.
            folder = _download(reference.repo, names[0], reference.revision)
            if folder.name == listing.commit:
                _fetch_listed(listing, folder, names)
                others = more(listing, folder) if more else []
                _fetch_listed(listing, folder, others)
                return folder, names + others
    raise UserError(f"`{reference}`: changes while it is fetched", f"name a commit: hf://{reference.repo}@COMMIT")


def _fetch_listed(listing: Listing, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        _download(listing.reference.repo, name, listing.commit)
        _check_sha256(folder, name, listing.files[name].sha256)


def list_files(reference: Reference) -> Listing:
    """What the repository holds, asked from the Hub. Raises huggingface_hub's errors."""
    with understood(reference.repo):
        info = HfApi().model_info(
            reference.repo, revision=reference.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        files = {
            s.rfilename: RemoteFile(s.size or 0, (s.lfs.sha256 if s.lfs else "") or "") for s in info.siblings or ()
        }
        listing = Listing(reference, info.sha or "", files, (info.gguf or {}).get("architecture", ""))
        _check_listing(listing)
    return listing


def _check_listing(listing: Listing) -> None:
    """Raise ValueError for what no Hub says: values of other types, and names that lead out of the repository's
    folder.
    """
    texts = [listing.commit, listing.architecture, *(file.sha256 for file in listing.files.values())]
    if not all(isinstance(text, str) for text in texts) or not re.fullmatch(r"[0-9a-f]*", listing.commit):
        raise ValueError("a commit, an architecture or a sha256 that is none")
    for name, file in listing.files.items():
        parts = re.split(r"[/\\]", name)
        if not name.isprintable() or name.startswith("/") or {"", ".", ".."} & set(parts):
            raise ValueError(f"a file called {name!r}")
        if type(file.size) is not int or file.size < 0:
            raise ValueError(f"a size of {file.size!r}")


@contextmanager
def understood(repo: str) -> Iterator[None]:
    """Raise UserError where huggingface_hub, or we, cannot make sense of what a server answered; its own errors
    pass.
    """
    try:
        yield
    except (OSError, RuntimeError, UserError, errors.HFValidationError, *_UNREACHABLE):
        raise
    except Exception as error:  # whatever reading it raises
        raise UserError(
            f"`{repo}`: the Hub's answer cannot be understood ({type(error).__name__}: {error})",
            "try again later; if HF_ENDPOINT is set, see whether a Hub is there",
        ) from None


def _why_unreachable(error: Exception) -> str:
    """What keeps us from asking the Hub; an answer of it that is final is raised again."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if not isinstance(error, errors.HfHubHTTPError):
        return "the Hub cannot be reached"
    if error.response.status_code < 500:
        raise error
    return f"the Hub answered {error.response.status_code}"


def prepare() -> None:
    """Before anything is transferred: progress bars are for people, where stderr is a terminal.

    Raises UserError where huggingface_hub has no home folder to keep files in: it would make one called `~`.
    """
    if constants.HF_HOME.startswith("~") or constants.HF_HUB_CACHE.startswith("~"):
        raise UserError("no home folder for files of the Hub", "set HF_HOME to a folder that can be written")
    if not sys.stderr.isatty():
        disable_progress_bars()


def _download(repo: str, name: str, revision: str | None, waits: Sequence[int] = _WAITS) -> Path:
    """Fetch one file, unless the cache has it; the cached folder of its commit."""
    # One after the other and not by snapshot_download, whose threads an interrupt waits for.
    try:
        with understood(repo):
            path = Path(hf_hub_download(repo, name, revision=revision))
            return path.parents[name.count("/")]
    except errors.HfHubHTTPError:
        raise
    except _TRANSPORT:
        if not waits:
            raise
    time.sleep(waits[0])
    return _download(repo, name, revision, waits[1:])


def _fetch_cached(reference: Reference, choose: Choose, more: More | None, why: str) -> tuple[Path, list[str]]:
    folder = _snapshot(reference)
    if folder is None:
        raise UserError(
            f"`{reference}`: no such file or folder here, nothing of it in the cache, and {why}",
            "check the network and HF_HUB_OFFLINE, or give a path",
        )
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: RemoteFile((folder / name).stat().st_size) for name in names}
    listing = Listing(reference, folder.name, files, cached=why)
    chosen = choose(listing)
    chosen += more(listing, folder) if more else []
    if not constants.HF_HUB_OFFLINE:
        print(f"note: {why}: using the copy of `{reference}` in the cache", file=sys.stderr)
    for name in chosen:
        _check_sha256(folder, name, "")
    return folder, chosen


def _snapshot(reference: Reference) -> Path | None:
    """The cached folder of the revision, as it was when last fetched."""
    try:
        return Path(snapshot_download(reference.repo, revision=reference.revision, local_files_only=True))
    except errors.LocalEntryNotFoundError as error:
        # Newer versions say so where files of the repository are missing. Those that are wanted may be there.
        folder = getattr(error, "snapshot_path", None)
        return Path(folder) if folder else None


def _check_sha256(folder: Path, name: str, expected: str) -> None:
    """Hash a file of a cached snapshot, unless that was done since it was fetched; a wrong one is removed.

    expected: "" where the Hub did not say; then it is the name that the cache gave to the file's content, if that is a
    sha256.
    The note that a file was checked lies in the repository's own cache folder and goes away with it.
    """
    content = (folder / name).resolve()
    expected = expected or (content.name if re.fullmatch(r"[0-9a-f]{64}", content.name) else "")
    note, state = folder.parents[1] / _CHECKED / expected, content.stat()
    seen = f"{state.st_size} {state.st_mtime_ns}"
    if not expected or (note.is_file() and note.read_text() == seen):
        return
    found = sha256_of(content)
    if found != expected:
        (folder / name).unlink()
        content.unlink(missing_ok=True)
        raise UserError(
            f"`{name}`: its sha256 is {found}, expected {expected} as the Hub says; it was removed from the cache",
            "fetch it again; if that does not help, the file was damaged on its way to the Hub",
        )
    with suppress(OSError):  # a cache that is not ours to write to: the file is checked again next time
        note.parent.mkdir(exist_ok=True)
        note.write_text(seen)


def sha256_of(path: Path) -> str:
    """The file's sha256, as hexadecimal digits."""
    if sys.stderr.isatty() and path.stat().st_size > _LONG:
        print("checking what was fetched", file=sys.stderr)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn huggingface_hub's errors about `repo` into a UserError of one line."""
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"`{repo}`: access to it must be granted first",
            f"ask for it on {constants.ENDPOINT}/{repo}, then `hf auth login` or set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"`{repo}`: no such branch, tag or commit", f"see {constants.ENDPOINT}/{repo}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"`{repo}`: no such file or folder here, and no such repository on the Hub (or a private one)",
            "check the spelling; for a private one, `hf auth login` or set HF_TOKEN first",
        ) from None
    except errors.HfHubHTTPError as error:
        raise _refused(repo, error.response.status_code, error.server_message) from None
    except errors.HFValidationError as error:
        raise UserError(f"`{repo}`: no possible name of a repository ({error})", "expected user/repo") from None
    except _UNREACHABLE as error:
        raise UserError(f"`{repo}`: the Hub cannot be reached ({error})", "check the network, then try again") from None
    except RuntimeError as error:  # of hf_xet, which moves large files
        raise UserError(
            f"`{repo}`: the transfer failed ({error})", "try again; HF_HUB_DISABLE_XET=1 uses plain HTTP"
        ) from None


def _refused(repo: str, status: int, message: str | None) -> UserError:
    said = f"{status}, {message}" if message else str(status)
    hints = {401: "`hf auth login` or set HF_TOKEN first", 403: "this token has no right to that: see `hf auth whoami`"}
    return UserError(f"`{repo}`: the Hub answered {said}", hints.get(status, "try again later"))
