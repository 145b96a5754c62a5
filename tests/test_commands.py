"""`python -m runtime` as a user meets it, on the converted bundled checkpoint."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from in_process import Done, command, result_of

import runtime
from runtime.analysis.contents import kind_of
from runtime.analysis.likelihood import token_losses
from runtime.analysis.perplexity import Windows
from runtime.model_file.reader import GgufFile

ROOT = Path(__file__).parent.parent
PROMPT = "My fellow citizens,"
TEXT = (ROOT / "examples/tiny-relu-llama/README.md").read_text(encoding="utf-8")


run = partial(command, "runtime")
run_json = partial(result_of, "runtime")


def run_alone(module: str, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """In a process of its own, through its pipes."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT, input=stdin, capture_output=True, encoding="utf-8", timeout=600, check=False,
    )  # fmt: skip


def test_alone_it_says_what_to_type_first() -> None:
    done = run()
    assert done.returncode == 0
    assert done.stderr == ""
    assert "python -m runtime chat MODEL.gguf" in done.stdout
    for verb in ("chat", "complete", "inspect", "perplexity"):
        assert f"\n    {verb} " in done.stdout


def test_a_process_of_its_own_prints_and_fails_alike(tiny_gguf: Path, tmp_path: Path) -> None:
    """What every other test here takes for granted."""
    for words, stdin in (
        (("complete", tiny_gguf, "--temp", 0, "-n", 12), PROMPT),
        (("inspect", tiny_gguf, "--tensors"), ""),
        (("inspect", tmp_path / "missing.gguf"), ""),
        (("plan", "--help"), ""),
        (("plan",), ""),
    ):
        alone, found = run_alone("runtime", *words, stdin=stdin), run(*words, stdin=stdin)
        assert (alone.returncode, alone.stdout, alone.stderr) == (found.returncode, found.stdout, found.stderr)


@pytest.mark.parametrize("verb", ["chat", "complete", "inspect", "perplexity"])
def test_every_command_explains_itself(verb: str) -> None:
    done = run(verb, "--help")
    assert done.returncode == 0
    assert "MODEL" in done.stdout
    assert "--json" in done.stdout


# --- complete ---------------------------------------------------------------------------------------------------------


def test_complete_prints_what_the_library_generates(tiny_gguf: Path) -> None:
    with runtime.load(tiny_gguf, threads=1) as model:
        sampling = runtime.Sampling(temperature=0.9, top_k=20, repeat_penalty=1.2, seed=5)
        generation = model.generate(PROMPT, max_tokens=24, sampling=sampling)
        expected = "".join(generation)
    knobs = ("--temp", 0.9, "--top-k", 20, "--repeat-penalty", 1.2, "--seed", 5, "-n", 24, "--threads", 1)
    done = run("complete", tiny_gguf, "-p", PROMPT, *knobs)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected.removesuffix("\n") + "\n", "")
    result = run_json("complete", tiny_gguf, "-p", PROMPT, *knobs)
    assert result["text"] == expected
    assert result["tokens"] == len(generation.token_ids) == 24
    assert (result["seed"], result["ffn"], result["stop_reason"], result["threads"]) == (5, "exact", "length", 1)
    assert result["prompt_tokens"] == generation.stats.prompt_tokens
    assert result["tokens_per_s"] > 0
    assert 0 < result["computed_share"] < 0.5
    assert 0 < result["bytes_per_token"] < tiny_gguf.stat().st_size


def test_complete_json_is_all_of_stdout(tiny_gguf: Path) -> None:
    done = run("complete", tiny_gguf, "-p", PROMPT, "-n", 4, "--json")
    assert len(done.stdout.splitlines()) == 1


