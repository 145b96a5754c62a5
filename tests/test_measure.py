"""`convert --measure-sparsity`: what it counts is what a conversion stores, and no model is left anywhere."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experts import Model
from in_process import command, result_of
from unequal import MODELS

from convert import archs, convert
from convert.measure import Measured, measure_sparsity
from runtime.analysis.firing import expert_use, layer_firing, read_frequencies
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile

pytestmark = pytest.mark.numeric

TOKENS = 1024
MIXTURE = Model(True, n_blocks=2, experts=8, used=3, sigmoid=True, rotates=(1, 1), windowed=(0, 0))
Checkpoint = Callable[[str], Path]


def measured_and_stored(source: Path, folder: Path, **options: Any) -> Measured:
    """What is measured, after it was compared with what a conversion of the same checkpoint stores."""
    found = measure_sparsity(source, type="f32", tokens=TOKENS, seed=3, **options)
    out = folder / "model.gguf"
    convert(source, out, type="f32", calibration_tokens=TOKENS, predictor="none", seed=3, **options)
    with GgufFile(out) as file:
        stored, blocks = read_frequencies(file), file.structure.blocks
        experts = tuple(expert_use(file, i) for i in range(len(blocks)))
    for mine, theirs, layer, block in zip(found.frequencies, stored, found.layers, blocks, strict=True):
        if block.shared:  # whose neurons a file does not count
            assert len(mine) == len(theirs) + block.shared.n_ff and not Counter(theirs.tolist()) - Counter(
                mine.tolist()
            )
            continue
        np.testing.assert_array_equal(mine, theirs)
        assert layer == layer_firing(theirs, block.ffn)
    assert found.experts == experts
    return found


@pytest.mark.parametrize("name", ["llama-rope-llama3", "opt-post-norm", "falcon-7b"])
def test_it_counts_what_a_conversion_stores(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = measured_and_stored(checkpoint(name), tmp_path)
    assert 0.9 * TOKENS < found.tokens <= TOKENS
    assert 0.1 < found.active < 0.9
    assert found.active == pytest.approx(np.mean([layer.active for layer in found.layers]))


def test_experts_are_counted_for_the_tokens_that_chose_them(tmp_path: Path) -> None:
    MIXTURE.make(tmp_path / "mixture")
    found = measured_and_stored(tmp_path / "mixture", tmp_path)
    assert all(use and use.least < 3 / 8 < use.most for use in found.experts)


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if not all(b.ff for b in model.blocks)][:1])
def test_blocks_without_an_ffn_are_run_and_not_listed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archs, "__path__", [*archs.__path__, str(Path(__file__).parent / "archs")])
    blocks = MODELS[name].blocks
    MODELS[name].make(tmp_path / "unequal")
    found = measured_and_stored(tmp_path / "unequal", tmp_path)
    listed = [row["block"] for row in found.to_json()["layers"]]
    assert listed == [i for i, block in enumerate(blocks) if block.ff]
    assert 0 < len(listed) < len(blocks)


def test_blocks_of_all_kinds_beside_each_other(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Mamba-2, attention, an FFN, and experts; of these, as many neurons count as a token may use, shared ones included."""
    found = measured_and_stored(checkpoint("nemotron_h-experts"), tmp_path)
    assert found.ffn_blocks == (0, 2, 4)
    shares, neurons = [found.layers[i].active for i in found.ffn_blocks], [3 * 96 + 160, 3 * 96 + 160, 224]
    assert found.active == pytest.approx(np.average(shares, weights=neurons))


def test_one_block_at_a_time_lies_in_a_temporary_file(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    most = 0

    def seen(_what: str, _done: float, _total: float) -> None:
        nonlocal most
        most = max(most, sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*.gguf")))

    measure_sparsity(checkpoint("bundled"), type="f32", tokens=512, progress=seen)
    whole = convert(checkpoint("bundled"), type="f32", dry_run=True).bytes
    assert 0 < most < whole / 6
    assert not [*tmp_path.iterdir()]


def test_the_command_says_tokens_corpus_and_time(checkpoint: Checkpoint, tmp_path: Path) -> None:
    options = (checkpoint("llama-gqa"), "--measure-sparsity", "--calibration-tokens", TOKENS)
    plot = tmp_path / "curves.png"
    done = command("convert", *options, "--plot", plot)
    assert done.returncode == 0, done.stderr
    assert "carry 80 %" in done.stdout
    assert (
        f" on {measure_sparsity(options[0], tokens=TOKENS).tokens:,} tokens of calibration.txt (sha256 " in done.stdout
    )
    assert done.stdout.rstrip().endswith(" s")
    assert plot.read_bytes().startswith(b"\x89PNG")
    result = result_of("convert", *options)
    assert result["corpus"] == "calibration.txt"
    assert result["seconds"] > 0
    assert [row["block"] for row in result["layers"]] == [0, 1]
    assert result["active"] == pytest.approx(np.mean([row["active"] for row in result["layers"]]))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["out.gguf"], "`out.gguf`: --measure-sparsity writes no model"),
        (["--dry-run"], "--dry-run: does not apply to --measure-sparsity"),
        (["--energy", "0.9"], "--energy: does not apply to --measure-sparsity"),
        (["--predictor-type", "q8_0"], "--predictor-type: does not apply to --measure-sparsity"),
        (["--calibration", "none"], "--calibration none: --measure-sparsity needs a text"),
        (["--plot", "curves.bmp"], "`curves.bmp`: expected a name that ends in .png or .html"),
        (["--calibration-tokens", "100"], "100 calibration tokens, expected at least 512"),
    ],
)
def test_options_that_do_not_fit(options: list[str], complaint: str, checkpoint: Checkpoint) -> None:
    done = command("convert", checkpoint("llama-gqa"), *options, "--measure-sparsity")
    assert (done.returncode, done.stdout) == (1, "")
    assert complaint in done.stderr


def test_what_is_no_checkpoint(tiny_gguf: Path, checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match="a GGUF file, expected a checkpoint"):
        measure_sparsity(tiny_gguf)
    refused = command("convert", checkpoint("llama-gqa"), "out.gguf", "--plot", "x.png")
    assert "--plot: expected --measure-sparsity with it" in refused.stderr
    assert "SOURCE is missing" in command("convert", "--measure-sparsity").stderr
