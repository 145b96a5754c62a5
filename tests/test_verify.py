"""`--verify`: its oracle is right for every family, good files pass in every type, and each planted mistake fails."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CHECKPOINTS, copy_checkpoint
from families import CASES
from oracle import kl, max_difference, random_ids, transformers_logits
from plain import convert

from convert import planned_job, rewrites
from convert.__main__ import main
from convert.arch import Source
from convert.archs import llama, nemotron
from convert.checkpoint import open_checkpoint
from convert.formats import TYPES
from convert.plan import Types, make_plan
from convert.rewrites import Rewrite
from convert.verify import logits
from convert.verify.reference import NumpyModel
from runtime.errors import UserError

pytestmark = pytest.mark.numeric

Folder = Callable[[str], Path]


@pytest.fixture
def bundled(checkpoint: Folder, tmp_path: Path) -> Path:
    """The bundled model under a name that the catalogue does not know, so that it cannot correct a mistake."""
    return copy_checkpoint(checkpoint("bundled"), tmp_path / "checkpoint")


@pytest.fixture
def numpy_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if transformers were not installed."""
    monkeypatch.setattr(logits, "_installed", lambda *_modules: False)


@pytest.mark.parametrize("name", [*CHECKPOINTS, *CASES])
def test_the_numpy_oracle_equals_the_reference(name: str, checkpoint: Folder) -> None:
    folder, ids = checkpoint(name), random_ids(48, 4000)
    case = CASES.get(name)
    opened = open_checkpoint(folder)
    plan = make_plan(opened, Types("q4_0"), "sparse", case.ffn_type if case else None)
    found = NumpyModel(opened, plan).logits(ids)
    assert found.dtype == np.float32
    assert max_difference(case.logits(folder, ids) if case else transformers_logits(folder, ids), found) <= 2e-4


@pytest.mark.parametrize("type_name", TYPES)
def test_good_files_pass(type_name: str, bundled: Path, tmp_path: Path) -> None:
    report = convert(bundled, tmp_path / "x.gguf", type=type_name, verify=True)
    verified = report.verified
    assert verified is not None
    assert (verified["reference"], verified["modes"], verified["tokens"]) == ("transformers", ("exact", "dense"), 64)
    assert 0 <= verified["kl"] <= logits.LIMITS[type_name] / 4  # room for other models
    assert {path.name for path in tmp_path.iterdir()} == {"x.gguf", "checkpoint"}


@pytest.mark.parametrize(
    "name", ["bamboo", "minicpm", "llama-fatrelu", "bitnet", "qwen2-drelu", "mixtral-drelu", "smallthinker-21b"]
)
def test_what_transformers_does_not_compute_is_compared_with_numpy(
    name: str, checkpoint: Folder, tmp_path: Path
) -> None:
    report = convert(checkpoint(name), tmp_path / "x.gguf", type="f32", ffn_type=CASES[name].ffn_type, verify=True)
    assert report.verified is not None
    assert report.verified["reference"] == "the checkpoint (float32 numpy)"


def test_a_config_that_transformers_refuses_is_compared_with_numpy(checkpoint: Folder, tmp_path: Path) -> None:
    folder = copy_checkpoint(checkpoint("llama-mha"), tmp_path / "marked")
    (folder / "config.json").write_bytes(codecs.BOM_UTF8 + (folder / "config.json").read_bytes())
    report = convert(folder, tmp_path / "x.gguf", type="f32", verify=True)
    assert report.verified is not None
    assert report.verified["reference"] == "the checkpoint (float32 numpy)"


def test_the_divergence_equals_the_tests_own() -> None:
    a, b = np.random.default_rng(0).normal(0, 3, (2, 5, 100)).astype(np.float32)
    assert logits.divergence(a, b) == pytest.approx(kl(a, b))


# --- planted mistakes ---------------------------------------------------------------------------------------------------


def wrong_metadata(changes: dict[str, Any]) -> Callable[[pytest.MonkeyPatch], None]:
    right = planned_job._metadata

    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(
            planned_job, "_metadata", lambda *a: right(*a) | {f"lazyneuron.{k}": v for k, v in changes.items()}
        )

    return plant


def down_not_transposed(patch: pytest.MonkeyPatch) -> None:
    def rows(source: Any, start: int, stop: int) -> Any:
        whole = np.asarray(source[:])
        return whole.reshape(whole.shape[::-1])[start:stop]

    wrong = Rewrite("transpose", lambda shape: shape[::-1], rows)
    patch.setitem(rewrites._MADE, "transpose", lambda _heads: wrong)