def test_complete_takes_its_prompt_from_three_places(tiny_gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    greedy = ("complete", tiny_gguf, "--temp", 0, "-n", 12)
    texts = [
        run_json(*greedy, "-p", PROMPT)["text"],
        run_json(*greedy, "--prompt-file", file)["text"],
        run_json(*greedy, stdin=PROMPT + "\n")["text"],
    ]
    assert texts[0] == texts[1] == texts[2] != ""


def test_dense_computes_every_neuron(tiny_gguf: Path) -> None:
    result = run_json("complete", tiny_gguf, "-p", PROMPT, "-n", 4, "--ffn", "dense", "--kv-type", "f32", "-c", 64)
    assert (result["ffn"], result["computed_share"], result["kv_type"], result["n_ctx"]) == ("dense", 1.0, "f32", 64)


def test_a_full_context_ends_the_text(tiny_gguf: Path) -> None:
    result = run_json("complete", tiny_gguf, "-p", PROMPT, "-n", 500, "-c", 32)
    assert result["stop_reason"] == "context"
    assert result["prompt_tokens"] + result["tokens"] == 32


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_adds_up(tiny_gguf: Path) -> None:
    report = run_json("inspect", tiny_gguf, "--tensors")
    with GgufFile(tiny_gguf) as file:
        assert {t["name"] for t in report["tensors"]} == set(file.tensors)
        assert sum(g["bytes"] for g in report["groups"]) == sum(t.nbytes for t in file.tensors.values())
    assert sum(g["tensors"] for g in report["groups"]) == len(report["tensors"])
    sizes = {g["kind"]: g["bytes"] for g in report["groups"]}
    traffic = report["bytes_per_token"]
    assert traffic["dense"] == traffic["exact_all"]
    assert traffic["exact_all"] - traffic["exact_none"] == sizes["ffn_up"] + sizes["ffn_down_t"]
    assert report["sparsity"] == {"calibrated": False, "layer_shares": None, "share": None}
    assert traffic["exact_calibrated"] is None
    tokenizer = report["tokenizer"]
    assert (tokenizer["tokens"], tokenizer["add_bos"], tokenizer["bos"]) == (4096, True, {"id": 1, "text": "<s>"})
    assert report["structure"]["feed_forward_length"] == 1024
    assert report["bytes"] == tiny_gguf.stat().st_size


def test_inspect_for_people(tiny_gguf: Path) -> None:
    done = run("inspect", tiny_gguf)
    assert done.returncode == 0
    for fact in ("LlamaForCausalLM", "ffn_down_t", "17.15 MB", "not calibrated", "exact, if none fired", "1 '<s>'"):
        assert fact in done.stdout
    assert "\x1b" not in done.stdout
    assert "blk.5.ffn_down_t.weight" in run("inspect", tiny_gguf, "--tensors").stdout


def test_inspect_reads_calibrated_frequencies(tiny_gguf: Path, tmp_path: Path) -> None:
    shares = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.75]
    extra = {f"blk.{i}.ffn_neuron_freq": np.full(1024, share, np.float32) for i, share in enumerate(shares)}
    calibrated = with_tensors(tiny_gguf, tmp_path / "calibrated.gguf", extra)
    report = run_json("inspect", calibrated)
    assert report["sparsity"] == {"calibrated": True, "layer_shares": shares, "share": pytest.approx(np.mean(shares))}
    traffic = report["bytes_per_token"]
    span = traffic["exact_all"] - traffic["exact_none"]
    assert traffic["exact_calibrated"] == pytest.approx(traffic["exact_none"] + span * np.mean(shares))
    shown = run("inspect", calibrated).stdout
    assert "6.2%" in shown
    assert "little to gain" not in shown


@pytest.mark.parametrize(("share", "told"), [(0.49, False), (0.5, True), (0.7, True), (1.0, True)])
def test_inspect_says_where_little_is_to_be_gained(tiny_gguf: Path, tmp_path: Path, share: float, told: bool) -> None:
    extra = {f"blk.{i}.ffn_neuron_freq": np.full(1024, share, np.float32) for i in range(6)}
    shown = run("inspect", with_tensors(tiny_gguf, tmp_path / "calibrated.gguf", extra)).stdout
    assert (f"little to gain: {share:.0%} of the neurons fire" in shown) == told


