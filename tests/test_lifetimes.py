"""What is opened is closed, whatever fails in between and whenever Ctrl-C comes; and nothing is freed while the worker reads it."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import first_block
from handles import Handles, Injected, idle, is_mapped, run_program
from oracle import random_ids

import runtime
from convert import convert
from runtime.base.worker import on_worker
from runtime.bindings import ggml
from runtime.bindings import ggml_devices as gd
from runtime.block_runner import BlockRunner
from runtime.hybrid import devices
from runtime.model_file.reader import GgufFile
from runtime.text.sampling import Sampling

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
            model._sequence.logits(list(range(5, 25)))
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
        with pytest.raises(Injected), BlockRunner(GgufFile(path), 1, 32) as runner:
            runner.block(0, np.zeros((5, 256), np.float32))
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


def test_a_queue_gives_back_its_events_whatever_fails(
    path: Path, handles: Handles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU in the place of a device that queues by itself, with events that are numbers."""
    events: set[int] = set()
    numbers = itertools.count(1)

    def new(_: object) -> gd.EventP:
        events.add(number := next(numbers))
        return gd.EventP(number)

    monkeypatch.setattr(gd, "ggml_backend_event_new", new)
    monkeypatch.setattr(gd, "ggml_backend_event_free", lambda event: events.remove(event.value))
    monkeypatch.setattr(gd, "ggml_backend_event_record", lambda *_: None)
    monkeypatch.setattr(gd, "ggml_backend_event_synchronize", lambda _: None)
    found = devices.devices
    monkeypatch.setattr(devices, "devices", lambda: [replace(d, asynchronous=True, events=True) for d in found()])
    ids = random_ids(12, 4000)
    with runtime.load(path, ffn="exact", device="CPU", hot=512) as model:
        assert devices_threads() == []
        expected = model.logits(ids)
        handles.calls.clear()
        model.logits(ids)
        for nth in range(1, handles.calls["ggml_backend_graph_compute_async"] + 1):
            handles.calls.clear()
            handles.fails = "ggml_backend_graph_compute_async", nth
            with pytest.raises(Injected):
                model.logits(ids)
            assert np.array_equal(model.logits(ids), expected)
        assert 0 < len(events) < 4
    assert events == set()
    assert handles.live == {}


@pytest.mark.parametrize("target", ["missing/t.json", "."])
def test_a_trace_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    path: Path, tmp_path: Path, handles: Handles, target: str
) -> None:
    with pytest.raises(runtime.UserError, match=r"no such folder|a folder, expected a file name"):
        runtime.load(path, trace=tmp_path / target)
    assert handles.calls["ggml_backend_cpu_init"] == 0


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
    [({"ffn": "dense"}, "ggml_backend_graph_compute"), ({"device": "CPU", "hot": 512}, "ggml_backend_tensor_set")],
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


@linux
def test_ctrl_c_is_not_lost_where_native_code_calls_back(path: Path) -> None:
    """Python passes over an interrupt that comes within a callback: libllama's log of a vocabulary is hundreds of them."""
    program = """
import signal, sys, threading
from runtime.bindings import logs
from runtime.text.tokenizer import Tokenizer
keep, main, presses = logs._print_or_keep, threading.main_thread().ident, [signal.SIGINT]
def pressed(*arguments):
    if presses:
        signal.pthread_kill(main, presses.pop())
    keep(*arguments)
logs._on_log = type(logs._on_log)(pressed)
try:
    Tokenizer(sys.argv[1])
    print("lost")
except KeyboardInterrupt:
    print("interrupted")
"""
    done = run_program(program, path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")
