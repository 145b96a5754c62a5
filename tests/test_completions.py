"""Completions in real shells, set up as docs/completions.md says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from console_script import write_script
from terminal import ENTER, ROOT, TAB, Terminal

SHELLS = {
    "bash": ("bash", "--norc", "--noprofile", "-i"),
    "zsh": ("zsh", "-f", "-i"),
    "fish": ("fish", "--no-config", "-i"),
}
SETTINGS = {  # before ours; fish's own prompt holds the folder's name, and may leave no room for a line
    "zsh": "autoload -Uz compinit && compinit -u\n",
    "fish": "function fish_prompt; echo -n '> '; end\n",
}
CTRL_U = "\x15"


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Terminal]:
    """A shell that has read the lines of the document."""
    name = str(request.param)
    if name != "bash" and not shutil.which(name):
        pytest.skip(f"no {name} here")
    first = SETTINGS.get(name, "")
    (tmp_path / "lines").write_text(f"{first}source {ROOT}/completions/lazyneuron.{name}\necho rea''dy\n")
    write_script(tmp_path)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    with Terminal(*SHELLS[name], PATH=path, HOME=str(tmp_path), ZDOTDIR=str(tmp_path), INPUTRC=os.devnull) as opened:
        opened.send(f"source {tmp_path / 'lines'}{ENTER}")
        opened.expect("ready")
        yield opened


def test_tab_completes_what_can_follow(shell: Terminal, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    (tmp_path / "model.txt").touch()
    (tmp_path / "folder").mkdir()
    for typed, completed in (
        ("python -m runtime insp", "inspect"),
        ("python3 -m runtime chat --ffn d", "--ffn dense"),
        (f"{sys.executable} -m runtime chat {tmp_path}/mod", f"{tmp_path}/model.gguf"),
        (f"python -m runtime chat {tmp_path}/fol", f"{tmp_path}/folder/"),
        ("python -m runtime run x --no-s", "--no-shift"),
        ("python -m convert prosparse-llama-2-1", "prosparse-llama-2-13b"),
        ("python -m convert push x --rep", "--replace-card"),
        ("python -m predictors eval", "evaluate"),
        ("lazyneuron insp", "inspect"),
        (f"lazyneuron chat {tmp_path}/mod", f"{tmp_path}/model.gguf"),
        ("lazyneuron convert push x --rep", "--replace-card"),
        (f"python {tmp_path}/model.t", f"{tmp_path}/model.txt"),
    ):
        shell.send(typed + TAB)
        shell.expect(re.escape(completed))
        shell.send(CTRL_U)
        shell.expect_gone(completed)


def offered(line: str) -> set[str]:
    """What argcomplete answers to a shell."""
    words = line.split()
    program = words[:3] if words[0] == "python" else words[:1]
    asking = {
        "_ARGCOMPLETE": str(len(program)),
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    command = f"exec {sys.executable} -m {program[-1]} 8>&1 9>/dev/null"
    env = os.environ | asking
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    return {word.strip() for word in done.stdout.split("\n")}


@pytest.mark.parametrize(
    ("line", "some", "none"),
    [
        ("python -m runtime ", {"chat", "run", "complete", "--help"}, {"README.md"}),
        ("python -m runtime chat x -", {"--system", "--prompt-file", "--kv-type"}, set()),
        ("python -m runtime chat x --kv-type ", {"f16", "f32"}, {"q8_0"}),
        ("python -m runtime chat x --prompt-file ", {"README.md", "docs/"}, set()),
        ("python -m runtime chat x --system ", set(), {"README.md", "docs/"}),
        ("python -m convert ", {"push", "card", "relullama-7b", "examples/"}, {"README.md"}),
        ("python -m convert x y --type ", {"q8_0", "f16"}, {"README.md"}),
        ("python -m convert push x y --", {"--private", "--revision"}, {"--type"}),
        ("python -m predictors fit x y --", {"--kind", "--energy"}, {"--tokens"}),
        ("lazyneuron ", {"chat", "run", "convert", "predictors", "--help"}, {"README.md"}),
        ("lazyneuron predictors ", {"fit", "evaluate"}, {"chat"}),
        ("lazyneuron convert ", {"push", "card", "relullama-7b", "examples/"}, {"README.md"}),
        ("lazyneuron convert push x y --", {"--private", "--revision"}, {"--type"}),
        ("lazyneuron run x --kv-type ", {"f16", "f32"}, {"q8_0"}),
    ],
)
def test_what_is_offered(line: str, some: set[str], none: set[str]) -> None:
    words = offered(line)
    assert some <= words
    assert not none & words


@pytest.mark.parametrize(
    "module", ["runtime.__main__", "convert.__main__", "predictors.__main__", "lazyneuron.__main__"]
)
def test_what_is_slow_to_import_is_not_imported_for_an_answer(module: str) -> None:
    code = (
        f"import sys, {module}; print([m for m in ('huggingface_hub', 'prompt_toolkit', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