def with_tensors(source: Path, target: Path, extra: dict[str, Any]) -> Path:
    """A copy of a GGUF file with more tensors."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "lazyneuron")
    writer.add_custom_alignment(reader.alignment)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.alignment"):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, values in extra.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("token_embd.weight", "embeddings"),
        ("position_embd.weight", "embeddings"),
        ("output.weight", "output"),
        ("output_norm.weight", "norms"),
        ("blk.3.attn_norm.bias", "norms"),
        ("blk.3.attn_output.weight", "attention"),
        ("blk.3.ffn_norm.weight", "norms"),
        ("blk.3.ffn_down.bias", "ffn_down"),
        ("blk.13.ffn_down_t.weight", "ffn_down_t"),
        ("blk.0.ffn_neuron_freq", "neurons"),
        ("blk.0.predictor_in.weight", "predictor"),
        ("rope_freqs.weight", "other"),
    ],
)
def test_tensor_groups(name: str, kind: str) -> None:
    assert kind_of(name) == kind


# --- perplexity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [(), (1,)])
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 7), (8, 1), (3, 2), (40, 20)])
@pytest.mark.parametrize("n", [2, 3, 7, 8, 9, 30, 31])
def test_windows_predict_every_token_once(bos: tuple[int, ...], window: int, stride: int, n: int) -> None:
    ids = list(range(100, 100 + n))
    predicted: list[int] = []
    for i, (seen, counted) in enumerate(Windows(ids, bos, window, stride)):
        assert len(seen) <= window
        assert tuple(seen[: len(bos)]) == bos
        text = seen[len(bos) :]
        assert text == ids[text[0] - 100 : text[0] - 100 + len(text)]
        if i:
            assert 0 < counted <= stride
            assert len(seen) - counted >= window - stride
        predicted += seen[-counted:]
    assert predicted == ids[1:]


def test_token_losses_are_those_of_a_softmax() -> None:
    logits = np.random.default_rng(0).normal(0, 10, (150, 33)).astype(np.float32) + 1000
    ids = np.random.default_rng(1).integers(0, 33, 150).tolist()
    p = np.exp(logits.astype(np.longdouble) - 1000)
    expected = -np.log(p[np.arange(150), ids] / p.sum(axis=1))
    np.testing.assert_allclose(token_losses(logits, ids), expected.astype(np.float64), rtol=1e-12)


def test_perplexity_is_that_of_the_models_logits(tiny_gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    window, stride, n = 64, 24, 150
    result = run_json("perplexity", tiny_gguf, file, "--window", window, "--stride", stride, "--tokens", n)
    with runtime.load(tiny_gguf) as model:
        ids = model.tokenize(TEXT, add_special=False)[:n]
        # Window k begins at k * stride, the last one ends with the text; a token counts in the first that holds it.
        starts = [min(k * stride, n - window + 1) for k in range(n)]
        logits = {start: model.logits([1, *ids[start : start + window - 1]]) for start in set(starts)}
    losses = []
    for i in range(1, n):
        start = next(s for s in starts if i < s + window - 1)
        row = logits[start][i - start].astype(np.float64)
        losses.append(math.log(np.exp(row).sum()) - row[ids[i]])
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
    assert (result["tokens"], result["window"], result["stride"], result["ffn"]) == (n - 1, window, stride, "exact")


def test_perplexity_of_dense_and_exact_agree(tiny_gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    exact, dense = (
        run_json("perplexity", tiny_gguf, file, "--tokens", 300, "--ffn", ffn) for ffn in ("exact", "dense")
    )
    assert (exact["ffn"], dense["ffn"]) == ("exact", "dense")
    assert (exact["window"], exact["stride"]) == (1024, 512)
    assert exact["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-3)


def test_perplexity_states_window_and_stride(tiny_gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    done = run("perplexity", tiny_gguf, file, "--tokens", 100, "-c", 50)
    assert done.stdout.startswith("perplexity ")
    assert "over 99 tokens (window 50, stride 25, exact, KV f16)" in done.stdout
    assert done.stderr == ""


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["chat", "complete", "inspect", "perplexity"])
@pytest.mark.parametrize(
    ("model", "message"),
    [("missing.gguf", "No such file"), ("text.gguf", "expected a GGUF file"), ("folder.gguf", "is a folder")],
)
def test_files_that_are_no_model(verb: str, model: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text(TEXT)
    (tmp_path / "folder.gguf").mkdir()
    file = [tmp_path / "text.gguf"] if verb == "perplexity" else []
    assert_one_line_error(run(verb, tmp_path / model, *file, stdin=PROMPT), model, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("complete", "MODEL", "-p", "x", "--n-ctx", "1025"), "n_ctx 1025, expected 1 to 1024"),
        (("chat", "MODEL", "--n-ctx", "0"), "n_ctx 0, expected 1 to 1024"),
        (("complete", "MODEL", "-p", "x", "--threads", "0"), "threads is 0"),
        (("complete", "MODEL", "-p", "x", "--temp", "-1"), "temperature is -1.0"),
        (("complete", "MODEL", "-p", "x", "--top-p", "nan"), "top_p is nan"),
        (("complete", "MODEL", "-p", "x", "-n", "0"), "--max-tokens/-n: 0"),
        (("complete", "MODEL", "-p", "x", "--ffn", "lazy"), "invalid choice: 'lazy'"),
        (("complete", "MODEL", "-p", "x", "-c", "1000", "--unknown"), "--unknown"),
        (("complete", "MODEL", "-p", "word " * 400, "-c", "64"), "fewer than the context of 64"),
        (("complete", "MODEL", "--prompt-file", "missing.txt"), "missing.txt"),
        (("complete", "MODEL", "--prompt-file", "MODEL"), "expected UTF-8"),
        (("complete",), "MODEL"),
        (("perplexity", "MODEL", "missing.txt"), "missing.txt"),
        (("perplexity", "MODEL", "FILE", "--window", "2000"), "window 2000"),
        (("perplexity", "MODEL", "FILE", "--window", "64", "--stride", "64"), "stride 64, expected 1 to 63"),
        (("perplexity", "MODEL", "FILE", "--tokens", "1"), "1 tokens"),
        (("prune", "MODEL"), "unknown command `prune`"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str, tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    names = {"MODEL": tiny_gguf, "FILE": tmp_path / "text.txt"}
    assert_one_line_error(run(*(names.get(a, a) for a in arguments)), message)


@pytest.mark.parametrize(
    ("arguments", "similar"),
    [
        (("runtime", "chatt", "MODEL"), "did you mean `chat`? "),
        (("runtime", "chat", "MODEL", "--tmp", "0"), "did you mean `--temp`? "),
        (("predictors", "eval"), "did you mean `evaluate`? "),
        (("predictors", "fit", "MODEL", "OUT", "--king", "mlp"), "did you mean `--kind`? "),
    ],
)
def test_what_was_meant_is_guessed(arguments: tuple[str, ...], similar: str) -> None:
    done = command(*arguments)
    assert_one_line_error(done)
    assert done.stderr.splitlines()[1].startswith(f"hint: {similar}")


@pytest.mark.parametrize("module", ["runtime", "convert", "predictors"])
def test_each_command_line_alone_says_what_to_type_first(module: str) -> None:
    done = run_alone(module)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"\n    python -m {module} " in done.stdout


def assert_one_line_error(done: Done, *messages: str) -> None:
    lines = done.stderr.splitlines()
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert lines[0].startswith("error: ")
    assert [line.startswith("hint: ") for line in lines[1:]] in ([], [True])
    for message in messages:
        assert message in lines[0]


def test_a_reader_that_leaves_is_no_error(tiny_gguf: Path) -> None:
    words = [sys.executable, "-m", "runtime", "inspect", str(tiny_gguf), "--tensors", "--json"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
