"""What the documents show to be typed is typed: README, quickstart and the page on Python are run as they stand, with small models in the place of large ones."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import documents
import pytest
from checkpoints import first_block
from documents import ROOT, blocks
from hub_client import Client
from hub_server import TOKEN, Hub

# Not run: what changes the machine, needs a GPU or minutes, by how it begins. Of our own commands the options are still checked.
NOT_RUN = {
    "sudo apt-get ": "installs packages",
    'CMAKE_ARGS="': "compiles llama-cpp-python anew",
    ".venv/bin/hf auth login": "asks for a token",
    "python -m bench.decode --shape": "makes a 7B model",
    ".venv/bin/python -m runtime chat relullama-7b.gguf --vram-budget": "needs a GPU",
}
STDIN = "My fellow citizens,\n"  # for a chat


@dataclass(frozen=True)
class Place:
    """A folder that looks like a checkout after `make setup`, and the environment in which its commands run."""

    folder: Path
    variables: dict[str, str]

    def read(self, document: str) -> None:
        """Run every block of a document, top to bottom."""
        for block in blocks((ROOT / document).read_text(encoding="utf-8")):
            if block.language == "python":
                self._run([sys.executable, "-c", block.text])
            elif block.language in documents.SHELL:
                for line in block.commands():
                    self._type(line)

    def _type(self, line: str) -> None:
        bare = line.split(" #", maxsplit=1)[0]
        if line.startswith("make "):
            self._run(["make", "-C", str(ROOT), "-n", *bare.split()[1:]])
        elif any(line.startswith(beginning) for beginning in NOT_RUN):
            self._run(["bash", "-n", "-c", line])
            if re.match(r"\S*python -m", line):
                self._run(["bash", "-c", f"{bare} --help"])
        else:
            self._run(["bash", "-c", line])

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(
            command, input=STDIN, capture_output=True, text=True, check=False, cwd=self.folder, env=self.variables
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stderr}"


@pytest.fixture
def place(hub: Hub, run: Client, tiny_gguf: Path, tmp_path: Path) -> Place:
    """With the bundled model built, the beginning of the held-out text, and the Hub that has the first block of the bundled checkpoint for ReluLLaMA-7B."""
    hub.add("SparseLLM/ReluLLaMA-7B", first_block())
    for shim in (tmp_path / "bin/python", tmp_path / ".venv/bin/python"):
        shim.parent.mkdir(parents=True)
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        shim.chmod(0o755)
    (tmp_path / "build").mkdir()
    (tmp_path / "build/tiny-relu-llama.gguf").symlink_to(tiny_gguf)
    (tmp_path / "examples").mkdir()
    for path in (ROOT / "examples").iterdir():
        if path.name != "heldout.txt":
            (tmp_path / "examples" / path.name).symlink_to(path)
    (tmp_path / "examples/heldout.txt").write_bytes((ROOT / "examples/heldout.txt").read_bytes()[:5000])
    paths = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
    return Place(tmp_path, run.environment(**paths, HF_TOKEN=TOKEN, LAZYNEURON_CACHE=str(tmp_path / "cache")))


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_snippets_run(name: str, place: Place) -> None:
    place.read(name)


def test_snippets_of_the_python_page_run(place: Place, fitted_gguf: Path) -> None:
    (place.folder / "relullama-7b.gguf").symlink_to(fitted_gguf)
    place.read("docs/python.md")


def test_command_lines_of_all_documents_are_understood() -> None:
    """Up to the values of their options; most need a model that is not here."""
    pages = {path.name: documents.without_help(path.read_text(encoding="utf-8")) for path in documents.documents()}
    lines = [(name, line) for name, text in pages.items() for line in documents.typed(text)]
    found = [(name, words[1]) for name, line in lines if (words := re.search(r"python -m ([^#|<>]+)", line))]
    assert len(found) > 40
    for name, line in found:
        assert documents.understood(shlex.split(line)), f"{name}: {line}"
