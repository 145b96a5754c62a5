"""Processes that are forked while a model is loaded: they say at once that it is not theirs, and end; what they load themselves works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

_BEGIN = """
import multiprocessing, os, sys, threading, time, warnings
import runtime
warnings.simplefilter("ignore")  # a process of several threads is forked: that is the point
fork = multiprocessing.get_context("fork")
model = runtime.load(sys.argv[1], threads=2, device="none")

def written(by):
    return "".join(by.generate("River", 4, runtime.Sampling(temperature=0)))

def of_parent(_=None):
    try:
        return written(model)
    except runtime.UserError:
        return "UserError"

def own(_=None):
    with runtime.load(sys.argv[1], threads=2, device="none") as loaded:
        return written(loaded)

def status_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

usual = written(model)
"""

PROGRAMS = {
    "a pool": """
with fork.Pool(2) as pool:
    assert pool.map(of_parent, range(2)) == ["UserError"] * 2
    assert pool.map(own, range(2)) == [usual] * 2
""",
    "children that only end": """
process = fork.Process(target=lambda: None)
process.start()
process.join()
assert process.exitcode == 0
child = os.fork()
if not child:
    sys.exit(5)  # through all finalisers
assert status_of(child) == 5
""",
    "while the model computes": """
busy = threading.Thread(target=lambda: [written(model) for _ in range(40)])
busy.start()
for _ in range(6):
    child = os.fork()
    if not child:
        os._exit(0 if (of_parent(), own()) == ("UserError", usual) else 1)
    assert status_of(child) == 0
busy.join()
""",
    "in a generation": """
generation = model.generate("River", 20)
next(generation)
child = os.fork()
if not child:
    try:
        next(generation)
    except runtime.UserError:
        sys.exit(5)
assert status_of(child) == 5
assert list(generation)
""",
    "a child of a child": """
child = os.fork()
if not child:
    model = runtime.load(sys.argv[1], threads=2, device="none")
    assert written(model) == usual
    grandchild = os.fork()
    if not grandchild:
        sys.exit(0 if (of_parent(), own()) == ("UserError", usual) else 1)
    sys.exit(status_of(grandchild))
assert status_of(child) == 0
""",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.parametrize("name", PROGRAMS)
def test_forks(name: str, tiny_gguf: Path) -> None:
    program = _BEGIN + PROGRAMS[name] + "assert written(model) == usual\nmodel.close()\n"
    command = [sys.executable, "-c", program, str(tiny_gguf)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
