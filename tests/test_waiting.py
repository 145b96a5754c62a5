"""How OpenMP's threads wait, as GNU's library itself says when it is loaded (`OMP_DISPLAY_ENV`)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.bindings.logs import silence

ROOT = Path(__file__).parent.parent
OPEN = "from runtime.bindings.logs import silence; silence();"
OTHERS_FIRST = "import ctypes; ctypes.CDLL('libgomp.so.1');"
SHOWN = "import os; print(os.environ.get('GOMP_SPINCOUNT'))"


def _uses_gnu() -> bool:
    if sys.platform != "linux":
        return False
    silence()
    return "libgomp.so" in Path("/proc/self/maps").read_text()


pytestmark = pytest.mark.skipif(not _uses_gnu(), reason="ggml was not built with GNU's OpenMP")


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code where nothing but `variables` says how threads wait."""
    plain = {name: v for name, v in os.environ.items() if name not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    environment = {**plain, "OMP_DISPLAY_ENV": "VERBOSE", "LAZYNEURON_LOG": "", **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done


def spin_count(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What each OpenMP library of the process took for its own."""
    return re.findall(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)


def by_itself() -> list[str]:
    return spin_count(python(OTHERS_FIRST))


def test_the_library_is_loaded_with_little_spinning() -> None:
    done = python(OPEN + SHOWN)
    assert spin_count(done) == [done.stdout.strip()]
    assert 0 < int(done.stdout) < int(by_itself()[0])
    assert "OpenMP:" not in done.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0"), ({"GOMP_SPINCOUNT": "77", "OMP_WAIT_POLICY": "active"}, "77")],
)  # fmt: skip
def test_what_the_user_has_set_is_kept(variables: dict[str, str], expected: str) -> None:
    done = python(OPEN + SHOWN, LAZYNEURON_LOG="1", **variables)
    assert spin_count(done) == [expected]
    assert done.stdout.strip() == variables.get("GOMP_SPINCOUNT", "None")
    line = next(line for line in done.stderr.splitlines() if line.startswith("OpenMP:"))
    assert all(f"{name}={value}" in line for name, value in variables.items())


@pytest.mark.parametrize("first", [OTHERS_FIRST, OTHERS_FIRST.replace("1')", "1', mode=ctypes.RTLD_GLOBAL)")])
def test_a_library_that_others_loaded_is_left_alone(first: str) -> None:
    done = python(first + OPEN + SHOWN, LAZYNEURON_LOG="1")
    assert spin_count(done) == by_itself()
    assert done.stdout.strip() == "None"
    assert "OpenMP: its library was loaded by others before" in done.stderr


def test_the_log_says_how_threads_wait_once() -> None:
    done = python(OPEN + OPEN + SHOWN, LAZYNEURON_LOG="1")
    lines = [line for line in done.stderr.splitlines() if line.startswith("OpenMP:")]
    assert lines == [f"OpenMP: threads wait with GOMP_SPINCOUNT={done.stdout.strip()}"]


def test_a_verb_decides_before_it_imports_anything() -> None:
    for program in ("runtime", "convert", "predictors"):
        done = python(f"from {program}.__main__ import PROGRAM; PROGRAM.verbs[0].load('');" + SHOWN)
        settled = done.stdout.splitlines()[-1]
        assert settled.isdecimal()
        assert set(spin_count(done)) <= {settled}  # where something that it imports has loaded the library


def test_a_program_to_be_compared_with_gets_the_environment_as_it_was() -> None:
    code = "from runtime.bindings.waiting import unsettled; import os; print(unsettled() == before, unsettled() == dict(os.environ))"
    before = "import os; before = dict(os.environ);"
    assert python(before + OPEN + code).stdout.split() == ["True", "False"]
    assert python(before + OPEN + code, GOMP_SPINCOUNT="5000").stdout.split() == ["True", "True"]