# Of the file alone: every oracle sees them.
IN_THE_FILE = {
    "relu2 for relu": wrong_metadata({"ffn.activation": "relu2"}),
    "drelu for relu": wrong_metadata({"ffn.activation": "drelu"}),
    "fatrelu for relu": wrong_metadata({"ffn.activation": "fatrelu", "ffn.activation_threshold": 1.0}),
    "another rope_theta": wrong_metadata({"rope.freq_base": 500.0}),
    "the other rope layout": wrong_metadata({"position": "rope_norm"}),
    "norms after the residual": wrong_metadata({"norm_placement": "post"}),
    "a softcap": wrong_metadata({"logit_softcap": 2.0, "schema_version": 2}),
    "an un-transposed down": down_not_transposed,
}


def wrong_arch(**changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(llama, "ARCH", replace(llama.ARCH, **changes))


def swapped(first: str, second: str) -> Callable[[pytest.MonkeyPatch], None]:
    a, b = f"blk.{{i}}.{first}.weight", f"blk.{{i}}.{second}.weight"
    tensors = llama.ARCH.tensors
    return wrong_arch(tensors={**tensors, a: tensors[b], b: tensors[a]})


# Of the architecture's description: only transformers can see them.
IN_THE_DESCRIPTION = {
    "an activation misread": wrong_arch(activations={"relu": "relu2"}),
    "gate and up exchanged": swapped("ffn_gate", "ffn_up"),
    "keys and values exchanged": swapped("attn_k", "attn_v"),
    "norms exchanged": swapped("attn_norm", "ffn_norm"),
}
# But for one that costs no more than 4 bits do.
PLANTED = [
    (mistake, type_name)
    for mistake in IN_THE_FILE | IN_THE_DESCRIPTION
    for type_name in ("f32", "q8_0", "q4_0")
    if (mistake, type_name) != ("another rope_theta", "q4_0")
]
CAUGHT = r"logits differ from .*: KL [\d.e+]+ nats per token in (exact|dense) mode, expected at most"


@pytest.mark.parametrize(("mistake", "type_name"), PLANTED)
def test_mistakes_are_caught(
    mistake: str, type_name: str, bundled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (IN_THE_FILE | IN_THE_DESCRIPTION)[mistake](monkeypatch)
    out = tmp_path / "x.gguf"
    out.write_text("precious")
    with pytest.raises(UserError, match=CAUGHT):
        convert(bundled, out, type=type_name, verify=True, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"x.gguf", "checkpoint"}
    assert out.read_text() == "precious"


@pytest.mark.usefixtures("numpy_oracle")
@pytest.mark.parametrize("mistake", IN_THE_FILE)
def test_the_numpy_oracle_catches_them_too(
    mistake: str, bundled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    IN_THE_FILE[mistake](monkeypatch)
    with pytest.raises(UserError, match=CAUGHT):
        convert(bundled, tmp_path / "x.gguf", type="q8_0", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    "changes",
    [
        {"router.tap": "ffn_norm"},
        {"expert_gating_func": "softmax"},
        {"expert_weights_norm": False},
        {"expert_used_count": 5},
    ],
    ids=str,
)
def test_a_router_misread_is_caught(
    changes: dict[str, Any], checkpoint: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong_metadata(changes)(monkeypatch)
    with pytest.raises(UserError, match=CAUGHT):
        convert(checkpoint("smallthinker-21b"), tmp_path / "x.gguf", type="f32", verify=True)
    assert not list(tmp_path.iterdir())


def test_silu_taken_for_relu_is_caught(bundled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What every converter that ignores `hidden_act` does, the other way round."""
    folder = copy_checkpoint(bundled, tmp_path / "silu", hidden_act="silu")
    wrong_arch(activations={"silu": "relu"})(monkeypatch)
    with pytest.raises(UserError, match=CAUGHT):
        convert(folder, tmp_path / "x.gguf", type="q4_0", verify=True)


def test_norms_of_another_form_are_caught(checkpoint: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stored less one, taken as they are."""
    plain = {
        name: replace(source, rewrite="identity") if "norm" in name and isinstance(source, Source) else source
        for name, source in nemotron.ARCH.tensors.items()
    }
    monkeypatch.setattr(nemotron, "ARCH", replace(nemotron.ARCH, tensors=plain))
    with pytest.raises(UserError, match=CAUGHT):
        convert(checkpoint("nemotron"), tmp_path / "x.gguf", type="f32", verify=True)


def test_the_command_line(bundled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(bundled), str(tmp_path / "x.gguf"), "--calibration", "none", "--verify"]
    assert main(command) == 0
    assert re.search(r"^verified against transformers: max difference 0\.00\d+, KL ", capsys.readouterr().err, re.M)
    with pytest.MonkeyPatch.context() as patch:
        IN_THE_FILE["drelu for relu"](patch)
        assert main([*command, "--force", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(":")[0] for line in captured.err.splitlines()] == ["error", "hint"]
