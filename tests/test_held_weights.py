"""Weights that are read into memory when a model is loaded: which they are, that they change no bit, and what happens
where memory or the file is too short.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from in_process import command
from oracle import random_ids

import runtime
from bench.make_model import Recipe, write_model
from runtime.base import worker
from runtime.base.memory_left import memory_left
from runtime.base.own_memory import OwnMemory, Reading
from runtime.compute.weights import Weights
from runtime.errors import UserError
from runtime.hybrid.held_weights import choose_held
from runtime.hybrid.tensor_map import BlockSides, Piece, TensorMap, cpu_alone
from runtime.model_file.reader import GgufFile
from runtime.model_file.structure import Structure
from runtime.options import RunOptions, SettledOptions

MB, GB = 10**6, 10**9
PLENTY = 1000 * GB

linux = pytest.mark.skipif(sys.platform != "linux", reason="weights stay mapped elsewhere")


@pytest.fixture(scope="module")
def file(fitted_gguf: Path) -> GgufFile:
    return GgufFile(fitted_gguf)


def options(file: GgufFile, **given: object) -> SettledOptions:
    return RunOptions(**given).for_file(file)  # type: ignore[arg-type]


def held(file: GgufFile, tensor_map: TensorMap | None = None, left: float = PLENTY, **given: object) -> dict[str, int]:
    """The bytes of each tensor that are held."""
    run = options(file, **given)
    choice = choose_held(file, tensor_map or cpu_alone(file.structure, run.predicts), run, 0, left)
    return {name: part.length for name, part in choice.held.items()}


def stems(names: dict[str, int]) -> set[str]:
    return {re.sub(r"blk\.\d+\.", "", name) for name in names}


ATTENTION = {f"attn_{k}.weight" for k in ("q", "k", "v", "output")}
PREDICTOR = {"predictor_in.weight", "predictor_out.weight"}


@linux
@pytest.mark.parametrize(
    ("ffn", "wanted"),
    [
        ("exact", {"ffn_gate.weight"}),
        ("predicted", PREDICTOR),
        ("verified", PREDICTOR | {"ffn_gate.weight"}),
        ("dense", {"ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"}),
    ],
)
def test_what_every_token_reads_whole(file: GgufFile, ffn: str, wanted: set[str]) -> None:
    found = held(file, ffn=ffn)
    head = "token_embd.weight" if file.structure.tied_output else "output.weight"
    assert stems(found) == ATTENTION | wanted | {head}
    assert all(n == file.tensors[name].nbytes for name, n in found.items())


@linux
def test_blocks_without_a_predictor_read_their_gates(file: GgufFile) -> None:
    s: Structure = replace(file.structure, predictor_rank=(0, *file.structure.predictor_rank[1:]))
    found = held(file, cpu_alone(s, True), ffn="predicted")
    assert {"blk.0.ffn_gate.weight", "blk.1.predictor_in.weight"} <= set(found)
    assert not {"blk.1.ffn_gate.weight", "blk.0.predictor_in.weight"} & set(found)


@linux
@pytest.mark.parametrize(
    ("ffn", "wanted"),
    [
        ("exact", {"ffn_gate_exps.weight"}),
        ("predicted", {"predictor_in.weight", "predictor_out_exps.weight"}),
        ("verified", {"predictor_in.weight", "predictor_out_exps.weight", "ffn_gate_exps.weight"}),
    ],
)
def test_of_experts_what_their_tokens_read_whole(tmp_path: Path, ffn: str, wanted: set[str]) -> None:
    write_model(Recipe("tiny-mixtral", 0.2, "q4_0"), tmp_path / "m.gguf")
    with GgufFile(tmp_path / "m.gguf") as file:
        found = held(file, ffn=ffn)
        assert stems(found) == ATTENTION | wanted | {"ffn_gate_inp.weight", "output.weight"}
        assert all(n == file.tensors[name].nbytes for name, n in found.items())


def test_a_bias_of_infinity_reads_gates(file: GgufFile) -> None:
    assert held(file, ffn="predicted", predictor_bias=float("inf")) == held(file, ffn="exact")


def test_repacked_matrices_are_not_held_as_well(converted: Callable[..., Path]) -> None:
    with GgufFile(converted("bundled", "q4_0")) as file:
        assert not ATTENTION & stems(held(file, ffn="dense"))
        assert not {"blk.0.ffn_up.weight", "blk.0.ffn_down_t.weight"} & set(held(file, ffn="dense", mmap=False))


def test_all_or_nothing(file: GgufFile) -> None:
    assert held(file, ffn="exact", mmap=True) == {}
    found = held(file, ffn="predicted", mmap=False)
    assert {"token_embd.weight", "output_norm.weight", "blk.0.ffn_up.weight", "blk.0.ffn_down_t.weight"} <= set(found)
    assert sum(found.values()) > 0.98 * sum(info.nbytes for info in file.tensors.values())


@linux
def test_beside_a_device_the_cpu_holds_its_own_part(file: GgufFile) -> None:
    """Block 0 at home on the device, with most of its neurons; block 1 at home on the CPU, with none of them."""
    s = file.structure
    n_ff = s.ffns[0].n_ff
    blocks = (
        BlockSides(1, (Piece(1, 0, n_ff - 64), Piece(0, n_ff - 64, n_ff))),
        BlockSides(0, (Piece(1, 0, n_ff),)),
        *cpu_alone(s, False).blocks[2:],
    )
    tensor_map = TensorMap(s, blocks, 1, False)
    found = held(file, tensor_map, ffn="exact")
    row = file.tensors["blk.0.ffn_gate.weight"].nbytes // n_ff
    assert found["blk.0.ffn_gate.weight"] == 64 * row
    assert not {"blk.0.attn_q.weight", "blk.1.ffn_gate.weight", "output.weight"} & set(found)
    assert "blk.1.attn_q.weight" in found
    run = options(file, ffn="exact")
    parts = choose_held(file, tensor_map, run, 0, PLENTY).held
    assert parts["blk.0.ffn_gate.weight"].first == (n_ff - 64) * row
    with Weights(file, ["blk.0.ffn_gate.weight"], parts_of(parts, "blk.0.ffn_gate.weight")) as weights:
        there = np.ctypeslib.as_array(
            (ctypes.c_uint8 * (64 * row)).from_address(weights["blk.0.ffn_gate.weight"].data + (n_ff - 64) * row)
        )
        assert np.array_equal(there, file.read("blk.0.ffn_gate.weight")[-64 * row :])


def parts_of(parts: object, *names: str) -> dict[str, object]:
    return {name: parts[name] for name in names}  # type: ignore[index]


@linux
def test_short_memory_keeps_the_mapping(file: GgufFile) -> None:
    run = options(file, ffn="exact")
    size = sum(info.nbytes for info in file.tensors.values())
    tensor_map = cpu_alone(file.structure, False)
    choice = choose_held(file, tensor_map, run, 0, size)
    assert not choice.held
    assert "left" in choice.note
    assert "mapped" in choice.note
    assert choose_held(file, tensor_map, run, 0, 1.2 * size).held
    assert not choose_held(file, tensor_map, run, size, 1.2 * size).held  # keys and values want room, too
    with pytest.raises(UserError, match=r"needed for the model"):
        choose_held(file, tensor_map, options(file, ffn="exact", mmap=False), 0, size)


@pytest.mark.numeric
@pytest.mark.parametrize("ffn", ["exact", "predicted", "verified", "dense"])
def test_the_same_bits(converted: Callable[..., Path], fitted_gguf: Path, ffn: str) -> None:
    ids = random_ids(40, 4000)
    for path in (fitted_gguf, *([converted("bundled", "q4_0")] if ffn in ("exact", "dense") else [])):
        found = []
        for mmap in (True, None, False):
            with runtime.load(path, ffn=ffn, threads=2, n_ctx=128, mmap=mmap, device="none") as model:
                found.append(model.logits(ids))
                held_bytes = model.stats().memory_bytes
                assert (held_bytes > 0) == (mmap is False or (mmap is None and sys.platform == "linux"))
        assert np.array_equal(found[0], found[1])
        assert np.array_equal(found[0], found[2])


@linux
def test_memory_is_private_and_asks_for_large_pages() -> None:
    with OwnMemory(5 * MB) as memory:
        assert memory.address % (1 << 21) == 0
        fields = area(memory.address)
        assert "p" in fields["perms"]
        if Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
            assert "hg" in fields["VmFlags"].split()


def area(address: int) -> dict[str, str]:
    """What /proc/self/smaps says of the mapping at an address."""
    found: dict[str, str] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line):
            if found:
                return found
            if int(span[1], 16) <= address < int(span[2], 16):
                found = {"perms": span[3]}
        elif found:
            key, _, value = line.partition(":")
            found[key] = value
    return found


def test_the_file_is_read_where_it_belongs(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, 40 * MB, np.uint8)
    path = tmp_path / "data"
    path.write_bytes(data.tobytes())
    with OwnMemory(len(data)) as memory:
        memory.read([Reading(path, 20 * MB, 20 * MB, 0), Reading(path, 1, 19 * MB, 20 * MB + 7)], threads=3)
        view = np.ctypeslib.as_array((ctypes.c_uint8 * len(data)).from_address(memory.address)).copy()
    assert np.array_equal(view[: 20 * MB], data[20 * MB :])
    assert np.array_equal(view[20 * MB + 7 : 39 * MB + 7], data[1 : 19 * MB + 1])


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(1000))
    with OwnMemory(5000) as memory, pytest.raises(UserError, match="ends at byte 1000"):
        memory.read([Reading(path, 0, 5000, 0)], threads=2)


def test_more_than_there_can_be() -> None:
    with pytest.raises(UserError, match="not enough memory for"):
        OwnMemory(1 << 60)


def test_a_load_that_nobody_waits_for_stops(tmp_path: Path) -> None:
    """What would be read after that is not."""
    path = tmp_path / "data"
    path.write_bytes(bytes(5000))
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    own = worker.Worker()

    def load() -> None:
        begun.set()
        go_on.wait()
        try:
            with OwnMemory(5000) as memory:
                memory.read([Reading(path, 0, 5000, 0), Reading(tmp_path / "missing", 0, 1, 0)], threads=2)
        except worker.Stopped:
            ended.set()

    call = worker._Call(load, kept=False)
    own._calls.put(call)
    begun.wait()
    call.give_up()
    before, worker._worker = worker._worker, own
    try:
        go_on.set()
        assert ended.wait(10)
    finally:
        worker._worker = before
        own.end()


V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup rw,nsdelegate"
V1 = "32 31 0:29 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"


def machine(folder: Path, groups: str, mounts: str, files: dict[str, str]) -> float:
    proc = folder / "proc/self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(groups)
    (proc / "mountinfo").write_text(mounts)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return memory_left(proc, folder)


def test_memory_left_without_limits(tmp_path: Path) -> None:
    meminfo = "MemTotal: 100 kB\nMemAvailable:     70 kB\n"
    assert machine(tmp_path / "a", "", "", {"proc/meminfo": meminfo}) == 70 * 1024
    assert machine(tmp_path / "b", "", "", {}) == float("inf")
    unlimited = {
        "proc/meminfo": meminfo,
        "sys/fs/cgroup/a/memory.max": "max\n",
        "sys/fs/cgroup/a/memory.current": "9\n",
    }
    assert machine(tmp_path / "c", "0::/a\n", V2, unlimited) == 70 * 1024


def test_memory_left_in_groups(tmp_path: Path) -> None:
    """Files' pages in a group can be dropped; the tightest of the groups counts."""
    files = {
        "proc/meminfo": "MemAvailable: 70000 kB\n",
        "sys/fs/cgroup/a/b/memory.max": "5000\n",
        "sys/fs/cgroup/a/b/memory.current": "4000\n",
        "sys/fs/cgroup/a/b/memory.stat": "anon 1000\nactive_file 700\ninactive_file 300\n",
        "sys/fs/cgroup/a/memory.max": "4500\n",
        "sys/fs/cgroup/a/memory.current": "4000\n",
        "sys/fs/cgroup/a/memory.stat": "active_file 100\n",
    }
    assert machine(tmp_path / "v2", "0::/a/b\n", V2, files) == 600
    files = {
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "5000\n",
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "4000\n",
        "sys/fs/cgroup/memory/a/memory.stat": "total_active_file 200\ntotal_inactive_file 1\n",
    }
    assert machine(tmp_path / "v1", "7:memory:/a\n", V1, files) == 1201


def test_this_machine_has_some_left() -> None:
    assert memory_left() > MB


def test_the_command_line(fitted_gguf: Path) -> None:
    options = ("complete", fitted_gguf, "-p", "The", "-n", "4", "--temp", "0", "--device", "none")
    done = [command("runtime", *options, *more) for more in ([], ["--mmap"], ["--no-mmap"])]
    assert {one.returncode for one in done} == {0}
    assert done[0].stdout == done[1].stdout == done[2].stdout
    assert not any("mapped" in one.stderr for one in done)


@linux
def test_a_note_where_memory_is_short(fitted_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.engine.memory_left", lambda: 10.0 * MB)
    options = ("complete", fitted_gguf, "-p", "The", "-n", "4", "--temp", "0", "--device", "none")
    done = command("runtime", *options)
    assert done.returncode == 0
    assert "note: 9.5 MiB of memory left" in done.stderr
    done = command("runtime", *options, "--no-mmap")
    assert done.returncode == 1
    assert "leave --no-mmap out" in done.stderr
