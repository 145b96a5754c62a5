"""What goes wrong on a device: one clear line, exit status 1, nothing left running, and the next model loads."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import command
from oracle import random_ids, relative

import runtime
from runtime.bindings import ggml
from runtime.bindings import ggml_devices as gd
from runtime.errors import UserError
from runtime.hybrid import devices

ROOT = Path(__file__).parent.parent


def load(path: Path, **options: Any) -> runtime.Model:
    return runtime.load(path, **{"device": "CPU", "hot": 512, "kv_type": "f32", "ffn": "exact"} | options)


@pytest.fixture
def path(converted: Any) -> Path:
    found: Path = converted("bundled")
    with load(found) as model:  # resolves ggml's functions, which replaces what a test would patch
        model.logits([5])
    return found


def computing_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("ggml device")]


@pytest.mark.parametrize(
    ("function", "nth"),
    [
        ("ggml_backend_alloc_ctx_tensors_from_buft", 0),
        ("ggml_backend_alloc_ctx_tensors", 0),
        ("ggml_backend_buft_alloc_buffer", 0),
        ("ggml_backend_buft_alloc_buffer", 1),
    ],
)
def test_memory_that_does_not_suffice(path: Path, monkeypatch: pytest.MonkeyPatch, function: str, nth: int) -> None:
    """Weights, keys and values, hidden states on either side."""
    module: Any = ggml if hasattr(ggml, function) else gd
    allocate, calls = getattr(module, function), 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return ggml.BufferP() if calls > nth else allocate(*arguments)

    monkeypatch.setattr(module, function, failing)
    with pytest.raises(UserError, match="not enough memory"), load(path) as model:
        model.logits(random_ids(5, 4000))
        pytest.fail(f"only {calls} allocations")
    assert computing_threads() == []
    monkeypatch.undo()
    with load(path) as model:
        assert np.isfinite(model.logits([5])).all()


@pytest.mark.parametrize("what", ["ggml_gallocr_reserve", "ggml_gallocr_alloc_graph"])
def test_compute_buffers_that_do_not_fit(path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(ggml, what, lambda *_: False)
    with pytest.raises(UserError, match=r"not enough memory for .*compute buffer"), load(path) as model:
        model.logits([5])
    assert computing_threads() == []


def refuse(monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    supports = ggml.ggml_backend_dev_supports_op

    def answer(device: Any, op: ggml.TensorP) -> bool:
        name = ggml.ggml_op_name(op.struct.op).decode()
        return name != operation and bool(supports(device, op))

    monkeypatch.setattr(ggml, "ggml_backend_dev_supports_op", answer)


def test_an_operation_that_a_device_refuses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "SET_ROWS")
    with pytest.raises(UserError, match=r"device CPU: cannot compute .*SET_ROWS: .*f32"), load(path) as model:
        model.logits([5])
    assert computing_threads() == []


def test_attention_that_a_device_refuses_is_built_otherwise(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(20, 4000)
    with load(path) as model:
        flash = model.logits(ids)
    refuse(monkeypatch, "FLASH_ATTN_EXT")
    with load(path) as model:
        assert relative(flash, model.logits(ids)) <= 1e-4


def test_a_graph_that_fails_on_the_device(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = ggml.ggml_backend_graph_compute

    def failing(backend: Any, graph: Any) -> int:
        return -1 if threading.current_thread().name.startswith("ggml device") else int(compute(backend, graph))

    with load(path) as model:
        monkeypatch.setattr(ggml, "ggml_backend_graph_compute", failing)
        with pytest.raises(UserError, match=r"device CPU: ggml could not compute the graph \(status -1\)"):
            model.logits([5])
        monkeypatch.undo()
        assert np.isfinite(model.logits([5])).all()
    assert computing_threads() == []


def test_a_failure_ends_the_command_with_status_1(path: Path) -> None:
    done = command("runtime", "complete", path, "-p", "x", "--device", "CPU", "--vram-budget", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert "memory budget `x`" in done.stderr


# --- devices that are not there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"device": "CUDA7", "hot": None}, "no device `CUDA7`, found CPU"),
        ({"device": "none", "vram_budget": 3, "hot": None}, "a memory budget without a device"),
        ({"device": "none", "hot": 32}, "a memory budget without a device"),
        ({"device": "CPU", "hot": 33}, "33 hot neurons, expected one of 0, 32, 64 .. 1024"),
        ({"device": "CPU", "hot": (32, 32)}, "hot neurons of 2 blocks, expected one number or 6"),
        ({"device": "CPU", "hot": None, "vram_budget": "1,1"}, "2 memory budgets for 1 devices"),
        ({"device": "CPU", "hot": None, "vram_budget": "lots"}, "memory budget `lots`, expected GiB"),
        ({"device": "CPU,", "hot": None}, "device `CPU,`, expected a name"),
    ],
)
def test_wishes_that_make_no_sense(path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        load(path, **options)


def test_a_device_may_not_be_named_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = devices.DeviceInfo(9, "GPU0", "", "X", "GPU", 1, 1, True, True, True)
    npu = devices.DeviceInfo(8, "NPU0", "", "X", "ACCEL", 0, 0, False, False, False)
    monkeypatch.setattr(devices, "devices", lambda: [gpu, npu])
    assert devices.find(("gpu0",)) == devices.find(("auto",)) == [gpu]
    with pytest.raises(UserError, match="device `GPU0` is named twice"):
        devices.find(("GPU0", "gpu0"))
    with pytest.raises(UserError, match="device `NPU0` is of type ACCEL, expected a GPU"):
        devices.find(("npu0",))


@pytest.mark.parametrize("text", ["CPU,CPU", " CPU , cpu", "cpu,\tCPU"])
def test_spaces_and_case_in_names_of_devices_do_not_matter(text: str) -> None:
    assert [d.name for d in devices.find(devices.parse_names(text))] == ["CPU", "CPU"]
    assert devices.find(devices.parse_names(" None ")) == []


@pytest.mark.parametrize("text", ["", " ", ",", "CPU,", ",CPU", None, ["CPU"]])
def test_names_of_devices_that_are_none(text: Any) -> None:
    with pytest.raises(UserError, match="expected a name, or several with commas"):
        devices.parse_names(text)


# --- ggml gives up ----------------------------------------------------------------------------------------------------

BUSY = """
import threading, time
from runtime.bindings import ggml
from runtime.bindings.sparse_ffn import exit_on_abort
exit_on_abort()
threading.Thread(target=lambda: time.sleep(3600)).start()
"""


def ends(code: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(  # its other thread is not waited for
        [sys.executable, "-c", BUSY + code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 1, done.stderr
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ggml gave up: ")
    assert hint.startswith("hint: ")
    return done


def test_an_assertion_of_ggml_is_one_line() -> None:
    done = ends("""
context = ggml.ggml_init(ggml.ggml_init_params(mem_size=1 << 16, mem_buffer=None, no_alloc=True))
a, b = ggml.ggml_new_tensor_1d(context, 0, 3), ggml.ggml_new_tensor_1d(context, 0, 7)
ggml.ggml_mul_mat(context, a, b)
""")
    assert "GGML_ASSERT" in done.stderr
    assert not done.stderr.startswith("error: ggml gave up: /")


def test_an_exception_in_a_backend_is_one_line(tmp_path: Path) -> None:
    """As drivers' wrappers throw when a device is lost; in a thread of its own, as a stand-in's calls are made."""
    source, library = tmp_path / "lost.cpp", tmp_path / "lost.so"
    source.write_text('#include <stdexcept>\nextern "C" void lose() { throw std::runtime_error("device lost"); }\n')
    subprocess.run(["c++", "-shared", "-fPIC", "-o", library, source], check=True)
    done = ends(f"import ctypes\nthreading.Thread(target=ctypes.CDLL({str(library)!r}).lose).start()")
    assert "error: ggml gave up: device lost\n" in done.stderr
