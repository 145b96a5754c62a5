"""The benchmarks' own promises, on tiny synthetic models: what is planted is what is measured, and what is printed can be read by scripts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import mode_errors

import runtime
from bench import batches, converting, kernels, machine, predictors, stock
from bench import race as race_module
from bench.case import Case
from bench.contender_process import ContenderProcess
from bench.contenders import LLAMA_CPP, LlamaCpp, Ours, Spec, Writing, in_order, make, timed_decode
from bench.firing_rates import plan_firing
from bench.make_model import Recipe, measure, random_ids, write_model
from bench.pool import GROUP, ColumnPool, RowPool, choose_groups, decode, row_ids
from bench.race import OUT_OF_TIME, RacePlan, set_up
from bench.resident_memory import drop_cached
from bench.shapes import shape
from runtime.base.worker import on_worker
from runtime.bindings import waiting
from runtime.bindings.ffi import library_folder
from runtime.bindings.sparse_ffn import variants
from runtime.block_runner import BlockRunner
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile
from runtime.options import FFN_MODES
from runtime.text.sampling import Sampling

ROOT = Path(__file__).parent.parent
RECIPES = {"gated": Recipe("tiny", 0.1, "q4_0"), "ungated": Recipe("tiny-opt", 0.04, "q8_0")}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bench")
    for name, recipe in RECIPES.items():
        write_model(recipe, folder / f"{name}.gguf")
        stock.write(folder / f"{name}.gguf", folder / f"{name}.stock.gguf")
    return {path.name.removesuffix(".gguf"): path for path in folder.iterdir()}


def last_line(module: str, *arguments: str, cache: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{module}", *arguments, "--threads", "2"],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "LAZYNEURON_CACHE": str(cache)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("name", RECIPES)
def test_neurons_fire_and_are_predicted_as_planned(models: dict[str, Path], name: str) -> None:
    found, wanted = measure(models[name], threads=2), RECIPES[name].active
    assert found["active"] == pytest.approx(wanted, rel=0.15)
    assert all(share == pytest.approx(wanted, rel=0.3) for share in found["layers"]["active"])
    assert wanted < found["predicted_share"] < 1.5 * wanted
    assert 0.85 < found["recall"] < 1


def test_everything_fires_where_that_is_wanted(tmp_path: Path) -> None:
    write_model(Recipe("tiny", 1.0, "q8_0", layers=2), tmp_path / "m.gguf")
    assert measure(tmp_path / "m.gguf", threads=2, tokens=8)["active"] > 0.999


@pytest.mark.parametrize("name", RECIPES)
def test_stored_frequencies_are_those_that_are_measured(models: dict[str, Path], name: str) -> None:
    with GgufFile(models[name]) as file, BlockRunner(file, 2, 256) as runner:
        s = file.structure
        hidden = runner.embed(np.array(random_ids(s.vocab_size, 256), np.int32))
        first = "ffn_gate" if s.ffns[0].gated else "ffn_up"
        for i in range(s.block_count):
            result = runner.block(i, hidden)
            gate = result.ffn_input @ runner.rows(f"blk.{i}.{first}.weight", 0, s.feed_forward_length).T
            bias = runner.vector(f"blk.{i}.{first}.bias")
            measured = ((gate if bias is None else gate + bias) > 0).mean(0)
            stored = file.read(f"blk.{i}.ffn_neuron_freq").view(np.float32)
            assert (np.diff(stored) <= 0).all()
            assert sorted(file.read(f"blk.{i}.ffn_neuron_index").view(np.int32)) == list(range(len(stored)))
            assert np.abs(measured - stored).mean() < 0.02
            assert np.corrcoef(measured, stored)[0, 1] > 0.95
            hidden = result.output


@pytest.mark.parametrize("name", RECIPES)
def test_all_modes_compute_the_same(models: dict[str, Path], name: str) -> None:
    """Both layouts of the down projection are one matrix, and its part of the logits can be seen."""
    with GgufFile(models[name]) as file:
        ids = random_ids(file.structure.vocab_size, 24)
    exact, predicted = mode_errors(models[name], ids)
    assert exact < 0.12  # quantised twice
    assert 1e-4 < predicted < 0.25


def test_one_recipe_gives_the_same_bytes(models: dict[str, Path], tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    write_model(RECIPES["gated"], tmp_path / "again.gguf")
    write_model(Recipe("tiny", 0.1, "q4_0", seed=1), tmp_path / "other.gguf")
    assert digest(tmp_path / "again.gguf") == digest(models["gated"]) != digest(tmp_path / "other.gguf")


def test_blocks_have_bytes_of_their_own_and_the_file_says_what_it_is(models: dict[str, Path]) -> None:
    with GgufFile(models["gated"]) as file:
        for part in ("ffn_gate", "ffn_up", "ffn_down", "ffn_down_t", "predictor_in", "predictor_out"):
            blocks = {file.read(f"blk.{i}.{part}.weight").tobytes() for i in range(file.structure.block_count)}
            assert len(blocks) == file.structure.block_count, part
        assert file.metadata["general.name"].startswith("SYNTHETIC")
        assert "SYNTHETIC" in file.metadata["general.description"]


@pytest.mark.parametrize("name", RECIPES)
def test_llama_cpp_loads_the_twin(models: dict[str, Path], name: str) -> None:
    with GgufFile(models[name]) as file:
        mine = {n: t.nbytes for n, t in file.tensors.items() if "blk." in n and "ffn_down_t" not in n}
        shared = sum(size for n, size in mine.items() if "predictor" not in n and "neuron" not in n)
    contender = LlamaCpp(Spec(LLAMA_CPP, str(models[f"{name}.stock"]), 2, 64))
    on_worker(contender.open)
    try:
        on_worker(lambda: contender.start(random_ids(512, 16)))
        on_worker(lambda: contender.step(5))
    finally:
        on_worker(contender.close)
    assert models[f"{name}.stock"].stat().st_size > shared


def test_a_race_prints_one_line_for_scripts(tmp_path: Path) -> None:
    made = last_line("make_model", "--shape", "tiny", "--layers", "2", cache=tmp_path)
    assert made["active"] == pytest.approx(made["active_wanted"], rel=0.15)
    options = ("--shape", "tiny", "--layers", "2", "--rounds", "1", "--tokens", "4", "--prompt")
    (result,) = last_line("decode", *options, cache=tmp_path)["races"]
    kinds = ("llama_cpp", "dense", "exact", "predicted")
    keys = {"tokens_per_s", "min", "max", "bytes_per_token", "bound_tokens_per_s", "share_of_bound", "prompt", "memory"}
    assert all(keys <= set(result[kind]) for kind in kinds)
    assert set(result["ratios"]) == {kind for kind in result if kind in FFN_MODES} >= {"dense", "exact", "predicted"}
    assert set(result["exact"]["prompt"]) == {"32", "128", "512"}
    read = {kind: result[kind]["bytes_per_token"] for kind in kinds}
    assert read["predicted"] < read["exact"] < read["dense"] == read["llama_cpp"]
    assert result["exact"]["active"] == pytest.approx(0.1, rel=0.3)
    assert len(list((tmp_path / "bench").glob("*.gguf"))) == 2  # the race took what make_model had made
    assert (result["busy_programs"], result["rounds"], result["cut_short"]) == (0, 1, None)
    assert not any("busy" in result[kind] for kind in kinds)
    assert result["cpu"]
    assert result["kernels"] in variants()


def test_a_race_on_several_files_with_several_numbers_of_threads(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.decode", "--shape", "tiny-opt", "--layers", "1", "--type", "q8_0", "q4_0",
         "--threads", "1,2", "--ffn", "exact", "--rounds", "1", "--tokens", "2"],
        capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "LAZYNEURON_CACHE": str(tmp_path)},
    )  # fmt: skip
    races = json.loads(done.stdout.splitlines()[-1])["races"]
    kinds = [re.search(r"-(q\w+)-", race["model"]) for race in races]
    assert [(k and k[1], race["threads"]) for k, race in zip(kinds, races, strict=True)] == [
        ("q8_0", 1), ("q8_0", 2), ("q4_0", 1), ("q4_0", 2),
    ]  # fmt: skip
    assert all(set(race["ratios"]) == {"exact"} for race in races)
    assert done.stdout.count("1 threads, ") == done.stdout.count("2 threads, ") == 2
    assert done.stdout.count("kernels: ") == 2  # a table for each file


def test_a_race_ends_in_time_with_what_it_has(tiny_gguf: Path, tmp_path: Path) -> None:
    options = ("--rounds", "1000", "--tokens", "2", "--ffn", "exact", "--minutes", "0.0001")
    (result,) = last_line("decode", str(tiny_gguf), *options, cache=tmp_path)["races"]
    assert (result["rounds"], result["cut_short"]) == (1, OUT_OF_TIME)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and asks the page cache")
def test_one_model_at_a_time_is_in_memory(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids: dict[str, int] = {}
    asked: list[tuple[tuple[str, str], list[str]]] = []  # requests, and who has a model mapped after each
    dropped: list[str] = []
    init, ask = ContenderProcess.__init__, ContenderProcess.ask

    def ask_and_look(worker: ContenderProcess, do: str, **arguments: Any) -> Any:
        reply = ask(worker, do, **arguments)
        mapped = [kind for kind, pid in pids.items() if ".gguf" in Path(f"/proc/{pid}/maps").read_text()]
        asked.append(((worker.kind, do), mapped))
        return reply

    def made(worker: ContenderProcess, spec: Spec) -> None:
        init(worker, spec)
        pids[worker.kind] = worker._process.pid

    monkeypatch.setattr(ContenderProcess, "__init__", made)
    monkeypatch.setattr(ContenderProcess, "ask", ask_and_look)
    monkeypatch.setattr(race_module, "drop_cached", lambda path: dropped.append(path.name) or drop_cached(path))
    plan = RacePlan(tokens=2, rounds=2, modes=("exact", "dense"), alone=True)
    with set_up(tiny_gguf, None, 1, plan.tokens) as setup:
        result = race_module.race(setup, plan, lambda _: None)
    turn = ("open", "decode", "decode", "memory", "close")
    turns = [(kind, do) for kind in (LLAMA_CPP, "dense", "exact") for do in turn]
    assert [request for request, _ in asked] == [*turns, ("bandwidth", "measure")] * 2
    for (kind, do), mapped in asked:
        assert mapped == ([] if do in ("close", "measure") else [kind])
    assert dropped == [tiny_gguf.name, "stock.gguf", "stock.gguf"] * 2
    assert (result["alone"], result["rounds"], result["cut_short"]) == (True, 2, None)
    assert set(result["ratios"]) == {"dense", "exact"}


def test_a_race_warns_of_models_that_do_not_fit_together(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with set_up(tiny_gguf, tiny_gguf, 1, 1) as setup:
        for left in (3 * tiny_gguf.stat().st_size, 3 * tiny_gguf.stat().st_size - 1):
            assert not said
            monkeypatch.setattr(race_module, "memory_left", lambda left=left: left)
            race_module.warn_if_crowded(setup, said.append)
    assert "--alone" in said[0]


@pytest.mark.skipif(sys.platform == "win32", reason="sends an interrupt to one process")
def test_an_interrupted_race_shows_the_rounds_that_have_ended(tiny_gguf: Path, tmp_path: Path) -> None:
    options = ("--rounds", "1000", "--tokens", "2", "--threads", "1,2", "--ffn", "exact")
    with subprocess.Popen(
        [sys.executable, "-m", "bench.decode", str(tiny_gguf), *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "LAZYNEURON_CACHE": str(tmp_path)},
    ) as process:  # fmt: skip
        assert process.stderr and process.stdout
        while "round 3 of" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        shown, complaints = process.communicate(timeout=120)
    assert process.returncode == 130, complaints
    assert "Traceback" not in complaints
    (result,) = json.loads(shown.splitlines()[-1])["races"]
    assert result["threads"] == 1
    assert result["cut_short"] == "interrupted"
    assert 2 <= result["rounds"] < 1000
    assert f"interrupted after {result['rounds']} rounds" in shown


def test_every_mode_of_a_file_takes_part(models: dict[str, Path], tiny_gguf: Path) -> None:
    with set_up(models["gated"], models["gated.stock"], 1, 4) as setup:
        assert set(setup.modes()) == set(FFN_MODES)
        assert setup.modes(("exact", "dense")) == ["dense", "exact"]
    assert in_order(["new", "predicted", "dense"]) == ["dense", "predicted", "new"]
    assert type(make(Spec("exact", "never.gguf", 1, 64))) is Ours


def test_a_mode_that_guesses_writes_its_own_text(models: dict[str, Path]) -> None:
    """As `generate` does, and on behind an end: measured with a mode whose text is known."""
    prompt = random_ids(512, 16)
    with runtime.load(models["gated"], ffn="exact", threads=1, n_ctx=64) as model:
        generation = model.generate(prompt, max_tokens=9, sampling=Sampling(temperature=0))
        list(generation)
        wanted, size = generation.token_ids, generation.stats.bytes_per_token
    assert len(wanted) == 9, "a text that ends early proves nothing"
    writing = Writing(Spec("exact", str(models["gated"]), 1, 64))
    writing.open()
    try:
        tokens, seconds = timed_decode(writing, prompt, [0] * 8)
        found = writing._generation
        facts = writing.facts()
    finally:
        writing.close()
    assert (tokens, found.token_ids) == (8, wanted)
    assert seconds > 0
    assert facts["bytes_per_token"] == pytest.approx(size)
    assert len(facts["fired"]) == 4


def test_every_contender_decodes_beside_busy_programs_too(tiny_gguf: Path, tmp_path: Path) -> None:
    options = ("--rounds", "1", "--tokens", "3", "--threads", "2", "--busy", "1", "--ffn", "exact")
    done = subprocess.run(
        [sys.executable, "-m", "bench.decode", str(tiny_gguf), *options],
        capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "LAZYNEURON_CACHE": str(tmp_path)},
    )  # fmt: skip
    (result,) = json.loads(done.stdout.splitlines()[-1])["races"]
    kinds = [LLAMA_CPP, "exact"]  # one of each class of contenders that this file allows
    assert result["busy_programs"] == 1
    for kind in kinds:
        beside = result[kind]["busy"]
        assert 0 < beside["min"] <= beside["tokens_per_s"] <= beside["max"]
        assert beside["share_of_idle"] == pytest.approx(beside["tokens_per_s"] / result[kind]["tokens_per_s"])
    shown = " ".join(done.stdout.split())
    assert all(part in shown for part in (result["cpu"], result["date"], f"kernels: {result['kernels']}", "of idle"))
    rounds = [line for line in done.stderr.splitlines() if line.startswith("  tokens/s (beside 1 busy programs)")]
    assert len(rounds) == 1
    assert all(f"{kind} " in line and line.count("(") == 1 + len(kinds) for kind in kinds for line in rounds)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_busy_programs_compute_and_end() -> None:
    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())

    before = children()
    with machine.busy(2):
        started = children() - before
        assert len(started) == 2
        deadline = time.monotonic() + 60
        while min(map(ticks, started)) < 10:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert not started & children()


def ticks(process: str) -> int:
    """Processor time that a process has had."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_cpu_is_described_as_the_system_does() -> None:
    x86 = "processor\t: 0\nmodel name\t: AMD EPYC 7B13\nflags\t\t: fpu avx2 fma avx512ifma\nvmx flags\t: avx_vnni\n"
    assert machine.parse(x86) == {"cpu": "AMD EPYC 7B13", "instruction_sets": ["fma", "avx2"]}
    arm = machine.parse("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n")
    assert arm["instruction_sets"] == ["asimd", "asimddp", "i8mm"]
    assert machine.parse("")["instruction_sets"] == []


