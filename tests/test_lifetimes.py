"""What is opened is closed: after any failure, on Ctrl-C, by finalisers, when the interpreter ends; and never while the worker reads it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import first_block
from handles import Handles, Injected, is_mapped
from oracle import random_ids

import runtime
from convert import convert
from runtime import ggml, logs
from runtime.gguf_file import GgufFile
from runtime.layers import BlockRunner
from runtime.model import Model
from runtime.sampling import Sampling
from runtime.tokenizer import Tokenizer
from runtime.worker import on_worker

ROOT = Path(__file__).parent.parent
GREEDY = Sampling(temperature=0)
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, sends signals to threads")


@pytest.fixture
def path(converted: Callable[..., Path]) -> Path:
    return converted("bundled", "q4_0")


@pytest.fixture(scope="module")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one-block")
    for name, content in first_block().items():
        (folder / name).write_bytes(content)
    convert(folder, folder / "m.gguf", type="q4_0", calibration="none")
    return folder / "m.gguf"


@pytest.fixture
def handles(path: Path, monkeypatch: pytest.MonkeyPatch) -> Handles:
    gc.collect()
    idle()
    return Handles(monkeypatch)


def idle() -> None:
    """Wait until the worker has done what it was asked to do."""
    on_worker(lambda: None)


def devices_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("ggml device")]


# --- failures -----------------------------------------------------------------------------------------------------------

LOADS: dict[str, dict[str, Any]] = {
    "cpu": {"ffn": "exact", "cpus": [0], "n_ctx": 256},
    "device": {"ffn": "exact", "device": "CPU", "hot": 512, "n_ctx": 256},
}


@linux
@pytest.mark.parametrize("options", LOADS.values(), ids=LOADS.keys())
def test_a_load_that_fails_at_any_call_leaves_nothing(
    one_block: Path, handles: Handles, options: dict[str, Any]
) -> None:
    """With an error that nobody expects: one of Python's own, such as MemoryError, is none of a user either."""

    def load_and_compute() -> None:
        with runtime.load(one_block, **options) as model:
            model._engine._dense_from = (2.0,)
            model._engine.logits(list(range(5, 25)), 1)
            assert np.isfinite(model.logits([5])).all()

    everywhere = os.sched_getaffinity(0)
    try:
        load_and_compute()  # measures devices, if no test before did
        handles.calls.clear()
        load_and_compute()
        counted = handles.calls.copy()
        for name, n in counted.items():
            if not name.endswith("_free"):
                for nth in sorted({1, n}):
                    handles.calls.clear()
                    handles.fails = name, nth
                    with pytest.raises(Injected, match=name):
                        load_and_compute()
                    idle()
                    assert handles.live == {}, (name, nth)
                    assert not is_mapped(one_block)
                    assert devices_threads() == []
        load_and_compute()
    finally:
        on_worker(lambda: os.sched_setaffinity(0, everywhere))


@linux
def test_a_block_runner_that_fails_leaves_nothing(path: Path, handles: Handles) -> None:
    for name in ("ggml_backend_cpu_set_n_threads", "ggml_backend_alloc_ctx_tensors", "ggml_backend_buffer_clear"):
        handles.calls.clear()
        handles.fails = name, 1
        with pytest.raises(Injected):
            BlockRunner(GgufFile(path), 1, 32)
        assert handles.live == {}
        assert not is_mapped(path)
    with BlockRunner(GgufFile(path), 1, 32) as runner:
        assert runner.embed(np.arange(5, dtype=np.int32)).shape == (5, 256)
        assert handles
    assert handles.live == {}
    with pytest.raises(runtime.UserError, match="the model is closed"):
        runner.embed(np.arange(5, dtype=np.int32))


