"""What `bench.disk` takes for granted: memory that is taken away comes back, llama.cpp keeps no more than its budget, and
a disk's speed is one that was measured.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import disk, short_memory, stock
from bench.contenders import LLAMA_CPP, Spec
from bench.disk import DiskPlan
from bench.make_model import Recipe, random_ids, write_model
from bench.pressure import Pressure
from bench.short_memory import TRIMMED, ShortLlamaCpp
from runtime.base.memory_left import memory_left
from runtime.errors import UserError
from runtime.hybrid.disk_speed import BUNDLE, DEPTHS, DiskSpeed, disk_speed, file_system

pytestmark = [pytest.mark.native, pytest.mark.skipif(sys.platform != "linux", reason="Linux alone")]

ROOT = Path(__file__).parent.parent
MB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "tiny.gguf"
    write_model(Recipe("tiny", 0.1, "q4_0"), path)
    stock.write(path, path.with_suffix(".stock.gguf"))
    return path


def test_race(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    twin = model.with_suffix(".stock.gguf")
    options = ["--budgets", "1000", "--ffn", "predicted", "--rounds", "1", "--tokens", "4", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["bench.disk", str(model), "--twin", str(twin), *options])
    disk.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    (result,) = found["budgets"]
    assert set(result["contenders"]) == {LLAMA_CPP, "predicted"}
    assert result["share"] == 10 and result["budget"] == 10 * model.stat().st_size
    for figures in result["contenders"].values():
        assert figures["tokens_per_s"] > 0
        # Both at once is at least as fast as one after the other.
        assert figures["share_of_bound"] <= figures["share_in_turn"]


@pytest.mark.parametrize("wrong", [{"budgets": (0.0,)}, {"rounds": 0}, {"tokens": 0}, {"turn_s": 0.0}])
def test_plan_out_of_range(wrong: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(UserError, match="expected"):
        DiskPlan(**wrong)


def resident_of(path: Path) -> int:
    """Bytes that this process has mapped of a file and that are in memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            inside = words[-1] == str(path)
        elif inside and words[0] == "Rss:":
            found += 1024 * int(words[1])
    return found


def test_llama_cpp_keeps_what_fits(model: Path) -> None:
    path = model.with_suffix(".stock.gguf")
    size, ids = path.stat().st_size, random_ids(512, 8)
    spec = Spec(LLAMA_CPP, str(path), 1, 256, ram_budget=1, pressure=TRIMMED)
    for kept in (0, size // 2, size):
        contender = short_memory.make(spec)
        assert isinstance(contender, ShortLlamaCpp)
        contender.open()
        try:
            contender._spec = Spec(**{**vars(spec), "ram_budget": contender._own + kept})
            contender.start(ids[:4])
            contender.step(ids[4])
            assert resident_of(path) <= kept + 4096
            assert contender.facts()["aside_s"] > 0
            assert kept < size or resident_of(path) > size // 2
        finally:
            contender.close()


# --- memory that is taken away --------------------------------------------------------------------------------------------


def test_pressure_takes_no_more_than_it_is_to() -> None:
    with Pressure(int(memory_left()) - 256 * MB, floor=0, most=256 * MB) as pressure:
        assert 0 <= pressure.locked <= pressure.taken <= 256 * MB
        number = pressure._process.pid
    assert not Path(f"/proc/{number}").exists()


def test_pressure_leaves_others_alone() -> None:
    with pytest.raises(UserError, match=r"2\.00 GiB of memory would be left to all programs, expected at least 3\.00"):
        Pressure(2 << 30)


def test_pressure_ends_with_whoever_started_it() -> None:
    program = (
        "from bench.pressure import Pressure\nfrom runtime.base.memory_left import memory_left\n"
        f"p = Pressure(int(memory_left()) - {128 * MB}, floor=0, most={128 * MB})\n"
        "print(p._process.pid, flush=True)\nimport time; time.sleep(60)"
    )
    starter = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT)
    assert starter.stdout
    number = int(starter.stdout.readline())
    os.kill(starter.pid, signal.SIGKILL)
    starter.communicate()
    while Path(f"/proc/{number}").exists() and _state(number) != "Z":  # whoever inherits it may be late
        time.sleep(0.01)


def _state(number: int) -> str:
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


# --- the disk's speed -----------------------------------------------------------------------------------------------------


def test_a_disk_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYNEURON_CACHE", str(tmp_path))
    monkeypatch.setattr("runtime.hybrid.disk_speed._ENOUGH", MB)
    path = tmp_path / "file"
    path.write_bytes(os.urandom(MB))
    speed = disk_speed([path])
    assert len(speed.reads) == len(DEPTHS) and min(speed.sequential, *speed.reads) > 0
    monkeypatch.setattr("runtime.hybrid.disk_speed.measure", lambda path: [7.0] * (1 + len(DEPTHS)))
    assert disk_speed([path]) == speed
    assert disk_speed([path], anew=True).sequential == 7.0
    stored = json.loads((tmp_path / "disks.json").read_text())
    (tmp_path / "disks.json").write_text(json.dumps({**stored, "speeds": {key: [1.0] for key in stored["speeds"]}}))
    assert disk_speed([path]).sequential == 7.0  # too few figures: measured again


def test_small_files_are_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYNEURON_CACHE", str(tmp_path))
    (tmp_path / "file").write_bytes(bytes(3 * BUNDLE))
    assert disk_speed([tmp_path / "file"]).sequential > 0
    assert not (tmp_path / "disks.json").exists()
    (tmp_path / "file").write_bytes(b"short")
    with pytest.raises(UserError, match="too short to measure a disk with"):
        disk_speed([tmp_path / "file"])


def test_file_system_of_the_longest_mount_point(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"2 1 8:2 / {tmp_path}/a\\040b rw,relatime shared:1 - xfs /dev/nvme0n1p2 rw\n"
    )
    (tmp_path / "a b").mkdir()
    assert file_system(tmp_path / "a b/model.gguf", mounts) == f"xfs /dev/nvme0n1p2 {tmp_path}/a b"
    assert file_system(tmp_path / "model.gguf", mounts) == "ext4 /dev/sda1 /"
    assert file_system(tmp_path, tmp_path / "none").startswith("device ")


def test_what_reads_take() -> None:
    speed = DiskSpeed.described(2e9, 100e3)
    assert speed.seconds(4e9, 10) == 2.0  # the bytes
    assert speed.seconds(1e6, 200e3) == 2.0  # the reads
    with pytest.raises(ValueError, match="positive"):
        DiskSpeed.described(0, 1)
