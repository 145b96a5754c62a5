"""Every program in examples/ runs, and shows what it says it shows."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import runtime

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMPT = "My fellow citizens, we must"
ARGUMENTS = {
    "stream.py": [PROMPT],
    "concurrent_prompts.py": [PROMPT, "The Congress"],
    "confidence.py": [PROMPT],
    "lipogram.py": ["e", PROMPT],
    "modes.py": [PROMPT],
}


@pytest.fixture(scope="module")
def shown(fitted_gguf: Path) -> Callable[[str], str]:
    """Runs an example; returns what it printed."""

    def run(name: str) -> str:
        command = [sys.executable, EXAMPLES / name, fitted_gguf, *ARGUMENTS[name]]
        done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, encoding="utf-8", check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


def test_every_example_is_run_and_listed() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == ARGUMENTS.keys()
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"[{name}]({name})" in listed for name in names)


def test_stream(shown: Callable[[str], str], fitted_gguf: Path) -> None:
    text, figures = shown("stream.py").rsplit("\n\n", 1)
    with runtime.load(fitted_gguf) as model:
        expected = "".join(model.generate(PROMPT, 48, runtime.Sampling(temperature=0.7, seed=1)))
    assert text == expected
    assert re.match(r"\d+ tokens, \d+ per second, ended by (length|eos)\n[\d.]+% of the neurons", figures)


def test_concurrent_prompts(shown: Callable[[str], str], fitted_gguf: Path) -> None:
    *answers, total = shown("concurrent_prompts.py").splitlines()
    with runtime.load(fitted_gguf) as model:
        expected = [
            f"{prompt} ...{''.join(model.generate(prompt, 24, runtime.Sampling(temperature=0)))!r}"
            for prompt in ARGUMENTS["concurrent_prompts.py"]
        ]
    assert answers == expected
    assert total == "2 generations, 48 tokens"


def test_confidence(shown: Callable[[str], str]) -> None:
    first, *tokens, last = shown("confidence.py").splitlines()
    assert re.fullmatch(r"prompt: (\d+) of \1 tokens", first)
    shares = [float(line.split("%")[0]) for line in tokens]
    assert all(share >= 2 for share in shares[:-1])
    assert last.endswith("(ended by callback)" if shares[-1] < 2 else "(ended by length)")


def test_lipogram(shown: Callable[[str], str]) -> None:
    text = shown("lipogram.py")
    assert len(text) > 20
    assert "e" not in text.lower()


def test_modes(shown: Callable[[str], str]) -> None:
    _, *rows = [line.split() for line in shown("modes.py").splitlines()]
    assert [row[0] for row in rows] == ["dense", "exact", "predicted"]
    dense, exact, predicted = ([float(x) for x in row[1:]] for row in rows)
    assert dense[1] > exact[1] > predicted[1]
    assert (dense[2], exact[2] < 1e-5, 0 < predicted[2] < 0.1) == (0, True, True)