def test_a_contender_ends_when_its_time_is_over() -> None:
    class Slow:
        def __init__(self) -> None:
            self.computed: list[int] = []

        def start(self, ids: list[int]) -> None:
            self.computed = list(ids)

        def step(self, token: int) -> None:
            self.computed.append(token)
            time.sleep(0.02)

    slow: Any = Slow()
    tokens, seconds = timed_decode(slow, [1], list(range(1000)), limit_s=0.05)
    assert 1 <= tokens <= 3
    assert seconds >= 0.05
    assert slow.computed == [1, *range(tokens)]
    assert timed_decode(slow, [1], [7, 8], warm_up=[5])[0] == 2
    assert slow.computed == [1, 5, 7, 8]


def test_llama_cpp_waits_as_it_does_by_itself() -> None:
    """Its OpenMP is loaded before ours could set anything, as GNU's own line shows."""
    plain = {name: v for name, v in os.environ.items() if name not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    found = {}
    for kind in (LLAMA_CPP, "exact"):
        spec = json.dumps(dataclasses.asdict(Spec(kind, "never.gguf", 2, 64)))
        done = subprocess.run(
            [sys.executable, "-m", "bench.contender_process", spec], capture_output=True, text=True, check=False,
            cwd=ROOT, input="", env={**plain, "OMP_DISPLAY_ENV": "VERBOSE"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found[kind] = re.findall(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)
    if not found["exact"]:
        pytest.skip("ggml was not built with GNU's OpenMP")
    assert found[LLAMA_CPP] != found["exact"] == [waiting.TURNS]


def test_a_race_takes_a_real_model(tiny_gguf: Path, tmp_path: Path) -> None:
    (result,) = last_line("decode", str(tiny_gguf), "--rounds", "1", "--tokens", "2", cache=tmp_path)["races"]
    assert not result["synthetic"]
    assert {"llama_cpp", "dense", "exact"} <= set(result)


def test_without_a_gpu_nothing_is_claimed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.hybrid", "--shape", "tiny"], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1", "VK_DRIVER_FILES": os.devnull},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "no GPU" in done.stderr


@pytest.mark.parametrize(("name", "kind"), [("tiny", "q4_0"), ("tiny", "f16"), ("tiny-opt", "q8_0")])
def test_kernels_compute_what_was_planted(name: str, kind: str) -> None:
    case = Case(shape(name), kind, 0.25, threads=2, copies=2)
    found = kernels.measure(case, rounds=1)
    assert found["fired"] == {"exact": 0.25, "listed": 0.25}
    result = kernels.figures(case, found, 1e9, name)
    assert {"plain", "exact", "listed", "predictor"} <= set(result)
    assert result["listed"]["bytes"] < result["exact"]["bytes"] < result["plain"]["bytes"]


def test_firing_has_the_wanted_mean_and_closed_forms() -> None:
    firing = plan_firing(4096, 0.1)
    assert firing.frequencies.mean() == pytest.approx(0.1, rel=0.01)
    assert (np.diff(firing.frequencies) <= 0).all()
    drawn = np.maximum(np.random.default_rng(0).normal(size=(4000, 1)) + firing.means[::512], 0)
    assert drawn.mean(0) == pytest.approx(firing.outputs[::512], abs=0.05)
    assert (drawn**2).mean(0) == pytest.approx(firing.energies[::512], abs=0.15)


def test_row_and_column_pools_hold_one_matrix() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2 * GROUP, 64), np.float32)
    groups = choose_groups(rng, len(rows), 3 * GROUP)
    expected = rows[row_ids(groups, 3 * GROUP)]
    by_row = np.concatenate(list(RowPool(rows, "f32").pieces(groups, 3 * GROUP)))
    by_column = np.concatenate(list(ColumnPool(rows, "f32").pieces(groups)))
    assert np.array_equal(decode(by_row, "f32", 64), expected)
    assert np.array_equal(decode(by_column, "f32", 3 * GROUP), expected.T)
    headed = np.concatenate(list(RowPool(rows, "f32").pieces(groups, 300, zeros=32)))
    assert np.array_equal(decode(headed, "f32", 64), np.concatenate([np.zeros((32, 64)), expected[:268]]))