@pytest.mark.parametrize("name", ["ggml_backend_graph_compute", "ggml_backend_tensor_set", "ggml_backend_tensor_get"])
@pytest.mark.parametrize("options", LOADS.values(), ids=LOADS.keys())
def test_a_batch_that_fails_changes_no_later_one(
    path: Path, handles: Handles, options: dict[str, Any], name: str
) -> None:
    ids = random_ids(12, 4000)
    options = {key: value for key, value in options.items() if key != "cpus"}
    with runtime.load(path, **options) as model:
        expected = model.logits(ids)
        handles.calls.clear()
        model.logits(ids)
        n = handles.calls[name]
        for nth in range(1, n + 1):
            handles.calls.clear()
            handles.fails = name, nth
            with pytest.raises(Injected):
                model.logits(ids)
            assert np.array_equal(model.logits(ids), expected)
    assert handles.live == {}


# --- Ctrl-C -------------------------------------------------------------------------------------------------------------


class Held:
    """Holds the worker in its next call of a function, until `release`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str = "ggml_backend_graph_compute") -> None:
        self.reached, self._released = threading.Event(), threading.Event()
        function = getattr(ggml, name)

        def held(*arguments: Any) -> Any:
            self.reached.set()
            assert self._released.wait(60)
            return function(*arguments)

        monkeypatch.setattr(ggml, name, held)

    def release(self) -> None:
        self._released.set()


def interrupt_when(event: threading.Event) -> threading.Thread:
    """Ctrl-C for the main thread, as soon as it waits for something behind `event`."""

    def press() -> None:
        assert event.wait(60)
        time.sleep(0.2)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


@linux
@pytest.mark.parametrize(
    ("options", "where"),
    [({}, "ggml_backend_graph_compute"), ({"device": "CPU", "hot": 512}, "ggml_backend_tensor_set")],
)
def test_ctrl_c_while_loading_frees_nothing_that_the_worker_reads(
    path: Path, handles: Handles, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], where: str
) -> None:
    """Held where it repacks matrices, or uploads them."""
    with runtime.load(path, **options):
        handles.calls.clear()
    held = Held(monkeypatch, where)
    pressing = interrupt_when(held.reached)
    with pytest.raises(KeyboardInterrupt):
        runtime.load(path, **options)
    pressing.join()
    assert is_mapped(path)
    assert len(handles)
    held.release()
    idle()
    assert handles.live == {}
    assert not is_mapped(path)
    assert devices_threads() == []
    assert handles.calls["ggml_backend_buffer_clear"] == 0  # it stopped, and did not go on to keys and values


@linux
def test_ctrl_c_in_a_long_prompt_stops_at_the_next_batch(
    path: Path, handles: Handles, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(64, 4000)
    with runtime.load(path, ffn="exact", n_batch=8) as model:
        expected = model.logits(ids)
        with monkeypatch.context() as patch:
            held = Held(patch)
            handles.calls.clear()
            pressing = interrupt_when(held.reached)
            with pytest.raises(KeyboardInterrupt):
                model.logits(ids)
            pressing.join()
            held.release()
            idle()
            assert handles.calls["ggml_backend_graph_compute"] == 1
        assert np.array_equal(model.logits(ids), expected)
    assert handles.live == {}


@linux
def test_ctrl_c_while_generating_leaves_the_model_usable(
    path: Path, handles: Handles, monkeypatch: pytest.MonkeyPatch
) -> None:
    with runtime.load(path) as model:
        expected = "".join(model.generate("We the people", 12, GREEDY))
        generation = model.generate("We the people", 12, GREEDY)
        begun = next(generation)
        with monkeypatch.context() as patch:
            held = Held(patch)
            pressing = interrupt_when(held.reached)
            with pytest.raises(KeyboardInterrupt):
                list(generation)
            pressing.join()
            held.release()
            idle()
        assert ("llama_sampler_free" in [free for free, _ in handles.live]) is False
        assert expected.startswith(begun)
        assert "".join(model.generate("We the people", 12, GREEDY)) == expected
    assert handles.live == {}


@linux
def test_ctrl_c_while_closing_closes_all_the_same(
    path: Path, handles: Handles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a second one does, in a `with` statement that was left by the first."""
    model = runtime.load(path)
    with monkeypatch.context() as patch:
        held = Held(patch)
        computing = threading.Thread(target=model.logits, args=([5],))
        with model:
            computing.start()
            pressing = interrupt_when(held.reached)
            with pytest.raises(KeyboardInterrupt):
                model.close()
            pressing.join()
            assert is_mapped(path)
            pressing = interrupt_when(held.reached)
            with pytest.raises(KeyboardInterrupt):
                model.close()
            pressing.join()
            held.release()
        computing.join()
    assert handles.live == {}
    assert not is_mapped(path)


