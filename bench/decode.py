"""Decoding speed, side by side: llama.cpp's own runtime, and ours in `dense` and `exact` mode, taking turns in one run.

    python -m bench.decode MODEL.gguf [--threads N] [--tokens N] [--rounds N]

Prints medians with their spread, ratios to llama.cpp, bytes read per token and the speed that these bytes allow at the memory bandwidth measured in the same run; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import runtime
from bench import stock
from runtime import ggml
from runtime.engine import on_worker, physical_cores
from runtime.errors import run_command
from runtime.traffic import Activity, bytes_per_token
from runtime.weights import new_context

PROMPT = 16  # tokens in the context before decoding starts


@dataclass
class Runner:
    """One contender: `decode(n)` generates n tokens after a short prompt and returns the seconds that took."""

    name: str
    decode: Callable[[int], float]
    close: Callable[[], None]
    bytes_per_token: Callable[[], float]
    speeds: list[float] = field(default_factory=list)  # tokens per second


def ours(path: Path, ffn: str, threads: int) -> Runner:
    """Our runtime in one FFN mode."""
    model = runtime.load(path, ffn=ffn, threads=threads)

    def decode(n: int) -> float:
        engine, ids = model._engine, [1] * PROMPT
        engine.reset()
        logits = engine.logits(ids, 1)
        engine.reset_counts()
        start = time.perf_counter()
        for _ in range(n):
            ids.append(int(logits[0].argmax()))
            logits = engine.logits(ids, 1)
        return time.perf_counter() - start

    def read() -> float:
        return bytes_per_token(
            model.structure, model.tensors, Activity(ffn, model.layer_shares(), model.gate_shares())
        ).total

    return Runner(ffn, decode, model.close, read)


def llama_cpp(path: Path, threads: int, bytes_read: Callable[[], float]) -> Runner:
    """llama.cpp through llama-cpp-python, flash attention on, on the same thread as ours so that both use one OpenMP team."""
    import llama_cpp as lib  # noqa: PLC0415  (only here: its import is slow, and the product never needs it)

    def silent(_level: int, _text: bytes, _user: Any) -> None: ...

    callback = lib.llama_log_callback(silent)
    lib.llama_log_set(callback, None)
    llm = on_worker(
        lambda: lib.Llama(
            str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False
        )
    )

    def run(ids: list[int]) -> int:
        tokens = (lib.llama_token * len(ids))(*ids)  # the batch only points to it
        if lib.llama_decode(llm.ctx, lib.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        return int(np.ctypeslib.as_array(lib.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).argmax())

    def decode(n: int) -> float:
        lib.llama_memory_clear(lib.llama_get_memory(llm.ctx), True)
        token = run([1] * PROMPT)
        start = time.perf_counter()
        for _ in range(n):
            token = run([token])
        return time.perf_counter() - start

    def close() -> None:
        on_worker(llm.close)
        del callback_kept[:]

    callback_kept = [callback]
    return Runner("llama_cpp", lambda n: on_worker(lambda: decode(n)), close, bytes_read)


def memory_bandwidth(threads: int, size: int = 1 << 29) -> float:
    """Bytes per second that ggml's own product of a large F16 matrix with a vector reaches: the best of a few passes."""
    return on_worker(lambda: _memory_bandwidth(threads, size))


def _memory_bandwidth(threads: int, size: int) -> float:
    width = 8192
    backend = ggml.ggml_backend_cpu_init()
    ggml.ggml_backend_cpu_set_n_threads(backend, threads)
    ctx = new_context(8, ggml.ggml_graph_overhead_custom(8, False))
    matrix = ggml.ggml_new_tensor_2d(ctx, ggml.F16, width, size // (2 * width))
    vector = ggml.ggml_new_tensor_1d(ctx, ggml.F32, width)
    graph = ggml.ggml_new_graph_custom(ctx, 8, False)
    ggml.ggml_build_forward_expand(graph, ggml.ggml_mul_mat(ctx, matrix, vector))
    buffer = ggml.ggml_backend_alloc_ctx_tensors(ctx, backend)
    ggml.ggml_backend_buffer_clear(buffer, 1)
    best = 0.0
    for _ in range(6):
        start = time.perf_counter()
        ggml.ggml_backend_graph_compute(backend, graph)
        best = max(best, size / (time.perf_counter() - start))
    ggml.ggml_backend_buffer_free(buffer)
    ggml.ggml_free(ctx)
    ggml.ggml_backend_free(backend)
    return best


def measure(path: Path, threads: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Let the contenders take turns; returns the figures that are printed as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        twin = Path(folder) / "stock.gguf"
        stock.write(path, twin)
        dense = ours(path, "dense", threads)
        runners = [llama_cpp(twin, threads, dense.bytes_per_token), dense, ours(path, "exact", threads)]
        try:
            for round_number in range(rounds + 1):  # the first one warms up
                for runner in runners:
                    seconds = runner.decode(tokens)
                    if round_number:
                        runner.speeds.append(tokens / seconds)
            return figures(runners, memory_bandwidth(threads), threads, path)
        finally:
            for runner in runners:
                runner.close()


def figures(runners: list[Runner], bandwidth: float, threads: int, path: Path) -> dict[str, Any]:
    """Medians, spread, bytes, bounds and ratios."""
    result: dict[str, Any] = {"model": path.name, "threads": threads, "bandwidth_bytes_per_s": bandwidth}
    for r in runners:
        read = r.bytes_per_token()
        result[r.name] = {
            "tokens_per_s": statistics.median(r.speeds),
            "min": min(r.speeds),
            "max": max(r.speeds),
            "bytes_per_token": read,
            "bound_tokens_per_s": bandwidth / read,
        }
    base = result["llama_cpp"]["tokens_per_s"]
    result["ratios"] = {r.name: result[r.name]["tokens_per_s"] / base for r in runners if r.name != "llama_cpp"}
    return result


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table for people."""
    table = Table(
        title=f"decoding {result['model']}, {result['threads']} threads, memory {result['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s"
    )
    for column in ("", "tokens/s", "min - max", "x llama.cpp", "MB/token", "bound tokens/s"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("llama_cpp", "dense", "exact"):
        r = result[name]
        ratio = result["ratios"].get(name, 1.0)
        table.add_row(
            name,
            f"{r['tokens_per_s']:.1f}",
            f"{r['min']:.1f} - {r['max']:.1f}",
            f"{ratio:.2f}",
            f"{r['bytes_per_token'] / 1e6:.2f}",
            f"{r['bound_tokens_per_s']:.1f}",
        )
    console.print(table)
    console.print("The bound is bandwidth / bytes per token; a model that fits the CPU's caches may exceed it.")


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode", description="Decoding speed beside llama.cpp on the same weights."
    )
    parser.add_argument("model", type=Path, help="a converted GGUF file")
    parser.add_argument(
        "--threads", type=int, default=physical_cores(), help="threads for every contender (default: physical cores)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded per turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns that count")
    args = parser.parse_args()
    result = measure(args.model, args.threads, args.tokens, args.rounds)
    show(result, Console())
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_command(main))
