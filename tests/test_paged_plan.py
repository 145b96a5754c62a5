"""`python -m runtime plan --ram-budget`: what a budget of main memory should hold, and what is read from the disk without
the rest.
"""

from __future__ import annotations

import itertools
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import command
from test_paging import load

from bench.make_model import Recipe, write_model
from runtime.analysis.paged_plan import PagedPlan, paged_plan
from runtime.bindings.pager import PAGE
from runtime.compute.dense_threshold import candidate_shares, expected
from runtime.hybrid.disk_speed import DiskSpeed
from runtime.hybrid.paged_rows import RowCosts, held_rows
from runtime.model_file.frequencies import frequencies
from runtime.model_file.reader import GgufFile
from runtime.options import RunOptions

MB = 1 << 20
DISK = DiskSpeed.described(1e9, 50e3)
MACHINE = ("--cpu-bandwidth", 30, "--disk-bandwidth", 1, "--disk-reads", 50)

run = partial(command, "runtime", "plan")


def plan_of(path: Path, budget: int, ffn: str = "predicted") -> PagedPlan:
    with GgufFile(path) as file:
        return paged_plan(file, RunOptions(ffn=ffn, ram_budget=budget, n_ctx=256).for_file(file), 30e9, disk=DISK)


def in_memory(path: Path, ffn: str) -> int:
    """Bytes of a budget that holds all."""
    found = plan_of(path, 1 << 40, ffn)
    return found.weights + found.kv + found.buffers + found.rows


