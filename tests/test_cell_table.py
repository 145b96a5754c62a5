"""The table of cells against a slow model of it: which cells are given, what is seen, what is left after an error."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from runtime.compute.batch import Batch
from runtime.compute.kv_cache import CELL_STEP, MAX_SEQUENCES, CellTable
from runtime.errors import UserError

WINDOWS = (0, 1, 5)


@dataclass
class SlowTable:
    """By cell, its position and the sequences that hold it."""

    n_cells: int
    cells: dict[int, tuple[int, set[int]]] = field(default_factory=dict)

    def length(self, sequence: int) -> int:
        return sum(sequence in holders for _, holders in self.cells.values())

    def take(self, batch: Batch) -> list[int]:
        taken, end = {}, max(self.cells, default=-1) + 1
        if len(self.cells) == end:  # no holes
            taken = {k: end + k for k in range(len(batch))}
            for k, cell in taken.items():
                self.cells[cell] = int(batch.positions[k]), {int(batch.sequences[k])}
            return list(taken.values())
        by_sequence = sorted(range(len(batch)), key=lambda k: batch.sequences.tolist().index(batch.sequences[k]))
        for k in by_sequence:
            sequence = int(batch.sequences[k])
            last = max((c for c, (_, holders) in self.cells.items() if sequence in holders), default=-1)
            free = [c for c in range(self.n_cells) if c not in self.cells]
            taken[k] = next((c for c in free if c > last), free[0])
            self.cells[taken[k]] = int(batch.positions[k]), {sequence}
        return [taken[k] for k in range(len(batch))]

    def trim(self, sequence: int, length: int) -> None:
        for cell, (position, holders) in list(self.cells.items()):
            if position >= length:
                holders.discard(sequence)
            if not holders:
                del self.cells[cell]

    def copy(self, source: int, target: int, length: int) -> None:
        self.trim(target, 0)
        for position, holders in self.cells.values():
            if source in holders and position < length:
                holders.add(target)

    def sees(self, sequence: int, position: int, cell: int, window: int) -> bool:
        at, holders = self.cells.get(cell, (0, set()))
        return sequence in holders and at <= position and (not window or position - at < window)

    def n_kv(self) -> int:
        n = CELL_STEP
        while n <= max(self.cells, default=-1):
            n += CELL_STEP
        return n if self.cells else 0


def following(table: SlowTable, sequences: list[int]) -> Batch:
    """A token of each sequence named, at its next position."""
    lengths = {s: table.length(s) for s in sequences}
    positions = []
    for s in sequences:
        positions.append(lengths[s])
        lengths[s] += 1
    n = len(sequences)
    return Batch(*(np.array(values, np.int32) for values in ([5] * n, positions, sequences, [])))


def check(table: CellTable, slow: SlowTable) -> None:
    assert [table.length(s) for s in range(MAX_SEQUENCES)] == [slow.length(s) for s in range(MAX_SEQUENCES)]
    assert table.n_kv == slow.n_kv()
    for cell, member in enumerate(table.members.tolist()):
        position, holders = slow.cells.get(cell, (None, set()))
        assert member == sum(1 << s for s in holders)
        if holders:
            assert table.positions[cell] == position


@pytest.mark.parametrize("seed", range(8))
def test_any_operations_give_what_the_slow_table_gives(seed: int) -> None:
    random = np.random.default_rng(seed)
    table, slow = CellTable(300), SlowTable(300)
    known = [0, 1, 2, 31, 32, 62, 63]

    def any_of(values: list[int]) -> int:
        return int(random.choice(values))

    for _ in range(120):
        a, b = any_of(known), any_of(known)
        match any_of([0, 0, 0, 0, 1, 2, 3]):
            case 0:
                batch = following(slow, random.choice(known[: any_of([1, 3, 7])], any_of([1, 1, 7, 60])).tolist())
                if len(batch) > 300 - len(slow.cells):
                    with pytest.raises(UserError, match=f"{len(batch)} tokens more, expected at most"):
                        table.take(batch)
                    continue
                assert table.take(batch).tolist() == slow.take(batch)
                for window, mask in zip(WINDOWS, table.masks(batch, WINDOWS), strict=True):
                    tokens = zip(batch.sequences.tolist(), batch.positions.tolist(), strict=True)
                    wanted = [[slow.sees(s, p, c, window) for c in range(slow.n_kv())] for s, p in tokens]
                    assert np.array_equal(mask == 0, wanted)
                    assert np.isneginf(mask[~np.array(wanted)]).all()
            case 1:
                length = any_of(list(range(slow.length(a) + 2)))
                table.trim(a, length)
                slow.trim(a, length)
            case 2 if a != b:
                length = any_of(list(range(slow.length(a) + 1)))
                table.copy(a, b, length)
                slow.copy(a, b, length)
            case 3 if len(slow.cells) > 250:
                table.clear()
                slow.cells.clear()
        check(table, slow)


def test_a_batch_is_taken_back() -> None:
    table, slow = CellTable(100), SlowTable(100)
    for batch in (following(slow, [0] * 20), following(slow, [1] * 10)):
        table.take(batch)
        slow.take(batch)
    table.copy(0, 2, 8)
    slow.copy(0, 2, 8)
    before = table.lengths
    table.take(following(slow, [1, 2, 5, 2, 5]))
    assert table.length(5) == 2
    table.trim_to(before)
    check(table, slow)


@pytest.mark.parametrize(
    ("sequences", "positions", "message"),
    [
        ([0], [2], "position 2 of sequence 0, expected 3"),
        ([0], [4], "position 4 of sequence 0, expected 3"),
        ([0, 0], [4, 3], "position 4 of sequence 0, expected 3"),
        ([0, 1], [3, 1], "position 1 of sequence 1, expected 0"),
        ([64], [0], "sequence 64, expected 0 to 63"),
        ([-1], [0], "sequence -1, expected 0 to 63"),
        ([], [], "a batch without tokens"),
    ],
)
def test_tokens_that_do_not_continue_their_sequences_are_refused(
    sequences: list[int], positions: list[int], message: str
) -> None:
    table, slow = CellTable(10), SlowTable(10)
    table.take(following(slow, [0] * 3))
    slow.take(following(slow, [0] * 3))
    arrays = ([5] * len(sequences), positions, sequences, [])
    with pytest.raises(ValueError, match=message):
        table.take(Batch(*(np.array(values, np.int32) for values in arrays)))
    check(table, slow)


def test_a_full_table_says_how_full_it_is() -> None:
    table = CellTable(300)
    table.take(Batch.of([5] * 299))
    with pytest.raises(UserError, match="2 tokens more, expected at most 1: the context has 300 cells, of which 299"):
        table.take(Batch.of([5, 6], 299))
    table.take(Batch.of([5], 299))
    table.trim(0, 290)
    assert table.take(Batch.of([5] * 10, 0, 1)).tolist() == list(range(290, 300))


@pytest.mark.parametrize("seed", range(20))
def test_what_fits_is_given_in_rising_cells_in_whatever_turns(seed: int) -> None:
    """Sequences that began, ended and share a beginning, then some that go on as far as `fits` allows."""
    random = np.random.default_rng(seed)
    table = CellTable(64)
    for sequence in range(6):
        table.take(following_of(table, [sequence] * int(random.integers(1, 9))))
    for sequence in random.choice(6, 3, replace=False).tolist():
        table.trim(sequence, int(random.integers(0, table.length(sequence))))
    table.copy(5, 6, int(random.integers(0, table.length(5) + 1)))
    left = dict.fromkeys(range(7), 0)
    for _ in range(200):
        s = int(random.integers(7))
        left[s] += 1
        if not table.fits(list(left.items())):
            left[s] -= 1
    assert sum(left.values()) > 10 and table.fits(list(left.items()))
    while any(left.values()):
        s = int(random.choice([s for s, n in left.items() if n]))
        n = int(random.integers(1, left[s] + 1))
        before = np.flatnonzero(table.members & np.uint64(1 << s)).max(initial=-1)
        cells = table.take(following_of(table, [s] * n))
        assert (np.diff(np.append(before, cells)) > 0).all()
        left[s] -= n


def test_what_is_forgotten_makes_room() -> None:
    table = CellTable(10)
    table.take(following_of(table, [0] * 6))
    table.copy(0, 1, 4)
    assert table.fits([(2, 4)]) and not table.fits([(2, 5)])
    assert table.fits([(2, 6)], forgotten=[0])  # four are the other's, too
    assert table.fits([(2, 10)], forgotten=[0, 1])
    assert not table.fits([(2, 4), (0, 1)])


def following_of(table: CellTable, sequences: list[int]) -> Batch:
    lengths = dict.fromkeys(sequences, 0)
    positions = []
    for s in sequences:
        positions.append(table.length(s) + lengths[s])
        lengths[s] += 1
    return Batch(*(np.array(values, np.int32) for values in ([5] * len(sequences), positions, sequences, [])))
