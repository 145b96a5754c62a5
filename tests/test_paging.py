"""Models in less memory than they need: the same bits as without a budget, no more memory than was allowed, and no number
of rows that could not be read.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from in_process import command
from oracle import Logits, random_ids
from test_shards import split

import runtime
from bench.make_model import Recipe, write_model
from convert import convert
from runtime.bindings.pager import PAGE, Pager
from runtime.compute.batch import Batch
from runtime.errors import UserError
from runtime.model import Model

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere weights stay in the mapped file"),
]

MB = 1 << 20
PROMPT, STEPS, SEQUENCES = 40, 12, 8
HUGE = 1 << 40  # bytes


def load(path: Path, budget: int | None = None, **options: Any) -> Model:
    size = None if budget is None else f"{budget}B"
    return runtime.load(
        path, ram_budget=size, **{"threads": 2, "n_ctx": 256, "n_batch": 64, "device": "none"} | options
    )


def least(path: Path, work: Callable[[Model], object] | None = None, **options: Any) -> int:
    """The smallest budget for some work, with room for a few pages besides."""
    with load(path, HUGE, **options) as model:
        paging = model.engine._paging
        assert paging
        left = [paging.limit]
        with mock.patch.object(paging, "allow", wraps=paging.allow) as allowed:
            (work or compute)(model)
        left += [call.args[0] for call in allowed.call_args_list]
        return paging.least + HUGE - min(left) + 16 * PAGE


def compute(model: Model) -> Logits:
    """Logits of a prompt, of tokens one by one, and of eight sequences at once."""
    engine, n_vocab = model.engine, model.structure.vocab_size
    engine.cells.clear()
    ids = random_ids(PROMPT + STEPS, n_vocab)
    rows = [engine.compute(Batch.of(ids[:PROMPT], 0, 0, range(PROMPT)))]
    rows += [engine.compute(Batch.of([ids[k]], k, 0)) for k in range(PROMPT, PROMPT + STEPS)]
    engine.cells.clear()
    texts = [random_ids(3, n_vocab, seed=s) for s in range(SEQUENCES)]
    rows += [
        engine.compute(Batch.together([Batch.of([text[k]], k, s) for s, text in enumerate(texts)])) for k in range(3)
    ]
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def made(fitted_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundled model, the same in shards, and a mixture of experts; and each with its neurons' rows side by side."""
    folder = tmp_path_factory.mktemp("paged")

    def get(name: str) -> Path:
        if name == "bundled":
            return fitted_gguf
        path = folder / f"{name}.gguf"
        if name.startswith("paged"):
            source = get("experts") if name == "paged experts" else fitted_gguf
            size = "3M" if name == "paged shards" else None
            files = convert(source, path, layout="paged", force=True, split_max_size=size).files
            assert (len(files) > 1) == (name == "paged shards")
            return Path(files[0])
        if name == "shards":
            return split(fitted_gguf, path, 5)[0]
        write_model(Recipe("tiny-mixtral" if name == "experts" else name, 0.2, "q4_0"), path)
        return path

    return get


@pytest.mark.numeric
@pytest.mark.parametrize("ffn", ["predicted", "exact", "verified"])
@pytest.mark.parametrize("name", ["bundled", "shards", "experts", "paged", "paged shards", "paged experts"])
def test_a_budget_changes_no_bit(made: Callable[[str], Path], name: str, ffn: str) -> None:
    path = made(name)
    # The same rows lie elsewhere in the file: what is computed of them is that of the file that they are from.
    with load(made(name.removeprefix("paged").strip() or "bundled"), ffn=ffn) as model:
        wanted = compute(model)
    if name.startswith("paged"):
        with load(path, ffn=ffn) as model:
            assert np.array_equal(compute(model), wanted)
    with load(path, least(path, ffn=ffn), ffn=ffn) as model:
        assert np.array_equal(compute(model), wanted)
        paged = model.stats().paged
        assert paged and paged.resident <= paged.limit
        assert paged.dropped > 0 and 0 < paged.read < paged.wanted  # it had to choose, and kept some


@pytest.mark.numeric
@pytest.mark.parametrize("ffn", ["predicted", "exact", "verified"])
def test_a_budget_with_mamba_blocks(made: Callable[[str], Path], ffn: str) -> None:
    """Mamba, experts and a shared one: its states count as memory that is taken, and no bit changes."""
    path, ids = made("tiny-nemotron-3"), random_ids(PROMPT, 512)

    def answered(model: Model) -> Logits:
        rows = [model.engine.compute(Batch.of(ids, 0, 0, range(PROMPT)))]
        return np.concatenate([*rows, *(model.engine.compute(Batch.of([k], PROMPT + k)) for k in range(STEPS))])

    with load(path, ffn=ffn) as model:
        wanted = answered(model)
    with load(path, least(path, answered, ffn=ffn), ffn=ffn) as model:
        assert np.array_equal(answered(model), wanted)
        paged = model.stats().paged
        assert paged and paged.resident <= paged.limit
        assert 0 < paged.read < paged.wanted  # read as it was asked for, and kept


