"""Models that nobody closes: finalisers, the end of the interpreter, forks."""

from __future__ import annotations

import gc
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from handles import Handles, idle, is_mapped, run_program

import runtime
from runtime.text.sampling import Sampling

GREEDY = Sampling(temperature=0)
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, sends signals to threads")


@pytest.fixture
def path(converted: Callable[..., Path]) -> Path:
    return converted("bundled", "q4_0")


# --- finalisers -----------------------------------------------------------------------------------------------------------


def test_a_finaliser_on_the_worker_does_not_wait_for_it(path: Path) -> None:
    program = """
import gc, sys, runtime
from runtime.base.worker import on_worker
model = runtime.load(sys.argv[1])
model.itself = model
del model
on_worker(gc.collect)
on_worker(lambda: None)
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
print(sys.argv[1] in maps)
"""
    done = run_program(program, path)
    assert (done.stdout, done.stderr) == ("False\n", "")


@linux
@pytest.mark.parametrize("used", [False, True])
def test_a_model_that_is_dropped_is_freed_at_once(path: Path, handles: Handles, used: bool) -> None:
    """Without the garbage collector: nothing of it refers to itself."""
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            model = runtime.load(path)
            if used:
                model.logits([5])
                list(model.generate("x", 2))
            del model
        idle()
        assert handles.live == {}
        assert not is_mapped(path)
    finally:
        gc.enable()


def test_a_generation_that_outlives_its_model_still_works(path: Path, handles: Handles) -> None:
    with runtime.load(path) as model:
        expected = "".join(model.generate("We the people", 8, GREEDY))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        assert "".join(runtime.load(path).generate("We the people", 8, GREEDY)) == expected
        gc.collect()
    idle()
    assert handles.live == {}


def test_a_generation_that_ends_in_a_finaliser_is_counted_without_waiting(path: Path) -> None:
    with runtime.load(path) as model:
        generation = model.generate("We the people", 8, GREEDY)
        next(generation)
        with model._totals_lock:  # held by this thread, as where the garbage collector comes in between
            ending = threading.Thread(target=generation.close)
            ending.start()
            ending.join(30)
            assert not ending.is_alive()
        assert model.stats().generations == 1


# --- the end of the interpreter ---------------------------------------------------------------------------------------

ENDS = {
    "global": "model = runtime.load(path)",
    "used": "model = runtime.load(path); model.logits([5])",
    "on a device": "model = runtime.load(path, device='CPU', hot=512); model.logits([5])",
    "cycle": "model = runtime.load(path); model.itself = model; model.logits([5])",
    "of a module": "import types; kept = types.ModuleType('kept'); sys.modules['kept'] = kept; kept.model = runtime.load(path)",
    "half-way": "model = runtime.load(path); generation = model.generate('We', 50); next(generation)",
    "only the generation": "generation = runtime.load(path).generate('We', 50); next(generation)",
    "half-way, asynchronous": """
import asyncio
model = runtime.load(path)
async def main():
    async for piece in model.generate('We', 50):
        break
asyncio.run(main())
""",
    "a daemon generates": """
import threading
model = runtime.load(path)
begun = threading.Event()
def work():
    while True:
        for piece in model.generate('We', 50):
            begun.set()
threading.Thread(target=work, daemon=True).start()
begun.wait()
""",
    "daemons generate": """
import threading
model = runtime.load(path, n_batch=8)
begun = threading.Semaphore(0)
def work():
    while True:
        for piece in model.generate('We the people ' * 10, 50):
            begun.release()
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
for _ in range(20):
    begun.acquire()
""",
    "closed by atexit, before ours": "model = runtime.load(path); import atexit; atexit.register(model.close)",
    "used by atexit": "model = runtime.load(path); import atexit; atexit.register(lambda: model.logits([5]))",
}


@pytest.mark.parametrize("body", ENDS.values(), ids=ENDS.keys())
def test_an_unclosed_model_is_silent_at_the_end(path: Path, body: str) -> None:
    done = run_program(f"import sys, runtime\npath = sys.argv[1]\n{body}", path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_resource_warning_says_what_was_not_closed(path: Path) -> None:
    done = run_program(
        "import sys, runtime\nmodel = runtime.load(sys.argv[1])", path, options=("-W", "always::ResourceWarning")
    )
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if not line.startswith("  ")] == [
        f"sys:1: ResourceWarning: unclosed model {path}"
    ]


def test_a_thread_may_go_on_when_the_main_one_has_ended(path: Path) -> None:
    program = """
import sys, threading, runtime
model = runtime.load(sys.argv[1])
def work():
    threading.main_thread().join()
    print(len(list(model.generate("We the people", 20, runtime.Sampling(temperature=0)))) > 10)
threading.Thread(target=work).start()
"""
    done = run_program(program, path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_what_atexit_calls_last_may_still_use_and_close_a_model(path: Path) -> None:
    """Functions that were registered before ours are called behind it."""
    program = """
import atexit, sys
@atexit.register
def last():
    print(model.logits([5]).shape, flush=True)
    model.close()
import runtime
model = runtime.load(sys.argv[1])
model.logits([5])
"""
    done = run_program(program, path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(1, 4096)\n", "")


@linux
def test_ctrl_c_while_loading_ends_the_program_soon(path: Path) -> None:
    program = """
import os, signal, sys, threading, time, runtime
from runtime.compute import repack
fill = repack._fill
def slow(*arguments):
    time.sleep(0.3)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    time.sleep(0.3)
    fill(*arguments)
    print("filled", flush=True)
repack._fill, repack._AT_ONCE = slow, 1
try:
    runtime.load(sys.argv[1], ffn="dense")
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    done = run_program(program, path)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["interrupted", "filled"], "")


# --- forks --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_says_that_the_model_is_not_its_own_and_may_load_another(path: Path) -> None:
    program = """
import gc, os, sys, runtime
model = runtime.load(sys.argv[1])
model.logits([5])
child = os.fork()
if child:
    print(os.waitpid(child, 0)[1], model.logits([5]).shape, flush=True)
else:
    try:
        model.logits([5])
    except runtime.UserError as error:
        print(error, flush=True)
    model.close()
    with runtime.load(sys.argv[1]) as own:
        print(own.logits([5]).shape, flush=True)
    del model
    gc.collect()
"""
    done = run_program(program, path)
    lines = ["the model was loaded before this process was forked", "(1, 4096)", "0 (1, 4096)"]
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, lines, "")