def test_mistakes_are_reported() -> None:
    for plan, found in (
        ({"programs": -1}, "--busy -1"),
        ({"rounds": 0}, "--rounds"),
        ({"modes": ("x",)}, "--ffn: `x`"),
    ):
        with pytest.raises(UserError, match=found):
            RacePlan(**plan)  # type: ignore[arg-type]
    for recipe in (Recipe("tiny", 0.0), Recipe("tiny", 1.5), Recipe("tiny", type="q4_k"), Recipe("tiny", layers=0)):
        with pytest.raises(UserError):
            write_model(recipe, Path("never.gguf"))
    with pytest.raises(UserError, match="expected a type"):
        kernels.measure(Case(shape("tiny"), "i32", 0.1, threads=1), rounds=1)


def test_batches_find_where_whole_matrices_pay() -> None:
    found = batches.measure(Case(shape("tiny"), "q4_0", 0.25, threads=2, copies=1), tokens=8)
    assert {"plain", "exact", "predicted"} <= set(found)
    assert all(ms > 0 for ms in found.values())
    even = {"plain": 1.0, "repacked": 0.5, "exact": 2.0, "active": 1.0}
    assert batches.limits([even], n_matrices=3) == [0.25]


def test_predictors_are_compared(models: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    shutil.copy(models["gated"], model)
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "examples/heldout.txt").read_text()[:30_000])
    kinds = ["lowrank", "signbit"]
    rows = list(predictors.measure(model, text, kinds, ["auto"], [0.9, 1.0], 1024, text, 4096))
    assert [(row["kind"], row["energy"]) for row in rows] == [
        (k, e) for k in ("lowrank", "signbit") for e in (0.9, 1.0)
    ]
    for row in rows[1::2]:
        assert set(row["ranks"]) == {0}
        assert (row["recall"], row["bytes"]) == (1.0, row["bytes_exact"])
    assert any(rows[0]["ranks"]) and rows[0]["recall"] < 1 and rows[0]["bytes"] < rows[0]["bytes_exact"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "text.txt"]


