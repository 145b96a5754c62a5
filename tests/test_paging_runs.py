"""Programs that run in less memory than their model needs: how much they have, what they tell of it, and how they end
where the disk fails or somebody stops them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from in_process import command
from oracle import random_ids
from prometheus_client import generate_latest
from test_paging import compute, least, load

from runtime.compute.batch import Batch
from runtime.compute.paging import PagedStats
from runtime.serve.metrics import Metrics
from runtime.serve.service import Service

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere weights stay in the mapped file"),
]

ROOT = Path(__file__).parent.parent
MB = 1 << 20
TOKENS = 1000
HOT = ("--temp", "5", "--top-k", "0", "--top-p", "1", "--seed", "1")  # a text that does not end by itself
OPTIONS = ("--ffn", "predicted", "--n-ctx", "256", "--threads", "2", "--device", "none")


@pytest.fixture(scope="module")
def budget(fitted_gguf: Path) -> int:
    """The smallest for `OPTIONS` and a batch of 512 tokens, or a little more."""
    return least(fitted_gguf, ffn="predicted", n_batch=512) + MB


# --- memory --------------------------------------------------------------------------------------------------------------


def anonymous() -> int:
    """Bytes of memory of this process that no file stands for."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])


def test_memory_stays_within_the_budget(fitted_gguf: Path, budget: int) -> None:
    """Over a thousand tokens, and does not grow."""
    before = anonymous()
    budget += 3 * MB  # a tenth of what is wanted is not there
    with load(fitted_gguf, budget, ffn="predicted", n_batch=512) as model:
        ids = random_ids(TOKENS, model.structure.vocab_size)
        seen = []
        for k, token in enumerate(ids):
            if k % 250 == 0:
                model.engine.cells.clear()
            model.engine.compute(Batch.of([token], k % 250, 0))
            seen.append(anonymous() - before)
        paged = model.stats().paged
        assert paged and paged.dropped > 100 * MB  # all of the rows many times over
    assert max(seen) <= 1.05 * budget + 32 * MB
    assert max(seen) <= max(seen[:250]) + 4 * MB


# --- what is told --------------------------------------------------------------------------------------------------------


def test_a_trace_has_what_each_step_read(fitted_gguf: Path, budget: int, tmp_path: Path) -> None:
    with load(fitted_gguf, budget, trace=str(tmp_path / "t.json")) as model:
        compute(model)
        paged = model.stats().paged
    events = [e for e in json.loads((tmp_path / "t.json").read_text())["traceEvents"] if e["ph"] == "C"]
    assert paged and {e["name"] for e in events} == {"from the disk"}
    assert sum(e["args"]["MB"] for e in events) == pytest.approx(paged.read / 1e6)
    assert sum(e["args"]["ms waited"] for e in events) == pytest.approx(paged.seconds * 1e3)
    times = [e["ts"] for e in events]
    assert times == sorted(times) and len(times) > 10


class Figures(Service):
    """A service of a model that somebody else computes with."""

    def __init__(self, figures: Any) -> None:
        super().__init__()
        self.state, self.figures = "ready", lambda: figures  # type: ignore[method-assign]


def test_metrics_have_what_was_read(fitted_gguf: Path, budget: int) -> None:
    from runtime.serve.engine_loop import Counts
    from runtime.serve.service import Figures as Found

    with load(fitted_gguf, budget) as model:
        compute(model)
        paged = model.engine.paged()
    assert isinstance(paged, PagedStats) and paged.read
    for told in (paged, None):
        text = generate_latest(Metrics(Figures(Found(Counts(), 0, 0, 1, 0, 0, {}, 0.0, [], told))).registry).decode()
        lines = dict(line.split() for line in text.splitlines() if line.startswith("lazyneuron:paged"))
        wanted = {
            "lazyneuron:paged_wanted_bytes_total": paged.wanted,
            "lazyneuron:paged_read_bytes_total": paged.read,
            "lazyneuron:paged_dropped_bytes_total": paged.dropped,
            "lazyneuron:paged_reads_total": paged.reads,
            "lazyneuron:paged_seconds_total": paged.seconds,
            "lazyneuron:paged_resident_bytes": paged.resident,
            "lazyneuron:paged_limit_bytes": paged.limit,
        }
        assert {name: float(value) for name, value in lines.items()} == (pytest.approx(wanted) if told else {})