# --- finalisers -----------------------------------------------------------------------------------------------------------


def run_program(text: str, *arguments: object, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", text, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_a_finaliser_on_the_worker_does_not_wait_for_it(path: Path) -> None:
    program = """
import gc, sys, runtime
from runtime.worker import on_worker
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
from runtime import repack
fill = repack._fill
def slow(*arguments):
    time.sleep(0.3)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    time.sleep(0.3)
    fill(*arguments)
    print("filled", flush=True)
repack._fill, repack._AT_ONCE = slow, 1
try:
    runtime.load(sys.argv[1])
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


# --- after close ------------------------------------------------------------------------------------------------------

USES: dict[str, Callable[[Model], object]] = {
    "logits": lambda m: m.logits([5]),
    "generate": lambda m: m.generate("x"),
    "generate ids": lambda m: m.generate([5]),
    "tokenize": lambda m: m.tokenize("x"),
    "detokenize": lambda m: m.detokenize([5]),
    "stats": lambda m: m.stats(),
    "layer_shares": lambda m: m.layer_shares(),
    "gate_shares": lambda m: m.gate_shares(),
    "reset_counts": lambda m: m.reset_counts(),
    "device_bytes": lambda m: m.device_bytes(),
    "encode": lambda m: m.tokenizer.encode("x"),
    "token_bytes": lambda m: m.tokenizer.token_bytes(5),
    "is_eog": lambda m: m.tokenizer.is_eog(5),
    "token_text": lambda m: m.tokenizer.token_text(5),
}


@pytest.fixture(scope="module")
def closed_model(converted: Callable[..., Path]) -> Model:
    with runtime.load(converted("bundled", "q4_0")) as model:
        list(model.generate("x", 1))
    return model


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_what_is_used_after_close_says_so(closed_model: Model, use: Callable[[Model], object]) -> None:
    with pytest.raises(runtime.UserError, match=r"q4_0-none.gguf`: the (model|tokenizer) is closed"):
        use(closed_model)
    closed_model.close()


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_generation_of_a_closed_model_ends_with_an_error(path: Path, handles: Handles, n: int) -> None:
    with runtime.load(path) as model:
        generation = model.generate("We the people", 50, GREEDY)
        for _ in range(n):
            next(generation)
    with pytest.raises(runtime.UserError, match="is closed"):
        list(generation)
    assert list(generation) == []
    assert handles.live == {}


def test_closing_while_others_generate(path: Path, handles: Handles) -> None:
    """From several threads at once: each close waits until all is freed, each generation ends with an error."""
    model = runtime.load(path)
    ends: list[str] = []
    begun = threading.Semaphore(0)

    def generate() -> None:
        try:
            while True:
                for _ in model.generate("We the people", 200):
                    begun.release()
        except runtime.UserError as error:
            ends.append(error.message)

    def close() -> None:
        model.close()
        ends.append(str(sum(count for (free, _), count in handles.live.items() if free.startswith("ggml_"))))

    threads = [threading.Thread(target=generate) for _ in range(3)]
    closers = [threading.Thread(target=close) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(9):
        begun.acquire()
    for thread in (*closers, *threads):
        if thread in closers:
            thread.start()
    for thread in (*closers, *threads):
        thread.join(60)
        assert not thread.is_alive()
    assert sorted(ends)[:3] == ["0"] * 3
    assert all("is closed" in end for end in sorted(ends)[3:])
    assert handles.live == {}


# --- generations ------------------------------------------------------------------------------------------------------


def test_a_generation_that_is_never_iterated_holds_nothing(path: Path, handles: Handles) -> None:
    with runtime.load(path) as model:
        kept = [model.generate("We the people") for _ in range(3)]
        assert "llama_sampler_free" not in [free for free, _ in handles.live]
        assert len({generation.seed for generation in kept}) == 3
    assert handles.live == {}


def test_a_callback_or_another_thread_may_close_a_generation(path: Path, handles: Handles) -> None:
    with runtime.load(path) as model:
        closing = model.generate("We the people", 50, GREEDY, on_token=lambda _: closing.close())
        list(closing)
        assert len(closing.token_ids) == 1

        def close_elsewhere(_: object) -> None:
            thread = threading.Thread(target=generation.close)
            thread.start()
            thread.join()

        generation = model.generate("We the people", 50, GREEDY, on_token=close_elsewhere)
        next(generation)
        assert list(generation) == []
        assert len(generation.token_ids) == 1
        assert "llama_sampler_free" not in [free for free, _ in handles.live]


def test_closing_an_asynchronous_generation_from_another_task(path: Path, handles: Handles) -> None:
    with runtime.load(path) as model:

        async def main() -> int:
            begun = asyncio.Event()
            loop = asyncio.get_running_loop()
            generation = model.generate(
                "We the people", 400, GREEDY, on_token=lambda _: loop.call_soon_threadsafe(begun.set)
            )

            async def consume() -> None:
                async for _ in generation:
                    pass

            task = asyncio.create_task(consume())
            await begun.wait()
            generation.close()
            await asyncio.wait_for(task, 60)
            return len(generation.token_ids)

        assert asyncio.run(main()) < 400
    assert handles.live == {}


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_get_the_bytes_of_their_own_tokens(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread asks between libllama's answer and the moment that it is read."""
    from runtime import llama

    with Tokenizer(tiny_gguf) as tokenizer:
        expected = [tokenizer.token_bytes(token) for token in (400, 401)]
        piece = llama.llama_token_to_piece

        def interrupted(vocab: Any, token: int, *rest: Any) -> Any:
            answer = piece(vocab, token, *rest)
            if token == 400:
                thread = threading.Thread(target=lambda: found.append(tokenizer.token_bytes(401)))
                thread.start()
                thread.join()
            return answer

        monkeypatch.setattr(llama, "llama_token_to_piece", interrupted)
        found: list[bytes] = []
        assert [tokenizer.token_bytes(400), *found] == expected


def test_a_tokenizer_is_freed_when_its_last_call_returns(
    path: Path, handles: Handles, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime import llama

    tokenizer = Tokenizer(path)
    expected = tokenizer.encode("We the people")
    tokenize, inside, go_on = llama.llama_tokenize, threading.Event(), threading.Event()

    def held(*arguments: Any) -> Any:
        inside.set()
        assert go_on.wait(60)
        assert handles.live  # not freed under our feet
        return tokenize(*arguments)

    monkeypatch.setattr(llama, "llama_tokenize", held)
    found: list[list[int]] = []
    thread = threading.Thread(target=lambda: found.append(tokenizer.encode("We the people")))
    thread.start()
    assert inside.wait(60)
    tokenizer.close()
    go_on.set()
    thread.join()
    assert found == [expected]
    assert handles.live == {}


def test_each_thread_reads_its_own_log() -> None:
    inside, go_on = threading.Event(), threading.Event()
    logs_of: dict[str, list[str]] = {}

    def say(text: bytes) -> None:
        logs._print_or_keep(3, text, None)

    def other() -> None:
        with logs.captured_log() as lines:
            say(b"of the other\n")
            inside.set()
            assert go_on.wait(60)
        logs_of["other"] = lines

    thread = threading.Thread(target=other)
    with logs.captured_log() as lines:
        thread.start()
        assert inside.wait(60)
        say(b"of this one\n")
    go_on.set()
    thread.join()
    assert (lines, logs_of["other"]) == (["of this one"], ["of the other"])