def test_all_that_fits_is_read_at_once(fitted_gguf: Path) -> None:
    with load(fitted_gguf, 1 << 30) as model:
        compute(model)
        paged = model.stats().paged
        assert paged and paged.wanted > paged.read == paged.dropped == 0


def test_without_a_budget_nothing_is_paged(fitted_gguf: Path) -> None:
    with load(fitted_gguf) as model:
        assert model.stats().paged is None


# --- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"ffn": "dense"}, "a budget of main memory in `dense` mode"),
        ({"device": "CPU"}, "a budget of main memory with a device"),
        ({"mmap": True}, "a budget of main memory with --mmap"),
        ({"mmap": False}, "a budget of main memory with --no-mmap"),
        ({"ram_budget": "4,4"}, "expected one amount"),
        ({"ram_budget": "lots"}, "memory budget `lots`"),
        ({"ram_budget": "1KiB"}, "of the memory budget are left for neurons, expected at least"),
    ],
)
def test_refused(fitted_gguf: Path, options: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        runtime.load(fitted_gguf, **{"ram_budget": "1"} | options)


def test_a_budget_too_small_is_one_line(fitted_gguf: Path) -> None:
    done = command("runtime", "complete", fitted_gguf, "-p", "x", "-n", "1", "--ram-budget", "1KiB")
    assert done.returncode == 1
    assert "raise --ram-budget" in done.stderr and "Traceback" not in done.stderr


# --- what happens to the file --------------------------------------------------------------------------------------------


@pytest.fixture
def running(fitted_gguf: Path, tmp_path: Path) -> Iterator[tuple[Path, Model]]:
    """A model that has to read rows for each token."""
    path = tmp_path / "m.gguf"
    shutil.copy(fitted_gguf, path)
    with load(path, least(path)) as model:
        compute(model)
        yield path, model


def test_a_file_that_ends_while_it_is_read(running: tuple[Path, Model]) -> None:
    path, model = running
    os.truncate(path, 1 * MB)
    for _ in range(2):
        with pytest.raises(UserError, match=r"m\.gguf`: (became shorter|was changed) while it was read"):
            compute(model)
    assert not any(model.engine.cells.lengths)  # the tokens that were not computed are not in the cache


def test_a_file_that_is_changed_while_it_is_read(running: tuple[Path, Model]) -> None:
    path, model = running
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(UserError, match="was changed while it was read"):
        compute(model)


def test_a_file_that_is_removed_is_still_there(running: tuple[Path, Model]) -> None:
    path, model = running
    wanted = compute(model)
    path.unlink()
    assert np.array_equal(compute(model), wanted)


# --- the pager alone -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["a disk", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Path]]:
    """Two files whose sizes are no multiples of a page; on a file system of memory, too, which cannot read directly."""
    folder = tmp_path if request.param == "a disk" else Path(f"/dev/shm/lazyneuron-{os.getpid()}-{id(tmp_path)}")
    if request.param == "memory" and not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm")
    folder.mkdir(exist_ok=True)
    rng, paths = np.random.default_rng(0), [folder / "a", folder / "b"]
    for path, size in zip(paths, (3 * MB + 123, 24 * MB + 4097), strict=True):
        path.write_bytes(rng.bytes(size))
    yield paths
    if folder != tmp_path:
        shutil.rmtree(folder)


def resident() -> int:
    """Bytes of memory of this process that no file stands for."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])


def test_what_is_read_is_what_the_file_holds(files: list[Path]) -> None:
    contents = [np.fromfile(path, np.uint8) for path in files]
    rng = np.random.default_rng(1)
    with Pager(files, readers=4) as pager:
        pager.limit(2 * MB)
        for _ in range(50):
            ranges = []
            for _ in range(20):
                k = int(rng.integers(2))
                size = int(rng.integers(1, 40_000))
                ranges.append((k, int(rng.integers(len(contents[k]) - size)), size))
            ranges.append((1, len(contents[1]) - 5, 5))  # the file's end
            pager.load([(pager.address(k) + at, size) for k, at, size in ranges])
            pager.check()
            for k, at, size in ranges:
                assert bytes(at_address(pager.address(k) + at, size)) == contents[k][at : at + size].tobytes()


def at_address(address: int, size: int) -> memoryview:
    return memoryview((__import__("ctypes").c_char * size).from_address(address))


def test_no_more_is_resident_than_allowed(files: list[Path]) -> None:
    with Pager(files, readers=4) as pager:
        pager.limit(2 * MB)
        pager.load([(pager.address(1), MB)])
        before, start = resident(), pager.address(1)
        for at in range(0, 24 * MB, MB // 2):
            pager.load([(start + at, MB // 2)])
            pager.check()
            assert pager.stats().resident <= 2 * MB // PAGE
        assert resident() < before + 3 * MB  # of 24 that were read


def test_more_than_may_be_there_is_refused(files: list[Path]) -> None:
    with Pager(files, readers=1) as pager:
        pager.limit(2 * MB)
        pager.load([(pager.address(1), 3 * MB)])
        with pytest.raises(UserError, match="more rows are wanted at once than the memory budget holds"):
            pager.check()
        pager.load([(pager.address(1), MB)])
        pager.check()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        Pager([tmp_path / "none"], readers=1)