def test_a_chat_says_what_was_read(fitted_gguf: Path, budget: int) -> None:
    asked = ("chat", fitted_gguf, "-n", "8", "--ram-budget", f"{budget}B", *OPTIONS)
    done = command("runtime", *asked, "--json", stdin="Hello\n/stats\n")
    assert done.returncode == 0, done.stderr
    paged = json.loads(done.stdout.splitlines()[-1])["paged"]
    assert paged["read"] > 0 and 0 < paged["resident"] <= paged["limit"]
    assert f"in {paged['reads']:,} reads and " in done.stderr
    assert f"{paged['read'] / paged['wanted']:.1%} of what was wanted was not" in done.stderr


# --- how it ends ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoding(fitted_gguf: Path, budget: int, tmp_path: Path) -> Any:
    """A program that writes without end, and reads rows for it."""
    path = tmp_path / "m.gguf"
    shutil.copy(fitted_gguf, path)
    program = [sys.executable, "-m", "runtime", "complete", str(path), "-p", "The", "-n", "250", *HOT]
    process = subprocess.Popen(
        [*program, "--ram-budget", f"{budget}B", *OPTIONS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout
    assert process.stdout.read(1)
    process.send_signal(signal.SIGSTOP)  # or it ends before anything happens to it
    yield process, path
    process.kill()
    process.communicate()


@pytest.mark.parametrize("how", ["interrupted", "truncated", "killed"])
def test_a_program_ends(decoding: tuple[subprocess.Popen[bytes], Path], how: str) -> None:
    process, path = decoding
    if how == "truncated":
        os.truncate(path, MB)
    elif how == "interrupted":
        process.send_signal(signal.SIGINT)
    else:
        process.kill()
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    lines = errors.decode().splitlines()
    assert "Traceback" not in errors.decode()
    assert process.returncode == {"interrupted": 130, "truncated": 1, "killed": -signal.SIGKILL}[how]
    if how == "truncated":
        assert [line for line in lines if line.startswith("error: ") and "while it was read" in line] == lines[:1]
        return
    path.rename(path.with_suffix(".moved"))  # nobody holds it
    assert sorted(each.name for each in path.parent.iterdir()) == ["m.moved"]


FAILS = """
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
/* Reads fail while a file is there. */
static ssize_t failing(int fd, void * to, size_t n, off_t at) {
    const char * sign = getenv("FAILS_WHILE");
    if (sign && access(sign, F_OK) == 0) {
        errno = EIO;
        return -1;
    }
    return syscall(SYS_pread64, fd, to, n, at);
}
ssize_t pread(int fd, void * to, size_t n, off_t at) { return failing(fd, to, n, at); }
ssize_t pread64(int fd, void * to, size_t n, off64_t at) { return failing(fd, to, n, at); }
"""
FAILING = """
import os, sys
import numpy as np
sys.path.insert(0, "tests")
from test_paging import compute, load
from runtime.errors import UserError
from pathlib import Path
path, sign, budget = Path(sys.argv[1]), Path(os.environ["FAILS_WHILE"]), int(sys.argv[2])
with load(path) as model:
    wanted = compute(model)
with load(path, budget) as model:
    assert np.array_equal(compute(model), wanted)
    sign.touch()
    for _ in range(2):
        try:
            compute(model)
        except UserError as error:
            print(error.message)
        assert not any(model.engine.cells.lengths)
    sign.unlink()
    assert np.array_equal(compute(model), wanted)
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="no compiler")
def test_a_disk_that_fails(fitted_gguf: Path, budget: int, tmp_path: Path) -> None:
    """One line for each batch; and where it works again, the same logits as ever."""
    source, library = tmp_path / "fails.c", tmp_path / "fails.so"
    source.write_text(FAILS)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    variables = {**os.environ, "LD_PRELOAD": str(library), "FAILS_WHILE": str(tmp_path / "sign")}
    done = subprocess.run(
        [sys.executable, "-c", FAILING, str(fitted_gguf), str(budget)],
        env=variables, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"`{fitted_gguf}`: reading rows failed: Input/output error"] * 2

    (tmp_path / "sign").touch()
    program = [sys.executable, "-m", "runtime", "complete", str(fitted_gguf), "-p", "x", "-n", "1", *OPTIONS]
    done = subprocess.run(
        [*program, "--ram-budget", f"{budget}B"],
        env=variables, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Input/output error" in done.stderr.splitlines()[0] and "Traceback" not in done.stderr