def test_converting_counts_the_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYNEURON_CACHE", str(tmp_path))
    found = converting.measure(layers=2, type_name="q4_0", tokens=512, width=256, neurons=1024)
    assert 0 < found["plain"]["core_s"] < found["calibrated"]["core_s"]
    assert found["per_layer_s"] * 2 == pytest.approx(found["calibrated"]["core_s"] - found["plain"]["core_s"])
    checkpoint = Path(found["checkpoint"])
    assert list((tmp_path / "bench").iterdir()) == [checkpoint]  # what was converted is gone


@pytest.mark.skipif("avx2" not in variants(), reason="this CPU has no AVX2")
def test_a_race_as_if_there_were_nothing_newer_than_avx2(tiny_gguf: Path, tmp_path: Path) -> None:
    """With the libraries that are kept, whatever they are: none are compiled here."""
    release, platform = "llama-cpp-python==0.0.0", sysconfig.get_platform()
    kept = tmp_path / f"{release.replace('==', '-')}-avx2-{platform}"
    kept.symlink_to(library_folder())
    done = subprocess.run(
        ["bash", "bench/avx2.sh", "bench.decode", str(tiny_gguf), "--ffn", "exact", "--rounds", "1", "--tokens", "2"],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "LAZYNEURON_CACHE": str(tmp_path), "PYTHON": sys.executable, "LLAMA_CPP": release},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout.splitlines()[-1])["races"]
    assert result["kernels"] == "avx2"
