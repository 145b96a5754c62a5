"""What goes from one stage to the next: small values that can be sent to another machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.base_engine import Counted
from runtime.compute.batch import Batch
from runtime.compute.kv_cache import CellTable
from runtime.compute.recurrent_cells import RecurrentCells
from runtime.model_file.reader import GgufFile
from runtime.options import SettledOptions

Change = tuple[str, tuple[Any, ...]]  # a method of `CellTable`, and what it is called with


@dataclass(frozen=True)
class Work:
    """A piece of a batch, for every stage.

    epoch, number: it is the number-th since the stages were last emptied; each stage does all of them, in order.
    changes: what was done to the table of cells since the work before. mode: FFN mode and predictor bias, where they
    are not the engine's own.
    """

    epoch: int
    number: int
    changes: tuple[Change, ...]
    batch: Batch
    mode: tuple[str, float] | None = None


@dataclass(frozen=True)
class Passed:
    """What a stage has made of a piece. data: hidden states, float32 [n_tokens, n_embd], or logits of the wanted
    tokens. seconds: of computing, by stage. error: message and hint of what went wrong, in the first stage where it
    did; then there are no data.
    """

    data: npt.NDArray[np.float32]
    counted: Counted = field(default_factory=dict)
    seconds: tuple[float, ...] = ()
    error: tuple[str, str] | None = None


@dataclass(frozen=True)
class Identity:
    """What must be the same in all stages, so that they compute one model. header: SHA-256 of all bytes of the files
    before the first tensor; sizes: of the files.
    """

    lazyneuron: str
    llama_cpp_python: str
    header: str
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, file: GgufFile) -> Identity:
        """That of a file here."""
        digest = hashlib.sha256()
        for part in file.parts:
            first = min((info.offset for info in part.tensors.values()), default=part.size)
            with part.path.open("rb") as opened:
                digest.update(opened.read(first))
        sizes = tuple(part.size for part in file.parts)
        return cls(_version("lazyneuron"), _version("llama-cpp-python"), digest.hexdigest(), sizes)

    def difference(self, other: Identity) -> str:
        """The first thing in which another one differs: "" where they are the same."""
        for name, mine in vars(self).items():
            theirs = getattr(other, name)
            if theirs != mine:
                return f"{name.replace('_', '-')} {_short(theirs)}, expected {_short(mine)}"
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from its source
        return "not installed"


def _short(value: object) -> str:
    return str(value) if len(str(value)) <= 40 else f"{str(value)[:12]}..."


class _Written:
    """Writes down what is done to a table of cells. For classes before `CellTable`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.changes: list[Change] = []
        self._inside = False  # one of these methods calls others

    def _do(self, name: str, *args: Any) -> None:
        outermost, self._inside = not self._inside, True
        try:
            getattr(super(), name)(*args)
        finally:
            self._inside = not outermost
        if outermost:
            self.changes.append((name, args))

    def save(self, sequence: int) -> None:
        """See `CellTable.save`."""
        self._do("save", sequence)

    def hold(self, sequence: int) -> None:
        """See `CellTable.hold`."""
        self._do("hold", sequence)

    def let_go(self, sequence: int) -> None:
        """See `CellTable.let_go`."""
        self._do("let_go", sequence)

    def trim(self, sequence: int, length: int = 0) -> None:
        """See `CellTable.trim`."""
        if length < self.length(sequence):  # type: ignore[attr-defined]
            self._do("trim", sequence, length)

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """See `CellTable.copy`."""
        self._do("copy", source, target, length)

    def clear(self) -> None:
        """See `CellTable.clear`."""
        self._do("clear")


class WrittenCells(_Written, CellTable):
    """A table of cells whose changes can be made again elsewhere. changes: since somebody last took them."""


class WrittenRecurrentCells(_Written, RecurrentCells):
    """The same for a model with Mamba blocks; states are not here, so nothing is to be done to them."""

    def take(self, batch: Batch) -> npt.NDArray[np.int64]:
        """See `RecurrentCells.take`."""
        cells = super().take(batch)
        self.moves.clear()
        return cells


def change(table: CellTable, changes: Sequence[Change]) -> None:
    """Make changes again, in a table that was as the other one."""
    for name, args in changes:
        getattr(table, name)(*args)


def mode_of(run: SettledOptions, usual: SettledOptions) -> tuple[str, float] | None:
    """What of a run a stage must be told."""
    return None if run == usual else (run.ffn, run.predictor_bias)
