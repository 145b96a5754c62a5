"""A converted file to the Hugging Face Hub, with its card, in one commit.

Large files go first, one after the other; what the Hub has already is not sent again. huggingface_hub does the sending.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

from convert.publish.card import CARD, CardOptions, examine, make_card
from convert.publish.card_text import MARK, PLOT, FileEntry
from runtime.base.atomic import check_space
from runtime.base.workspace import workspace
from runtime.errors import UserError
from runtime.hub.download import fetch, hub_errors, list_files, prepare, understood
from runtime.hub.names import Listing, Reference, parse
from runtime.model_file import shards
from runtime.model_file.bundle_writer import bundled
from runtime.model_file.reader import GgufFile
from runtime.model_file.shard_writer import shard_size, split_model
from runtime.model_file.writer import copied, copied_keys, write_parts

DEFAULT_SHARD = "45G"  # the Hub takes files up to 50 GB


@dataclass(frozen=True)
class Commit:
    """A commit on the Hub."""

    oid: str
    url: str


@dataclass(frozen=True)
class Pushed:
    """What is on the Hub now. name: how to call the model."""

    name: str
    commit: Commit
    files: Sequence[FileEntry]


def push_model(
    file: Path,
    repo: str,
    options: CardOptions,
    private: bool = False,
    revision: str | None = None,
    split_max_size: str = DEFAULT_SHARD,
    replace_card: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Pushed:
    """Send a converted file to the Hub, with a model card; what is there already is not sent again.

    options: of the card. private: make the repository so; revision: a branch. split_max_size: send larger files as
    shards.
    replace_card: even one that was changed by hand. tell: called with lines on what is done.
    Raises UserError for what the Hub refuses, and for wrong options.
    """
    if parse(repo) != Reference(repo):
        raise UserError(f"`{repo}`: expected a name on the Hub such as user/repo", "--revision names a branch")
    max_bytes = shard_size(split_max_size)
    prepare()
    with GgufFile(file) as opened, _fitting(opened, max_bytes, tell) as paths:
        found = examine(opened, options)  # before anything is made on the Hub
        sent = [CommitOperationAdd(path.name, path) for path in paths]
        target = Target(Reference(repo, revision), private)
        with hub_errors(repo), understood(repo):
            listing = target.open()
        old, others = _other_models(listing, sent)
        name = f"{target.reference}:{sent[0].path_in_repo}" if others else str(target.reference)
        card = make_card(opened, name, [*map(_entry, sent), *others], found)
        with hub_errors(repo), understood(repo):
            small = _card_files(card, found.plot, listing, replace_card, tell)
            commit = target.commit(sent, small, old)
    return Pushed(name, commit, [_entry(addition) for addition in sent])


@dataclass(frozen=True)
class Target:
    """The branch that is pushed to. Methods raise huggingface_hub's errors."""

    reference: Reference
    private: bool

    def open(self) -> Listing:
        """Make the repository and the branch where there are none; what they hold.

        Raises UserError for a public one that is to be private.
        """
        api, repo = HfApi(), self.reference.repo
        api.create_repo(repo, private=self.private or None, exist_ok=True)
        if self.private and not api.model_info(repo).private:
            raise UserError(
                f"`{repo}`: exists and is public, expected a private one", "change it in its settings first"
            )
        if self.reference.revision:
            api.create_branch(repo, branch=self.reference.revision, exist_ok=True)
        return list_files(self.reference)

    def commit(
        self, large: Sequence[CommitOperationAdd], small: Sequence[CommitOperationAdd], old: Sequence[str]
    ) -> Commit:
        """Upload files, then put them into the repository at once, and those called `old` out of it."""
        api, repo, branch = HfApi(), self.reference.repo, self.reference.revision
        for addition in small:
            if addition.path_in_repo == CARD:
                _validate(repo, addition)
        for addition in large:
            _upload(api, repo, addition, branch)
        gone = [CommitOperationDelete(name) for name in old]
        message = f"Upload {large[0].path_in_repo}"
        done = api.create_commit(repo, [*large, *small, *gone], commit_message=message, revision=branch)
        return Commit(done.oid, done.commit_url)


def _upload(api: HfApi, repo: str, addition: CommitOperationAdd, branch: str | None) -> None:
    try:
        api.preupload_lfs_files(repo, [addition], revision=branch)
    except RuntimeError as error:  # huggingface_hub says with it which file it was
        raise error.__cause__ or error from None


def _validate(repo: str, card: CommitOperationAdd) -> None:
    """Ask the Hub whether it takes the card, before anything large is sent."""
    assert isinstance(card.path_or_fileobj, bytes)
    try:
        ModelCard(card.path_or_fileobj.decode()).validate()
    except ValueError as error:
        raise UserError(
            f"`{repo}`: the Hub refuses the card's metadata: {error}", "the checkpoint's card may be at fault"
        ) from None


@contextmanager
def _fitting(file: GgufFile, max_bytes: int, tell: Callable[[str], None]) -> Iterator[list[Path]]:
    """The model's files, split anew into a temporary folder beside it where one is too large."""
    if all(part.stored_bytes <= max_bytes for part in file.parts):
        yield [part.path for part in file.parts]
        return
    stem = _stem(file.path.name)
    check_space(file.path.parent, file.size)
    out = file.path.with_name(f"{stem}.gguf")
    tensors = [copied(file, name) for name in file.tensors]
    files = split_model(out, *bundled(file.structure, copied_keys(file.path), tensors), max_bytes)
    with workspace(files[0].path, file.path) as work:
        made = [replace(new, path=work.folder / new.path.name) for new in files]
        tell(f"splitting into {len(files)} shards")
        write_parts(made)
        yield [new.path for new in made]


def _other_models(listing: Listing, sent: Sequence[CommitOperationAdd]) -> tuple[list[str], list[FileEntry]]:
    """GGUF files in the repository besides the pushed ones: those of the same model as it was split before, and those
    of others.

    The former have to go, or they would be a second model of the same name.
    """
    names, stem = {addition.path_in_repo for addition in sent}, _stem(sent[0].path_in_repo)
    rest = {name: file for name, file in listing.files.items() if name.endswith(".gguf") and name not in names}
    others = [FileEntry(name, file.size, file.sha256) for name, file in rest.items() if _stem(name) != stem]
    return [name for name in rest if _stem(name) == stem], others


def _stem(name: str) -> str:
    found = shards.parse_name(name)
    return found[0] if found else name.removesuffix(".gguf")


def _entry(addition: CommitOperationAdd) -> FileEntry:
    return FileEntry(addition.path_in_repo, addition.upload_info.size, addition.upload_info.sha256.hex())


def _card_files(
    card: str, plot: bytes | None, listing: Listing, replace: bool, tell: Callable[[str], None]
) -> list[CommitOperationAdd]:
    """Card and plot, unless the repository has a card that somebody changed by hand."""
    if CARD in listing.files and not replace and MARK not in _remote_card(listing):
        tell(f"`{listing.reference}`: has a card of its own, which is kept: --replace-card replaces it")
        return []
    return [CommitOperationAdd(CARD, card.encode()), *([CommitOperationAdd(PLOT, plot)] if plot else [])]


def _remote_card(listing: Listing) -> str:
    folder, _ = fetch(listing.reference, lambda _: [CARD])
    return (folder / CARD).read_text(encoding="utf-8", errors="replace")