def test_the_rows_that_are_held_are_the_best() -> None:
    """No other choice that is a row smaller saves more: all of them are tried."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        sizes = [np.full(n, rng.integers(3, 9), np.float64) for n in (4, 3, 4)]
        seconds = [rng.random(len(each)) for each in sizes]
        blocks = [RowCosts(size, size, size, wait) for size, wait in zip(sizes, seconds, strict=True)]
        room = float(rng.integers(0, 60))
        held = held_rows(blocks, room)
        size, wait = np.concatenate(sizes), np.concatenate(seconds)
        there = np.concatenate(held)
        assert size[there].sum() <= room and [len(part) for part in held] == [4, 3, 4]
        for choice in itertools.product((False, True), repeat=len(size)):
            if size[list(choice)].sum() <= room - size.max():
                assert wait[list(choice)].sum() <= wait[there].sum() + 1e-12


@pytest.mark.parametrize("ffn", ["predicted", "exact"])
def test_what_is_read_is_what_is_wanted_and_not_there(fitted_gguf: Path, ffn: str) -> None:
    whole = in_memory(fitted_gguf, ffn)
    found = plan_of(fitted_gguf, whole, ffn)
    assert found.read == found.reads == 0 and found.seconds == found.in_memory_seconds
    assert all(layer.held == 1 for layer in found.layers) and found.neurons == found.rows
    speeds, half = [found.tokens_per_s], plan_of(fitted_gguf, whole - found.rows // 2, ffn)
    for part in (3, 2):
        found = plan_of(fitted_gguf, whole - found.rows // part, ffn)
        assert found.weights + found.kv + found.buffers + found.neurons <= found.ram_budget
        assert found.parts["disk"] == pytest.approx(found.seconds - found.in_memory_seconds)
        assert found.read == pytest.approx(sum(layer.read for layer in found.layers))
        speeds.append(found.tokens_per_s)
    assert speeds == sorted(speeds, reverse=True) and found == half


def test_with_nothing_in_memory_all_that_is_wanted_is_read(fitted_gguf: Path) -> None:
    with GgufFile(fitted_gguf) as file:
        run_options = RunOptions(ffn="predicted", ram_budget=1 << 40).for_file(file)
        from runtime.hybrid.costs import PlanOptions
        from runtime.hybrid.paged_rows import row_costs

        rows = row_costs(file, PlanOptions(run_options, (0,), (1.0,), 1.0), DISK)
        gates = candidate_shares(file, "predicted", 0.0, expected(file, "predicted", 0.0).fired)
        for (i, ffn), of in zip(file.structure.ffns.items(), rows, strict=True):
            wanted = gates[i] * ffn.n_ff + 2 * frequencies(file, i).sum()
            assert of.reads.sum() == pytest.approx(wanted)
            size = file.tensors[f"blk.{i}.ffn_gate.weight"].nbytes / ffn.n_ff
            assert of.read.sum() == pytest.approx(wanted * (PAGE + size - 1))
            assert of.seconds.sum() == pytest.approx(max((PAGE + size - 1) / 1e9, 1 / 50e3) * wanted)


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere weights stay in the mapped file")
def test_it_counts_what_a_model_holds(fitted_gguf: Path, tmp_path: Path) -> None:
    write_model(Recipe("tiny-mixtral", 0.2, "q4_0"), tmp_path / "experts.gguf")
    for path in (fitted_gguf, tmp_path / "experts.gguf"):
        for ffn in ("predicted", "exact"):
            found = plan_of(path, 1 << 40, ffn)
            with load(path, 1 << 40, ffn=ffn, n_batch=512) as model:
                engine = model.engine
                assert (found.weights, found.kv) == (engine.weights.held_bytes, engine.kv_held)
                assert engine._paging
                buffers = (1 << 40) - engine.weights.held_bytes - engine.kv_held - engine._paging.limit
                assert 0 < buffers <= found.buffers


def test_output(fitted_gguf: Path) -> None:
    budget = in_memory(fitted_gguf, "predicted") - 2 * MB
    done = run(fitted_gguf, "--ram-budget", f"{budget}B", "--n-ctx", 256, *MACHINE)
    assert done.returncode == 0, done.stderr
    assert "limited by          disk" in done.stdout and "50,000 reads of 8192 bytes/s" in done.stdout
    done = run(fitted_gguf, "--ram-budget", f"{budget}B", "--n-ctx", 256, *MACHINE, "--json")
    values: dict[str, Any] = json.loads(done.stdout)
    assert values == json.loads(json.dumps(plan_of(fitted_gguf, budget).as_json()))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--vram-budget", 1), "a budget of main memory with a device"),
        (("--device", "CPU"), "a budget of main memory with a device"),
        (("--ffn", "dense"), "a budget of main memory in `dense` mode"),
        (("--disk-reads", 0), "--disk-bandwidth and --disk-reads: expected both, above 0"),
        (("--ram-budget", "1KiB"), "of the memory budget are left for neurons, expected at least"),
    ],
)
def test_refused(fitted_gguf: Path, options: tuple[object, ...], why: str) -> None:
    done = run(fitted_gguf, "--ram-budget", 1, *MACHINE, *options)
    assert done.returncode == 1 and why in done.stderr and "Traceback" not in done.stderr


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="the pager reads on Linux only")
def test_a_disk_that_is_not_described_is_measured(fitted_gguf: Path, tmp_path: Path) -> None:
    done = run(fitted_gguf, "--ram-budget", 1, "--cpu-bandwidth", 30, "--json", env={"LAZYNEURON_CACHE": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["disk"]["sequential"] > 0


def test_a_page_shows_budgets(fitted_gguf: Path, tmp_path: Path) -> None:
    """As `plan` has them; those that are too small are left out, and without a budget there is nothing of it."""
    budget, page = in_memory(fitted_gguf, "predicted") - 2 * MB, tmp_path / "page.html"
    options = ("--n-ctx", 256, *MACHINE, "--json", "--force")
    done = command("runtime", "report", fitted_gguf, page, "--ram-budget", f"{budget}B", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["memory"]
    assert found["wanted"] == budget
    shown = {plan["ram_budget"]: plan for plan in found["plans"]}
    assert list(shown) == sorted(shown, reverse=True) and budget in shown and min(shown) > 4 * MB
    wanted = plan_of(fitted_gguf, budget)
    assert shown[budget]["tokens_per_s"] == pytest.approx(wanted.tokens_per_s)
    assert shown[budget]["read"] == pytest.approx(wanted.read)
    html = page.read_text("utf-8")
    assert "Main memory and the disk" in html and f"<td>{wanted.neurons / wanted.rows:.1%}</td>" in html
    command("runtime", "report", fitted_gguf, page, *options)
    assert "Main memory and the disk" not in page.read_text("utf-8")
