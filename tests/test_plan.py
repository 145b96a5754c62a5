"""`python -m runtime plan`, and the bytes that the planner takes from a file: counted once more from the tensors, and by runtime/compute/traffic.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import command

from convert import convert
from runtime.compute.dense_threshold import expected
from runtime.compute.traffic import bytes_per_token, kv_bytes
from runtime.errors import UserError
from runtime.hybrid.costs import (
    MARGIN,
    PlanOptions,
    candidates,
    cuts_of,
    machine_of,
    model_costs,
    plan_for,
    reserve_of,
)
from runtime.hybrid.planner import place
from runtime.model_file.frequencies import frequencies
from runtime.model_file.reader import GgufFile
from runtime.options import RunOptions, SettledOptions

ROOT = Path(__file__).parent.parent
RUN = SettledOptions(ffn="exact", n_ctx=512)
OPTIONS = PlanOptions(RUN, (1 << 20,), (1e12,), 1e9, sync=1e-6, n_positions=100, reserve=0, scattered=1.0)
MACHINE = ("--vram-budget", 0.3, "--device-bandwidth", 1008, "--cpu-bandwidth", 60)


run = partial(command, "runtime", "plan")


def run_json(*arguments: object, cache: Path | None = None) -> dict[str, Any]:
    done = run(*arguments, "--json", env={"LAZYNEURON_CACHE": str(cache)} if cache else {})
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result: dict[str, Any] = json.loads(line)
    return result


# --- the bytes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ffn", ["exact", "predicted", "dense"])
def test_without_a_device_it_reads_what_a_token_reads(fitted_gguf: Path, ffn: str) -> None:
    """The time of a placement without a device is the traffic of a token over the bandwidth of main memory."""
    with GgufFile(fitted_gguf) as file:
        s = file.structure
        found = plan_for(file, replace(OPTIONS, run=replace(RUN, ffn=ffn), budgets=(0,)))
        traffic = bytes_per_token(s, file.tensors, expected(file, ffn, 0.0), kv_bytes(s, 100, 2))
    looked_up = 2 * s.embedding_length
    assert found.seconds * OPTIONS.cpu_bandwidth == pytest.approx(traffic.total - looked_up, rel=2e-3)


@pytest.mark.parametrize("name", ["bundled", "llama-odd-ff", "llama-biases", "opt-pre-norm", "opt-untied"])
@pytest.mark.parametrize("type_name", ["f16", "q8_0", "q4_0"])
def test_a_device_that_holds_all_neurons_holds_their_tensors(
    converted: Callable[..., Path], name: str, type_name: str
) -> None:
    with GgufFile(converted(name, type_name)) as file:
        blocks, head = model_costs(file, OPTIONS)
        for i, b in enumerate(blocks):
            parts = [
                f"blk.{i}.ffn_{name}" for name in ("gate.weight", "up.weight", "down.weight", "gate.bias", "up.bias")
            ]
            whole = sum(file.tensors[name].nbytes for name in parts if name in file.tensors)
            assert b.hot[-1] == whole
            assert b.cuts[-1] == b.neurons == file.structure.feed_forward_length
            assert b.cold[-1] == 0
            rest = [
                t.nbytes for name, t in file.tensors.items() if name.startswith((f"blk.{i}.attn_", f"blk.{i}.ffn_norm"))
            ]
            kv = 4 * file.structure.attentions[0].kv_length * 512
            assert sum(rest) + kv <= b.stored <= sum(rest) + kv + 64 * 1024
        assert head >= file.tensors["token_embd.weight" if file.structure.tied_output else "output.weight"].nbytes


def test_cuts_fit_the_blocks_of_the_down_projection() -> None:
    assert cuts_of(100, 1) == (0, 32, 64, 96, 100)
    assert cuts_of(1024, 32)[:3] == (0, 32, 64)
    assert cuts_of(1024, 256) == (0, 256, 512, 768, 1024)
    assert len(cuts_of(28672, 32)) == 113
    assert cuts_of(11008 + 32, 32)[-2:] == (11008, 11040)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 0.69, 0.7, 0.9, 1.0])
def test_candidates_are_as_many_as_predicted(share: float) -> None:
    freq = np.append(np.sort(np.random.default_rng(0).random(700) ** 6 + 1e-9)[::-1], np.zeros(300))
    found = candidates(freq, share)
    assert found.mean() == pytest.approx(share)
    assert found.max() <= 1
    assert (np.diff(found) <= 1e-12).all()
    assert candidates(np.zeros(10), 0.3).mean() == pytest.approx(0.3)


def test_the_reserve_grows_with_what_it_is_for(tiny_gguf: Path) -> None:
    with GgufFile(tiny_gguf) as file:
        s = file.structure
        small, large = (reserve_of(s, replace(OPTIONS, run=replace(RUN, n_batch=n))) for n in (128, 512))
        assert MARGIN < small < large
        assert plan_for(file, replace(OPTIONS, reserve=None, budgets=(small,))).bytes == (0,)


def test_a_file_without_the_down_projection_keeps_its_neurons_on_the_cpu(tmp_path: Path) -> None:
    convert(ROOT / "examples/tiny-relu-llama", tmp_path / "sparse.gguf", layout="sparse", calibration="none")
    with GgufFile(tmp_path / "sparse.gguf") as file:
        found = plan_for(file, replace(OPTIONS, budgets=(1 << 40,)))
        assert found.resident_from == 0
        assert not any(map(sum, found.hot))
        with pytest.raises(UserError, match="no ffn_down"):
            RunOptions(ffn="dense").for_file(file)


def test_options_that_make_no_sense_are_refused(tiny_gguf: Path) -> None:
    with GgufFile(tiny_gguf) as file:
        for wrong, text in (
            ({"budgets": (1, 2)}, "one of each per device"),
            ({"budgets": (), "device_bandwidths": ()}, "one of each per device"),
            ({"budgets": (-1,)}, "must not be negative"),
            ({"cpu_bandwidth": 0.0}, "must be positive"),
        ):
            with pytest.raises(UserError, match=text):
                plan_for(file, replace(OPTIONS, **wrong))
        with pytest.raises(UserError, match="no predictor"):
            RunOptions(ffn="predicted").for_file(file)


# --- the command ------------------------------------------------------------------------------------------------------


def test_it_plans_what_the_library_plans(fitted_gguf: Path) -> None:
    found = run_json(fitted_gguf, *MACHINE, "--sync-us", 0, "--n-ctx", 512, "--positions", 100)
    budget = int(0.3 * 2**30)
    options = replace(
        OPTIONS,
        run=replace(RUN, ffn="predicted"),
        budgets=(budget,),
        device_bandwidths=(1008e9,),
        cpu_bandwidth=60e9,
        sync=0.0,
        reserve=None,
    )
    options = replace(options, scattered=PlanOptions.scattered)
    with GgufFile(fitted_gguf) as file:
        expected_placement = plan_for(file, options)
        hottest = frequencies(file, 0)
    assert [tuple(layer["hot"]) for layer in found["layers"]] == list(expected_placement.hot)
    assert found["seconds"] == pytest.approx(expected_placement.seconds)
    assert found["devices"][0]["bytes"] == expected_placement.bytes[0] <= budget
    assert (found["ffn"], found["n_ctx"], found["kv_type"], found["calibrated"]) == ("predicted", 512, "f16", True)
    assert found["seconds"] <= found["cpu_only_seconds"]
    (k,) = found["layers"][0]["hot"]
    assert found["layers"][0]["activations"] == pytest.approx(hottest[:k].sum() / hottest.sum())
    assert sum(found["parts"].values()) == pytest.approx(found["seconds"])
    assert found["tokens_per_s"] == pytest.approx(1 / found["seconds"])


def test_no_budget_and_a_wider_cache(fitted_gguf: Path) -> None:
    none = run_json(fitted_gguf, "--vram-budget", 0, "--device-bandwidth", 1008, "--cpu-bandwidth", 60)
    assert none["devices"] == [{"budget": 0, "bytes": 0, "reserve": 0}]
    assert none["seconds"] == none["cpu_only_seconds"]
    narrow, wide = (
        run_json(fitted_gguf, *MACHINE, "--sync-us", 0, "--kv-type", kind)["devices"][0] for kind in ("f16", "f32")
    )
    assert wide["bytes"] != narrow["bytes"]


def test_a_device_of_this_machine(fitted_gguf: Path, tmp_path: Path) -> None:
    """Speeds are measured and remembered, what is given wins, and what is free is the limit."""
    given = ("--device-bandwidth", 100000, "--sync-us", 0)  # on a busy machine going there takes longer than all else
    found = run_json(fitted_gguf, "--device", "cpu", *given, cache=tmp_path)
    assert found["devices"][0]["bytes"] > 0
    assert found["layers"][0]["hot"] == [1024]
    (key,) = json.loads((tmp_path / "bandwidths.json").read_text())["speeds"]
    (tmp_path / "bandwidths.json").write_text(json.dumps({"version": 1, "speeds": {key: [1e9, 1e-6]}}))
    again = run_json(fitted_gguf, "--device", "cpu", cache=tmp_path)
    assert again["cpu_only_seconds"] > 1e-3
    (tmp_path / "bandwidths.json").write_text("{}")
    assert run_json(fitted_gguf, "--device", "cpu", "--vram-budget", "0", cache=tmp_path)["devices"][0]["bytes"] == 0


def test_several_devices(fitted_gguf: Path) -> None:
    two = ("--vram-budget", "0.27,0.27", "--device-bandwidth", "1008,600", "--cpu-bandwidth", 1, "--sync-us", 0)
    found = run_json(fitted_gguf, *two)
    assert [len(layer["hot"]) for layer in found["layers"]] == [2] * 6
    assert all(device["bytes"] <= device["budget"] for device in found["devices"])


def test_what_people_see(fitted_gguf: Path, tiny_gguf: Path) -> None:
    done = run(fitted_gguf, *MACHINE)
    assert done.returncode == 0, done.stderr
    for text in ("hot neurons", "time per token", "tokens/s", "limited by", "device 0", " MiB"):
        assert text in done.stdout
    assert "no neuron frequencies" not in done.stdout
    assert "no neuron frequencies" in run(tiny_gguf, *MACHINE).stdout
    small = run(tiny_gguf, "--vram-budget", 0, "--device-bandwidth", 1, "--cpu-bandwidth", 60)
    assert "Nothing is put on a device" in small.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--vram-budget", "8,8", "--device-bandwidth", 1, "--cpu-bandwidth", 1), "one of each per device"),
        (("--vram-budget", "x", "--device-bandwidth", 1, "--cpu-bandwidth", 1), "memory budget `x`"),
        (("--vram-budget", "-1", "--device-bandwidth", 1, "--cpu-bandwidth", 1), "memory budget `-1`"),
        (("--vram-budget", "inf", "--device-bandwidth", 1, "--cpu-bandwidth", 1), "memory budget `inf`"),
        (("--vram-budget", 1, "--device-bandwidth", 0, "--cpu-bandwidth", 1), "must be positive"),
        (("--vram-budget", 1, "--device-bandwidth", 1, "--cpu-bandwidth", 1, "-c", 99999999), "the model's own limit"),
        (("--vram-budget", 1, "--device-bandwidth", 1, "--cpu-bandwidth", 1, "--ffn", "predicted"), "no predictor"),
        (("--vram-budget", 1), "--device-bandwidth"),
        (("--device", "Nonesuch"), "no device `Nonesuch`, found CPU"),
        (("--device", "CPU", "--vram-budget", "1,1"), "2 memory budgets for 1 devices"),
    ],
)
def test_mistakes_are_one_line(tiny_gguf: Path, arguments: tuple[object, ...], text: str) -> None:
    done = run(tiny_gguf, *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    error, *hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert text in error
    assert len(hint) <= 1


def test_what_is_planned_for_a_file_is_the_optimum_of_its_blocks(fitted_gguf: Path) -> None:
    """Half of what everything takes: the planner uses it, and never more."""
    with GgufFile(fitted_gguf) as file:
        options = replace(OPTIONS, run=replace(RUN, ffn="predicted"), device_bandwidths=(1e13,), sync=0.0)
        blocks, head = model_costs(file, options)
        everything = head + sum(b.stored + b.predictor + b.hot[-1] for b in blocks)
        found = plan_for(file, replace(options, budgets=(everything // 2,)))
        assert 0.9 * everything / 2 < found.bytes[0] <= everything // 2
        again = place(blocks, head, machine_of(file.structure, replace(options, budgets=(everything // 2,))))
        assert again == found
