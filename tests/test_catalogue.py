"""The catalogue of known models: its rows, its names, and what it says in place of a config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import copy_checkpoint
from plain import PLAIN, convert

from convert.__main__ import main
from convert.arch import families, parse_ffn_type
from convert.catalogue import catalogue, named, recognise
from convert.config import Config
from runtime.errors import UserError

Folder = Callable[[str], Path]


@pytest.mark.parametrize("known", catalogue(), ids=lambda known: known.name)
def test_rows_agree_with_their_families(known: object) -> None:
    family = families()[known.family]  # type: ignore[attr-defined]
    ffn = known.ffn  # type: ignore[attr-defined]
    activation, _ = parse_ffn_type(known.ffn_type, "")  # type: ignore[attr-defined]
    assert set(ffn) <= {"activation", "gate", "threshold"}
    gate = family.keys["ffn_gate"]
    assert ffn["gate"] == (gate(Config("config.json", {})) if callable(gate) else gate)
    assert activation in family.activations.values() or activation == "drelu"
    assert known.status in ("tested", "family", "no tokenizer")  # type: ignore[attr-defined]
    assert bool(known.sparsity) == bool(known.sparsity_source)  # type: ignore[attr-defined]
    assert known.sparsity is None or 0 < known.sparsity < 1  # type: ignore[attr-defined]


def test_every_family_has_a_row_and_no_name_is_used_twice() -> None:
    names = [
        n.lower() for known in catalogue() for n in {known.name, *(a.rsplit("/")[-1].lower() for a in known.aliases)}
    ]
    assert len(set(names)) == len(names) >= 32
    # A family whose body no known checkpoint has: any one that is trained with it can be converted.
    assert {known.family for known in catalogue()} == set(families()) - {"mistral"}


def test_short_names() -> None:
    assert named("prosparse-llama-2-7b") == "SparseLLM/prosparse-llama-2-7b"
    assert named("Bamboo-base-v0.1") == "PowerInfer/Bamboo-base-v0_1"
    assert named("someone/else") == "someone/else"
    assert Path(named("tiny-relu-llama"), "config.json").exists()


def test_a_folder_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "opt-125m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert named("opt-125m") == "opt-125m"


def test_unknown_names_suggest_near_ones() -> None:
    with pytest.raises(UserError, match="`bamboo-base`: no such folder") as error:
        named("bamboo-base")
    assert error.value.hint == "the nearest names are bamboo-base-v0_1; python -m convert --list shows all"
    with pytest.raises(UserError) as error:
        named("qqqqqq")
    assert error.value.hint == "python -m convert --list shows all"


@pytest.mark.parametrize(
    ("repo", "folder", "found"),
    [
        ("SparseLLM/ProSparse-MiniCPM-1B-sft", "x", "minicpm-s-1b-sft"),
        ("tiiny/sparseqwen2-7b", "x", "sparseqwen2-7b"),
        ("someone/opt-125m", "x", None),
        ("", "somewhere/Bamboo-DPO-v0_1", "bamboo-dpo-v0_1"),
        ("", "hub/models--PowerInfer--SparseQwen2-7B/snapshots/0123", "sparseqwen2-7b"),
        ("", "hub/models--someone--SparseQwen2-7B/snapshots/0123", None),
        ("", "mine", None),
    ],
)
def test_repositories_and_their_copies_are_recognised(
    repo: str, folder: str, found: str | None, tmp_path: Path
) -> None:
    known = recognise(repo, tmp_path / folder)
    assert (known.name if known else None) == found


def test_the_catalogue_corrects_a_config(
    checkpoint: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_checkpoint(checkpoint("qwen2-relu-tied"), tmp_path / "SparseQwen2-7B")
    report = convert(folder, dry_run=True)
    assert (report.structure["ffn_activation"], report.ffn_source) == ("drelu", "models.toml")
    assert main([str(folder), "--dry-run", *PLAIN]) == 0
    assert "note: FFN type drelu as models.toml has it, not what config.json says" in capsys.readouterr().err
    said = convert(folder, dry_run=True, ffn_type="fatrelu:0.5")
    assert (said.structure["ffn_activation"], said.structure["activation_threshold"]) == ("fatrelu", 0.5)
    assert said.ffn_source == "--ffn-type"


def test_a_config_that_agrees_is_not_overridden(checkpoint: Folder, tmp_path: Path) -> None:
    """Its own threshold counts."""
    folder = copy_checkpoint(checkpoint("llama-fatrelu"), tmp_path / "prosparse-llama-2-7b", hidden_act_param=0.02)
    report = convert(folder, dry_run=True)
    assert (report.structure["activation_threshold"], report.ffn_source) == (0.02, "config.json")


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(catalogue())
    assert re.search(
        r"prosparse-llama-2-7b +SparseLLM/prosparse-llama-2-7b +fatrelu:0.01, gated +89% +family", "\n".join(lines)
    )
    assert main(["--list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [known.name for known in catalogue()]
