"""Layers of a fit that are done, kept in a folder until the whole is written: a run after one that was stopped, was
killed or had no room goes on from there.

Each file begins with the digest of what follows; one that does not agree with it, or was made by another fit, is not
used, nor is any other then. Knows nothing of how a layer is fitted.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from predictors.matrices import Floats
from runtime.base.workspace import naming

REVISION = 3  # of what a fit computes: another one uses no layers of this one
_HIDDEN = "hidden"
_PIECE = 1 << 24
_DIGEST = hashlib.sha256().digest_size


@dataclass
class KeptLayers:
    """What is kept in `folder`, which needs not exist yet. note: why layers that were there were not used, or ""."""

    folder: Path
    note: str = ""
    _key: bytes = field(default=b"", repr=False)

    def load(self, model: Path, options: Mapping[str, Any]) -> tuple[list[Any], int, Floats | None]:
        """The layers that a fit of `model` with the same options has kept, the number of the block to go on with, and
        the hidden states before it; no layers, 0 and None where there are none.

        options: all that decides what a layer becomes, as plain values.
        """
        self._key = _key(model, options)
        if not (self.folder / _HIDDEN).exists():
            return [], 0, None
        try:
            state, end = self._read(_HIDDEN)
            layers = [self._read(f"layer-{i}")[0] for i in state["layers"]]
            hidden = np.frombuffer(end, np.float32).reshape(state["shape"]).copy()
        except (OSError, ValueError, KeyError) as error:
            self.note = f"layers that an earlier run had finished were not used: {error}"
            self.forget()
            return [], 0, None
        return layers, state["next"], hidden

    def keep(self, i: int, done: list[int], layer: Any, hidden: Floats) -> None:
        """Keep block `i`, and the hidden states after it, float32. done: all blocks that are kept, `i` among them."""
        self.folder.mkdir(exist_ok=True)
        try:
            with naming(self.folder):
                self._write(f"layer-{i}", layer)
                self._write(
                    _HIDDEN,
                    {"layers": done, "next": i + 1, "shape": hidden.shape},
                    np.ascontiguousarray(hidden).reshape(-1).view(np.uint8).data,
                )
        except BaseException:  # a full disk, an interrupt
            self._forget_halves()
            raise

    def _forget_halves(self) -> None:
        """Remove what is of no use to another run: files that are not whole, and layers without hidden states."""
        if not (self.folder / _HIDDEN).exists():
            self.forget()
        for path in self.folder.glob("*.new"):
            path.unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, name: str, value: Any, end: Any = b"") -> None:
        new = self.folder / f"{name}.new"
        head = pickle.dumps(value)
        parts = (self._key, len(head).to_bytes(8, "little"), head, end)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        with new.open("wb") as file:
            file.write(digest.digest())
            for part in parts:
                file.write(part)
        new.replace(self.folder / name)

    def _read(self, name: str) -> tuple[Any, memoryview]:
        """A value, and what follows it. Raises ValueError for a file that is damaged or of another fit."""
        stored = memoryview((self.folder / name).read_bytes())
        digest, rest = stored[:_DIGEST], stored[_DIGEST:]
        if hashlib.sha256(rest).digest() != digest:
            raise ValueError(f"`{name}` is damaged")
        if rest[: len(self._key)] != self._key:
            raise ValueError("they are of another model, text, or other options")
        at = len(self._key) + 8
        end = at + int.from_bytes(rest[at - 8 : at], "little")
        return pickle.loads(rest[at:end]), rest[end:]  # our own bytes: the digest says so, and the folder is the user's


def count_kept(folder: Path) -> int:
    """How many layers are kept in a folder."""
    return len(list(folder.glob("layer-*"))) if (folder / _HIDDEN).exists() else 0


def _key(model: Path, options: Mapping[str, Any]) -> bytes:
    """Digest of the model's file and of the options."""
    digest = hashlib.sha256(json.dumps([REVISION, options], sort_keys=True).encode())
    with model.open("rb") as file, naming(model):
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.digest()
