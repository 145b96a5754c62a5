"""The command `lazyneuron`, as an installer makes it from pyproject.toml: the three programs' commands under one name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from console_script import write_script
from in_process import command

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_script(tmp_path_factory.mktemp("bin"))


def run(script: Path, *words: object) -> subprocess.CompletedProcess[str]:
    line = [str(script), *map(str, words)]
    return subprocess.run(line, capture_output=True, encoding="utf-8", timeout=600, check=False)


def test_it_does_what_the_programs_do(script: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    for program, words in (
        ("runtime", ("inspect", tiny_gguf)),
        ("runtime", ("inspect", tmp_path / "missing.gguf")),
        ("convert", ("--list",)),
        ("predictors", ("evaluate", tiny_gguf, tmp_path / "missing.txt")),
    ):
        alone, expected = run(script, *([] if program == "runtime" else [program]), *words), command(program, *words)
        assert (alone.returncode, alone.stdout, alone.stderr) == (
            expected.returncode,
            expected.stdout,
            expected.stderr,
        )


def test_help_calls_it_by_its_name(script: Path) -> None:
    for words in ("chat", "run", "convert", "convert push", "predictors fit"):
        done = run(script, *words.split(), "--help")
        name = words.replace("run", "chat")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"usage: lazyneuron {name} [options]")


def test_alone_it_lists_everything(script: Path) -> None:
    done = run(script)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("chat", "inspect", "convert", "predictors"):
        assert f"\n    {word} " in done.stdout


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("chatt",), "did you mean `chat`? `lazyneuron` lists the commands"),
        (("convrt", "x"), "did you mean `convert`? `lazyneuron` lists the commands"),
        (("predictors", "fitt"), "did you mean `fit`? `lazyneuron predictors` lists the commands"),
        (("plan", "x", "--vram-budgt", "6"), "did you mean `--vram-budget`? lazyneuron plan --help lists the options"),
    ],
)
def test_mistakes(script: Path, words: tuple[str, ...], hint: str) -> None:
    done = run(script, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[1:] == [f"hint: {hint}"]


@pytest.mark.parametrize("program", ["lazyneuron", "runtime", "convert", "predictors"])
def test_a_list_of_commands_needs_none_of_them(program: str) -> None:
    slow = ("numpy", "rich", "jinja2", "asyncio", "ctypes", "gguf", f"{program}.commands")
    code = (
        f"import sys; from {program}.__main__ import PROGRAM; PROGRAM.main([]);"
        f"print([m for m in {slow} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
