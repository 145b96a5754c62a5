"""Sharing: what is pushed comes back byte for byte, with a card that says what was measured and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import copy_checkpoint
from gguf import GGUFReader
from hub_client import Client
from hub_server import TOKEN, Hub
from huggingface_hub import ModelCard

import runtime
from convert import convert
from convert.__main__ import main as convert_main
from convert.publish.card import CardOptions, examine, make_card
from convert.publish.card_text import MARK, FileEntry
from runtime.model_file.reader import GgufFile

Converted = Callable[..., Path]
HELDOUT = Path(__file__).parent.parent / "examples/heldout.txt"


@pytest.fixture
def small(converted: Converted, tmp_path: Path) -> Path:
    return Path(shutil.copy(converted("llama-gqa", "q8_0"), tmp_path / "tiny-q8_0.gguf"))


def files_of(hub: Hub, repo: str = "user/repo", branch: str = "main") -> dict[str, bytes]:
    found = hub.repos[repo]
    return found.commits[found.branches[branch]]


def push(run: Client, *arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("convert", "push", *arguments, "--json", HF_TOKEN=TOKEN).out)
    return found


# --- pushing ---------------------------------------------------------------------------------------------------------


def test_what_was_pushed_comes_back(hub: Hub, run: Client, fitted_gguf: Path, tmp_path: Path) -> None:
    report = push(run, fitted_gguf, "user/repo")
    oid = hashlib.sha256(fitted_gguf.read_bytes()).hexdigest()
    name = fitted_gguf.name
    assert report["files"] == [{"name": name, "size": fitted_gguf.stat().st_size, "sha256": oid}]
    assert report["commit"] == hub.repos["user/repo"].branches["main"]
    assert set(files_of(hub)) == {".gitattributes", name, "README.md", "sparsity.png"}
    assert files_of(hub)["sparsity.png"].startswith(b"\x89PNG")
    assert f"python -m runtime chat {report['model']}" in files_of(hub)["README.md"].decode()

    other = Client(hub, tmp_path / "another home")
    words = ("-p", "We", "-n", "4", "--temp", "0")
    shown, theirs, ours = other.many(
        ("runtime", "inspect", report["model"], "--json"),
        ("runtime", "chat", report["model"], *words),
        ("runtime", "chat", fitted_gguf, *words),
    )
    assert Path(json.loads(shown.out)["path"]).read_bytes() == fitted_gguf.read_bytes()
    assert theirs.out == ours.out != ""


def test_nothing_is_sent_twice_and_the_token_to_nobody_else(hub: Hub, run: Client, small: Path) -> None:
    push(run, small, "user/repo", "--private", "--no-plot")
    assert hub.repos["user/repo"].private
    assert hub.storage.received == small.stat().st_size
    before = dict(hub.repos["user/repo"].branches)
    again = [("convert", "push", small, repo, "--no-plot") for repo in ("user/repo", "user/other")]
    assert [done.returncode for done in run.many(*again, HF_TOKEN=TOKEN)] == [0, 0]
    assert hub.repos["user/repo"].branches == before
    assert small.name in files_of(hub, "user/other")  # the storage had the file already
    assert hub.storage.received == small.stat().st_size
    assert not [r for r in hub.storage.requests if TOKEN in str(r.headers) or TOKEN in r.path]


def test_three_dropped_uploads(hub: Hub, run: Client, small: Path) -> None:
    hub.storage.drops, hub.storage.drop_after = 3, 50_000
    shards = push(run, small, "user/repo", "--split-max-size", "150K", "--no-plot")["files"]
    assert len(shards) == 3
    assert len(hub.storage.seen("PUT")) == 6
    assert hub.storage.received == sum(shard["size"] for shard in shards) + 150_000
    found = {name: hashlib.sha256(data).hexdigest() for name, data in files_of(hub).items()}
    assert {shard["name"]: shard["sha256"] for shard in shards}.items() <= found.items()
    assert not list(small.parent.glob(".tiny*"))


def test_a_push_that_failed_goes_on(hub: Hub, run: Client, small: Path) -> None:
    """The files that arrived are not sent again, and until all have arrived the repository shows none."""
    hub.storage.room = 2
    arguments = (small, "user/repo", "--split-max-size", "150K", "--no-plot")
    assert "the Hub answered 507" in run("convert", "push", *arguments, HF_TOKEN=TOKEN).complaint
    assert set(files_of(hub)) == {".gitattributes"}
    assert not list(small.parent.glob(".tiny*"))
    hub.storage.room = 1
    hub.storage.requests.clear()
    assert len(push(run, *arguments)["files"]) == 3
    assert len(hub.storage.seen("PUT")) == 1


def test_shards_come_back_as_one_model(hub: Hub, run: Client, small: Path, tmp_path: Path) -> None:
    push(run, small, "user/repo", "--split-max-size", "150K")
    report = json.loads(run("runtime", "inspect", "user/repo", "--json").out)
    first = Path(report["path"])
    assert re.fullmatch(r"tiny-q8_0-00001-of-0000\d\.gguf", first.name)
    ids = list(range(5, 40))
    with runtime.load(small, threads=2) as whole, runtime.load(first, threads=2) as split:
        assert np.array_equal(whole.logits(ids), split.logits(ids))

    push(run, first, "user/again")  # shards are pushed as they are
    again = {name: data for name, data in files_of(hub, "user/again").items() if name.endswith(".gguf")}
    assert again == {name: data for name, data in files_of(hub).items() if name.endswith(".gguf")}

    push(run, small, "user/repo")  # replaces its own shards
    assert [name for name in files_of(hub) if name.endswith(".gguf")] == ["tiny-q8_0.gguf"]


def test_two_models_in_one_repository(hub: Hub, run: Client, small: Path, converted: Converted) -> None:
    other = converted("llama-gqa", "f16")
    push(run, other, "user/repo")
    assert push(run, small, "user/repo")["model"] == "user/repo:tiny-q8_0.gguf"
    card = files_of(hub)["README.md"].decode()
    for path in (small, other):
        assert f"| {path.name} | {path.stat().st_size:,} | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |" in card
    assert "python -m runtime chat user/repo:tiny-q8_0.gguf\n" in card


def test_branches(hub: Hub, run: Client, small: Path) -> None:
    hub.add("user/repo", {"README.md": b"kept"})
    assert push(run, small, "user/repo", "--revision", "v2")["model"] == "user/repo@v2"
    assert small.name in files_of(hub, branch="v2")
    assert small.name not in files_of(hub)


def test_a_card_changed_by_hand_is_kept(hub: Hub, run: Client, small: Path) -> None:
    hub.add("user/repo", {"README.md": b"My own words."})
    done = run("convert", "push", small, "user/repo", HF_TOKEN=TOKEN)
    assert done.returncode == 0
    assert "has a card of its own, which is kept" in done.stderr
    assert files_of(hub)["README.md"] == b"My own words."
    push(run, small, "user/repo", "--replace-card")
    assert MARK in files_of(hub)["README.md"].decode()


def test_refused_pushes(hub: Hub, run: Client, small: Path) -> None:
    hub.add("user/public", {})
    expected = {
        ("user/public", "--private"): "exists and is public, expected a private one",
        ("repo",): "`repo`: expected a name on the Hub such as user/repo",
        ("user/repo@main",): "expected a name on the Hub",
        ("user/repo", "--split-max-size", "1K"): "--split-max-size 1,000 bytes, expected at least",
        ("user/repo", "--perplexity", str(small)): "expected UTF-8 text",
    }
    found = run.many(*(("convert", "push", small, *arguments) for arguments in expected), HF_TOKEN=TOKEN)
    for done, complaint in zip(found, expected.values(), strict=True):
        assert complaint in done.stderr
        assert done.returncode == 1
    push_it = ("convert", "push", small, "user/repo")
    assert "`user/repo`: the Hub answered 401" in run(*push_it, HF_TOKEN="wrong").complaint
    assert "the Hub cannot be reached" in run(*push_it, HF_ENDPOINT="http://127.0.0.1:9").complaint
    assert not hub.storage.received
    assert "user/repo" not in hub.repos


# --- the card --------------------------------------------------------------------------------------------------------


def card_of(path: Path, **options: Any) -> ModelCard:
    with GgufFile(path) as file:
        return ModelCard(
            make_card(
                file, "user/repo", [FileEntry("m.gguf", 1, "0" * 64)], examine(file, CardOptions(plot=False, **options))
            )
        )


def test_licence_and_base_model_are_carried_over(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_checkpoint(checkpoint("llama-gqa"), tmp_path / "checkpoint")
    front = "license: other\nlicense_name: own-1.0\nlicense_link: https://example.org/own\nlanguage: [en, de]\nbase_model:\n- org/base"
    (folder / "README.md").write_text(f"---\n{front}\n---\nA card.\n")
    convert(folder, tmp_path / "m.gguf", calibration="none")
    data = card_of(tmp_path / "m.gguf").data.to_dict()
    assert {key: data[key] for key in ("license", "license_name", "license_link", "language", "base_model")} == {
        "license": "other", "license_name": "own-1.0", "license_link": "https://example.org/own", "language": ["en", "de"], "base_model": "org/base",
    }  # fmt: skip
    assert data["base_model_relation"] == "quantized"
    assert set(data["tags"]) >= {"gguf", "activation-sparsity", "relu"}
    assert (data["library_name"], data["pipeline_tag"]) == ("lazyneuron", "text-generation")


def test_what_is_not_known_is_absent(small: Path) -> None:
    card = card_of(small)
    for word in ("erplexity", "Sparsity", "recall", "%", "None", "nan", "![", "license:"):
        assert word not in str(card), word
    assert "does not state" in card.text


def test_figures_are_those_of_the_file(fitted_gguf: Path) -> None:
    fields = GGUFReader(fitted_gguf).fields
    stored = {
        key: fields[f"lazyneuron.predictor.{key}"].contents()
        for key in ("predicted_share", "recall", "precision", "rank", "type")
    }
    tensors = {t.name: t.data for t in GGUFReader(fitted_gguf).tensors}
    text = card_of(fitted_gguf).text
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if re.match(r"\| \d+ \|", line)
    ]
    assert len(rows) == 6
    for i, row in enumerate(rows):
        assert row[:2] == [str(i), f"{float(np.mean(tensors[f'blk.{i}.ffn_neuron_freq'], dtype=np.float64)):.1%}"]
        expected = [f"{stored[key][i]:.1%}" for key in ("predicted_share", "recall", "precision")]
        assert (
            row[3:7] == [f"{stored['type'][i]} rank {stored['rank'][i]}", *expected]
            if stored["rank"][i]
            else ["none", "", "", ""]
        )
    assert "`lowrank`" in text


def test_perplexity_is_measured(fitted_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from runtime.__main__ import main

    text = card_of(fitted_gguf, perplexity=HELDOUT, perplexity_tokens=200).text
    assert f"sha256 `{hashlib.sha256(HELDOUT.read_bytes()).hexdigest()}`" in text
    for mode in ("dense", "exact", "predicted"):
        assert main(["perplexity", str(fitted_gguf), str(HELDOUT), "--tokens", "200", "--ffn", mode, "--json"]) == 0
        found = json.loads(capfd.readouterr().out)
        assert f"| {mode} | {found['perplexity']:.4f} ± {found['perplexity_error']:.4f} |" in text
    assert "python -m runtime perplexity user/repo heldout.txt --ffn exact --tokens 200" in text


def test_the_card_alone(hub: Hub, run: Client, fitted_gguf: Path, tmp_path: Path) -> None:
    out, command = tmp_path / "card", ("convert", "card", fitted_gguf)
    written, again, printed = run.many((*command, "-o", out), (*command, "-o", out), (*command, "--repo", "user/repo"))
    assert written.out == ""
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "sparsity.png"]
    assert "exists already" in again.complaint
    (facts,) = run.many((*command, "-o", out, "--force", "--no-plot", "--json"))
    assert json.loads(facts.out) == {
        "card": (out / "README.md").read_text(),
        "path": str(out / "README.md"),
        "plot": None,
        "perplexity": None,
    }
    assert "python -m runtime chat user/repo\n" in printed.out
    assert "sparsity.png" not in printed.out
    # Validated as huggingface_hub does it, by the Hub's answer.
    code = f"from huggingface_hub import ModelCard\nModelCard.load({str(out / 'README.md')!r}).validate()\n"
    (tmp_path / "script.py").write_text(code)
    assert run("script", cwd=tmp_path).out == ""
    assert hub.seen("POST", "/api/validate-yaml")


def test_a_plot_without_matplotlib(
    fitted_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # what import takes for missing
    command = ["card", str(fitted_gguf), "-o", str(tmp_path / "card")]
    assert convert_main(command) == 1
    assert "plots need matplotlib\nhint: pip install 'lazyneuron[plot]'" in capfd.readouterr().err
    assert not (tmp_path / "card").exists()
    assert convert_main([*command, "--no-plot"]) == 0


def test_verbs_are_reserved(
    tmp_path: Path,
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(checkpoint("llama-gqa"), tmp_path / "push")
    monkeypatch.chdir(tmp_path)
    assert convert_main(["push", "out.gguf", "--dry-run"]) == 1
    assert "push --help lists the options" in capfd.readouterr().err
    assert convert_main(["./push", "--dry-run"]) == 0
