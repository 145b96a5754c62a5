"""How fast files are read in pieces, as a budget of main memory lets them be: measured once for each file system by the
reader that reads rows, past the system's cache, and remembered.

The file is $LAZYNEURON_CACHE/disks.json (default ~/.cache/lazyneuron).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime.bindings.pager import PAGE, Pager
from runtime.errors import UserError
from runtime.hybrid.remembered import remembered

DEPTHS = (1, 2, 4, 8, 16, 32)  # reads at the same time
USUAL = 16  # reads at the same time while a model runs
BUNDLE = 8192  # bytes of a read at random: the rows of a neuron of some 4,096 columns in four bits
_PIECE = 1 << 22  # bytes of a read in sequence, which the reader divides
_MOST = 1 << 25  # bytes read at one depth in one pass
_SECONDS = 0.06  # of reading at one depth in one pass
_PASSES = 3  # of which the best counts
_ENOUGH = 1 << 28  # bytes: what a smaller file gives is not remembered, since devices have caches of their own
Numbers = npt.NDArray[np.int64]

_measuring = threading.Lock()  # two threads that measure at once would measure each other


@dataclass(frozen=True)
class DiskSpeed:
    """sequential: bytes/s in order. reads: of BUNDLE bytes at random, each second, by how many at the same time: one
    for each of DEPTHS.
    """

    sequential: float
    reads: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.reads) != len(DEPTHS) or min(self.sequential, *self.reads) <= 0:
            raise ValueError(f"a disk's speed is positive, with one figure for each of {DEPTHS}")

    @classmethod
    def described(cls, sequential: float, reads: float) -> DiskSpeed:
        """A disk of which little is known. reads: at random each second, USUAL at the same time."""
        return cls(sequential, tuple(reads * min(1.0, depth / USUAL) for depth in DEPTHS))

    def seconds(self, n_bytes: float, reads: float) -> float:
        """The least time that so many reads of so many bytes take, USUAL at the same time."""
        return max(n_bytes / self.sequential, reads / self.reads[DEPTHS.index(USUAL)])


def disk_speed(paths: Sequence[Path], anew: bool = False) -> DiskSpeed:
    """The speed of the file system that a model's files are on, measured with the largest of them. Measures where
    nothing is remembered, or `anew` (some two seconds).

    Raises UserError where a file cannot be read so.
    """
    path = max(paths, key=lambda each: each.stat().st_size)
    with _measuring:
        if path.stat().st_size < _ENOUGH:
            return _speed(measure(path))
        key = f"{file_system(path)}, {BUNDLE} bytes at {', '.join(map(str, DEPTHS))}"
        return _speed(remembered("disks.json", key, 1 + len(DEPTHS), lambda: measure(path), anew))


def _speed(figures: Sequence[float]) -> DiskSpeed:
    return DiskSpeed(figures[0], tuple(figures[1:]))


def file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Type, source and mount point of the file system that a file is on; of another system than Linux its number."""
    found = path.resolve()
    if not mounts.exists():
        return f"device {found.stat().st_dev}"
    lines = [line.split(" - ") for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines()]
    # A later one hides those before it. Blanks in names are written as octal numbers.
    points = {mount.split()[4].replace("\\040", " "): kind.split()[:2] for mount, kind in lines}
    point = max((p for p in points if found.is_relative_to(p)), key=len, default="/")
    return " ".join([*points.get(point, ["unknown"]), point])


def measure(path: Path) -> list[float]:
    """Bytes/s in sequence, then reads of BUNDLE bytes each second at each depth. Raises UserError for an empty file,
    and where reading fails.
    """
    pages = path.stat().st_size // PAGE
    if not pages:
        raise UserError(f"`{path}`: too short to measure a disk with")
    rng = np.random.default_rng()
    ordered, anywhere = (np.arange(max(1, pages * PAGE // size)) for size in (_PIECE, BUNDLE))

    def in_order() -> float:
        return _rate(path, np.roll(ordered, -int(rng.integers(len(ordered)))), _PIECE, USUAL, 1) * _PIECE

    def at_random(depth: int) -> float:
        return _rate(path, rng.choice(anywhere, min(len(anywhere), _MOST // BUNDLE), False), BUNDLE, depth, 16 * depth)

    passes = [[in_order(), *map(at_random, DEPTHS)] for _ in range(_PASSES)]
    return [max(found) for found in zip(*passes, strict=True)]


def _rate(path: Path, numbers: Numbers, size: int, depth: int, at_once: int) -> float:
    """Pieces of `size` bytes each second, `depth` reads at the same time, `at_once` pieces in a call."""
    with Pager([path], depth - 1) as pager:
        start, end = pager.address(0), path.stat().st_size // PAGE * PAGE
        pager.limit(end + PAGE)
        n, seconds = 0, 0.0
        for at in range(0, len(numbers), at_once):
            ranges = [(start + k * size, min(size, end - k * size)) for k in numbers[at : at + at_once].tolist()]
            began = time.perf_counter()
            pager.load(ranges)
            seconds += time.perf_counter() - began
            pager.check()
            n += sum(length for _, length in ranges)
            if seconds >= _SECONDS or n >= _MOST:
                break
        return n / size / seconds
