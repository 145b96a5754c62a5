"""A conversion that did not come to its end goes on where it stopped, and ends with the same bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_llama

from convert.__main__ import main
from predictors.kept_layers import KeptLayers
from runtime.base.atomic import writing

ROOT = Path(__file__).parent.parent
# Converts as the command does, counts the layers that it fits, and when so many are kept gets a signal (0: has no room).
CHILD = """
import errno, os, signal, sys
from predictors import fit, kept_layers
source, out, tokens, deadly, number = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
fitted, kept = [], []
fit_layer, keep = fit._fit_layer, kept_layers.KeptLayers.keep
def counted(layer, *others):
    fitted.append(layer.i)
    return fit_layer(layer, *others)
def deadly_keep(self, i, *others):
    keep(self, i, *others)
    kept.append(i)
    if len(kept) == deadly:
        if not number:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.kill(os.getpid(), number)
fit._fit_layer, kept_layers.KeptLayers.keep = counted, deadly_keep
import convert
report = convert.convert(source, out, type="q8_0", calibration_tokens=int(tokens), threads=1, force=True)
print(fitted, *report.notes, sep="\\n")
"""


def run(
    source: Path, out: Path, tokens: int = 1024, deadly: int = 0, number: int = signal.SIGKILL
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(source), str(out), str(tokens), str(deadly), str(int(number))]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept") / "four"
    make_llama(folder, num_hidden_layers=4)
    return folder


@pytest.fixture(scope="module")
def whole(four: Path) -> bytes:
    """What an uninterrupted run writes, under the name that all use."""
    out = four.parent / "whole" / "m.gguf"
    out.parent.mkdir()
    done = run(four, out)
    assert done.stdout.startswith("[0, 1, 2, 3]"), done.stderr
    return out.read_bytes()


def killed(four: Path, folder: Path) -> Path:
    """A folder in which a run died when two layers were kept; the name that it would have written."""
    out = folder / "m.gguf"
    assert run(four, out, deadly=2).returncode == -signal.SIGKILL
    assert not out.exists()
    return out


def kept(folder: Path) -> Path:
    (found,) = folder.glob(".lazyneuron-*/kept")
    return found


def test_a_second_run_does_the_other_layers_only(four: Path, whole: bytes, tmp_path: Path) -> None:
    out = killed(four, tmp_path)
    again = run(four, out)
    assert again.stdout.splitlines()[0] == "[2, 3]", again.stderr
    assert "not used" not in again.stdout
    assert out.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -signal.SIGINT), (0, 1)])
def test_layers_outlive_an_interrupt_and_a_full_disk(
    four: Path, whole: bytes, tmp_path: Path, number: int, status: int
) -> None:
    out = tmp_path / "m.gguf"
    stopped = run(four, out, deadly=2, number=number)
    assert stopped.returncode == status and ("KeyboardInterrupt" in stopped.stderr) == bool(number)
    assert {path.name for path in kept(tmp_path).iterdir()} == {"layer-0", "layer-1", "hidden"}
    assert list(kept(tmp_path).parent.iterdir()) == [kept(tmp_path)]
    again = run(four, out)
    assert again.stdout.splitlines()[0] == "[2, 3]", again.stderr
    assert out.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("n", "said"), [(0, ""), (1, "1 calibrated layer is kept: "), (12, "12 calibrated layers are kept: ")]
)
def test_an_interrupted_command_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], n: int, said: str
) -> None:
    out = tmp_path / "m.gguf"

    def interrupted(*_: object, **__: object) -> None:
        with writing(out) as work:
            layers = KeptLayers(work.kept)
            for i in range(n):
                layers.keep(i, list(range(i + 1)), None, np.zeros((1, 2), np.float32))
            raise KeyboardInterrupt

    monkeypatch.setattr("convert.commands.convert.convert", interrupted)
    assert main([str(tmp_path), str(out)]) == 130
    expected = f"{said}the same command goes on with the others\n" if n else ""
    assert capsys.readouterr().err == f"{expected}interrupted\n"
    assert [path.name for path in tmp_path.rglob("hidden")] == ["hidden"] * bool(n)


def test_damaged_layers_are_not_used(four: Path, whole: bytes, tmp_path: Path) -> None:
    out = killed(four, tmp_path)
    file = kept(tmp_path) / "layer-1"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = run(four, out)
    assert again.stdout.splitlines()[0] == "[0, 1, 2, 3]", again.stderr
    assert again.stdout.count("were not used: `layer-1` is damaged") == 1
    assert out.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [out]


def test_layers_of_another_fit_are_not_used(four: Path, tmp_path: Path) -> None:
    out = killed(four, tmp_path)
    again = run(four, out, tokens=1536)
    assert again.stdout.splitlines()[0] == "[0, 1, 2, 3]", again.stderr
    assert again.stdout.count("were not used: they are of another model, text, or other options") == 1
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("earlier", [0, 1])
@pytest.mark.parametrize("at", ["layer", "hidden"])
def test_halves_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: int, at: str) -> None:
    """An interrupt while a layer is kept leaves the earlier ones, or nothing."""
    (model := tmp_path / "m").write_bytes(b"model")
    layers, hidden = KeptLayers(tmp_path / "kept"), np.zeros((2, 3), np.float32)
    layers.load(model, {})
    for i in range(earlier):
        layers.keep(i, list(range(i + 1)), "layer", hidden)
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if target.name.startswith(at):
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        layers.keep(earlier, list(range(earlier + 1)), "layer", hidden)
    monkeypatch.undo()
    assert not list(tmp_path.glob("kept/*.new"))
    assert layers.folder.exists() == bool(earlier)
    assert KeptLayers(layers.folder).load(model, {})[:2] == (["layer"] * earlier, earlier)
