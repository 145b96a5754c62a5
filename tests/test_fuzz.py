"""What fuzzing found stays mended, and the fuzzer itself sees each kind of fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer watches its processes through /proc")
ROOT = Path(__file__).parent.parent

FAULTS = r"""
import ctypes, json, os, sys, time
from pathlib import Path
from fuzz import worker
from fuzz.worker import Target, run
from runtime.errors import UserError

worker.HANG = 0.5

def crash(folder): ctypes.string_at(0)
def leave(folder): os._exit(3)
def hang(folder):
    while True: pass
def wait(folder): time.sleep(3600)
def raise_it(folder): raise KeyError("x")
def grow(folder): bytearray(300 << 20)
def refuse(folder): raise UserError("no")
def half(folder):
    (folder / "out/x").write_bytes(b"")
    raise UserError("no")
def beside(folder):
    (folder / "x").write_bytes(b"")
    return True
def talk(folder):
    print("something", file=sys.stderr)
    raise UserError("no")
def work(folder):
    (folder / "out/x").write_bytes(b"")
    return True

folder = Path(sys.argv[1])
for use in (crash, leave, hang, wait, raise_it, grow, refuse, half, beside, talk, work):
    # Every third input does it; the others are to be run all the same.
    target = Target(use.__name__, lambda index: {"input": b"%d" % index}, lambda f, use=use: use(f) if int((f / "input").read_bytes()) % 3 == 1 else True)
    counts = run(target, 60, 1, folder, stop=5)
    print(json.dumps([use.__name__, counts.inputs, counts.reached, counts.refused, [(f.index, f.kind) for f in counts.failures]]))
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"}


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment(), cwd=ROOT
    )


def test_every_fault_is_seen_and_the_rest_goes_on(tmp_path: Path) -> None:
    done = fuzz("-c", FAULTS, str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    kinds = {
        "crash": "SIGSEGV", "leave": "exit 3", "hang": "hang", "wait": "hang", "raise_it": "KeyError", "grow": "Failed memory",
        "half": "Failed left behind", "beside": "Failed left behind", "talk": "Failed not one error line",
    }  # fmt: skip
    for name, kind in kinds.items():
        inputs, reached, refused, failures = found[name]
        assert (inputs, reached, refused) == (5, 3, 0), name
        assert [index for index, _ in failures] == [1, 4], name
        assert all(what.startswith(kind) for _, what in failures), (name, failures)
    assert found["refuse"] == [5, 3, 2, []]
    assert found["work"] == [5, 5, 0, []]


DIGESTS = """
import hashlib, pathlib, random, sys
from fuzz.targets import all_targets
for target in all_targets(pathlib.Path(sys.argv[1]), lambda name, index: random.Random(f"7 {name} {index}")):
    print(target.name, hashlib.sha256(repr([sorted(target.make(i).items()) for i in range(6)]).encode()).hexdigest())
"""


def test_inputs_follow_from_the_seed(tmp_path: Path) -> None:
    started = []
    for seed in ("1", "2"):  # of Python's own hashes, on which nothing may depend
        (tmp_path / seed).mkdir()
        env = {**environment(), "PYTHONHASHSEED": seed}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", DIGESTS, tmp_path / seed], stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT
            )
        )
    first, second = (process.communicate()[0] for process in started)
    assert len(set(first.splitlines())) > 10
    assert first == second


def test_the_corpus() -> None:
    """Every input that failed once is refused with one line, or computed."""
    done = fuzz("-m", "fuzz", "--replay", "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    inputs = sum(int(line.split()[1]) for line in done.stdout.splitlines())
    assert inputs == len(list((ROOT / "tests/fuzz/corpus").glob("*/*.zip"))) > 0
