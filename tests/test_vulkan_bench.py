"""`bench.hybrid` on Mesa's software Vulkan: what the contenders have on the device, and that both get their turns. Says nothing of speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from devices import gpu

from runtime.hybrid import bandwidth
from runtime.hybrid.devices import DeviceInfo
from runtime.model_file.reader import GgufFile

pytestmark = pytest.mark.vulkan

ROOT = Path(__file__).parent.parent
PERCENTS = (50, 96, 100)  # of a small model, of which the reserve is nine tenths: nothing, a part, all
ROUNDED = 3 * 10240  # three buffers, as llama.cpp logs them


@pytest.fixture(scope="session")
def result(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run in which the planner takes the software device for a fast one: else it would leave everything to the CPU."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAZYNEURON_CACHE", str(cache))
        patch.setattr(bandwidth, "measure", _as_if_fast)
        for device in (gpu(), bandwidth.cpu()):
            bandwidth.speed_of(device, 2)
    percents = ",".join(map(str, PERCENTS))
    done = subprocess.run(
        [sys.executable, "-m", "bench.hybrid", str(tiny_gguf), "--budgets", percents, "--rounds", "1", "--tokens", "4", "--threads", "2"],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "LAZYNEURON_CACHE": str(cache)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _as_if_fast(device: DeviceInfo, threads: int) -> bandwidth.Speed:
    return bandwidth.Speed(1e12 if device.kind == "GPU" else 1e9, 1e-6)


def test_both_decode_within_each_budget(result: dict[str, Any]) -> None:
    assert result["device"]["name"] == gpu().name
    assert [budget["percent"] for budget in result["budgets"]] == list(PERCENTS)
    for budget in result["budgets"]:
        assert budget["budget_bytes"] == pytest.approx(result["full_bytes"] * budget["percent"] / 100, abs=1024)
        for kind in ("lazyneuron", "llama_cpp"):
            assert budget[kind]["tokens_per_s"] > 0
            assert budget[kind]["device_bytes"] <= budget["budget_bytes"]
            assert budget[kind]["driver_bytes"] is None  # this driver reports all of its memory as free, always


def test_more_budget_puts_more_of_ours_on_the_device(result: dict[str, Any]) -> None:
    nothing, part, everything = (budget["lazyneuron"] for budget in result["budgets"])
    assert nothing["device_bytes"] == nothing["blocks"] == nothing["hot_share"] == 0
    assert 0 < part["device_bytes"] < everything["device_bytes"]
    assert part["hot_share"] < everything["hot_share"]
    assert everything["blocks"] == result["blocks"]


def test_llama_cpp_leaves_ffns_to_the_cpu_where_it_must(tiny_gguf: Path, result: dict[str, Any]) -> None:
    nothing, part, everything = (budget["llama_cpp"] for budget in result["budgets"])
    assert (nothing["layers"], nothing["device_bytes"]) == (0, 0)
    assert (everything["layers"], everything["cpu_ffns"]) == (result["blocks"] + 1, 0)
    assert part["layers"] == result["blocks"] + 1
    assert 0 < part["cpu_ffns"] < result["blocks"]
    with GgufFile(tiny_gguf) as file:
        ffn = sum(file.tensors[f"blk.0.ffn_{name}.weight"].nbytes for name in ("gate", "up", "down"))
        weights = sum(t.nbytes for name, t in file.tensors.items() if ".attn" in name or name == "token_embd.weight")
    less = everything["device_bytes"] - part["device_bytes"]
    assert less == pytest.approx(part["cpu_ffns"] * ffn, abs=2 * ROUNDED)
    assert part["device_bytes"] > weights + (result["blocks"] - part["cpu_ffns"]) * ffn
