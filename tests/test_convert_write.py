"""A file is written whole or not at all, in bounded memory: limits, signals and memory in real processes."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import copy_checkpoint
from plain import PLAIN
from safetensors.numpy import save_file

Folder = Callable[[str], Path]
ROOT = Path(__file__).parent.parent
MB = 1 << 20

WIDTH, NEURONS, LAYERS = 1024, 4096, 16  # 33 MB of F16 per layer, no tensor above 8.4 MB


@pytest.fixture(scope="module")
def large(checkpoint: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 550 MB in two shards, none of whose tensors is above 8.4 MB."""
    config = {"hidden_size": WIDTH, "intermediate_size": NEURONS, "num_hidden_layers": LAYERS, "head_dim": WIDTH // 4}
    folder = copy_checkpoint(checkpoint("llama-tied"), tmp_path_factory.mktemp("large") / "x", **config)
    (folder / "model.safetensors").unlink()
    numbers = np.random.default_rng(0).standard_normal(WIDTH * NEURONS).astype(np.float16)
    weight_map = {}
    for shard in (0, 1):
        shapes = {"model.embed_tokens": (4096, WIDTH), "model.norm": (WIDTH,)} if shard == 0 else {}
        for i in range(shard * LAYERS // 2, (shard + 1) * LAYERS // 2):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer_shapes().items()}
        file = f"model-{shard + 1:05}-of-00002.safetensors"
        tensors = {f"{name}.weight": numbers[: int(np.prod(shape))].reshape(shape) for name, shape in shapes.items()}
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def layer_shapes() -> dict[str, tuple[int, ...]]:
    return {
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (WIDTH // 4, WIDTH),
        "self_attn.v_proj": (WIDTH // 4, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (NEURONS, WIDTH),
        "mlp.up_proj": (NEURONS, WIDTH),
        "mlp.down_proj": (WIDTH, NEURONS),
    }


def peak_memory(code: str) -> int:
    """Largest resident set of a Python process that runs `code`, in bytes; pages of mapped files included."""
    # Not ru_maxrss: Linux starts it at the peak of the process that forked, which is this one with torch in it.
    code += "\nimport re; print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return int(done.stdout.splitlines()[-1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_model(large: Path, tmp_path: Path) -> None:
    imports = peak_memory("import convert; convert.convert")
    # The bound must be one that holding a shard would break.
    shard = large / "model-00001-of-00002.safetensors"
    read_all = f"""
import convert, safetensors
with safetensors.safe_open({str(shard)!r}, framework="np") as file:
    for name in file.keys():
        file.get_slice(name)[:].sum()
"""
    bound = imports + 120 * MB
    assert peak_memory(read_all) > bound
    out = tmp_path / "x.gguf"
    assert (
        peak_memory(f"import convert; convert.convert({str(large)!r}, {str(out)!r}, threads=2, calibration='none')")
        < bound
    )
    assert out.stat().st_size > 500 * MB


def start(large: Path, out: Path) -> subprocess.Popen[str]:
    """A conversion that takes a while, some way into writing its tensors."""
    command = [
        sys.executable,
        "-m",
        "convert",
        str(large),
        str(out),
        "--type",
        "q4_k",
        "--threads",
        "1",
        "--force",
        *PLAIN,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while process.poll() is None:
        partial = list(out.parent.glob(f".*/{out.name}"))
        if partial and partial[0].stat().st_size > 2 * MB:
            return process
        time.sleep(0.01)
    raise AssertionError(f"ended too soon\n{process.communicate()[1]}")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("existing", [None, "an older file"])
def test_an_interrupted_run_leaves_nothing(
    number: int, status: int, existing: str | None, large: Path, tmp_path: Path
) -> None:
    out = tmp_path / "OUT.gguf"
    if existing:
        out.write_text(existing)
    process = start(large, out)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == status
    assert "Traceback" not in stderr
    assert [file.read_text() for file in tmp_path.iterdir()] == ([existing] if existing else [])


def test_a_file_size_limit(checkpoint: Folder, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MB, MB))

    out = tmp_path / "x.gguf"
    command = [sys.executable, "-m", "convert", str(checkpoint("bundled")), str(out), *PLAIN]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == f"error: `{out}`: File too large"
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())
