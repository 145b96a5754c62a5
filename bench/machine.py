"""What a figure depends on and its table has to name: the day, the CPU, what it can do, what ggml was built for, the
kernels chosen, and programs that keep the CPU busy meanwhile.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from runtime.bindings.ffi import GGML_CPU
from runtime.bindings.sparse_ffn import VARIANTS, variant

_CPUINFO = Path("/proc/cpuinfo")
# As Linux spells those that matter to products with packed weights, on x86-64 and on Arm.
_SETS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vbmi", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "avx10", "amx_int8", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
# What ggml says that it was compiled for: functions of ggml-cpu.h.
_GGML_HAS = (
    "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_int8", "neon",
    "dotprod", "matmul_int8", "sve",
)  # fmt: skip
_SPIN = "print(flush=True)\nwhile True: pass"


def describe() -> dict[str, Any]:
    """`date`, of today, by UTC; `cpu`, its name; `instruction_sets` that it has, as Linux names them, empty on other
    systems; `ggml`, those that ggml was built for; `kernels`, the variant of ours that computes.

    Raises UserError where LAZYNEURON_KERNELS names none.
    """
    text = _CPUINFO.read_text(encoding="utf-8", errors="replace") if _CPUINFO.exists() else ""
    ggml = [name for name in _GGML_HAS if GGML_CPU.symbol(f"ggml_cpu_has_{name}")()]
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return {"date": date, **parse(text), "ggml": ggml, "kernels": VARIANTS[variant()]}


def parse(cpuinfo: str) -> dict[str, Any]:
    """`cpu` and `instruction_sets` as /proc/cpuinfo has them."""
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    cpu = name[1].strip() if name else platform.processor() or platform.machine()
    return {"cpu": cpu, "instruction_sets": [s for s in _SETS if s in has]}


@contextmanager
def busy(n: int) -> Iterator[None]:
    """`n` processes that compute all the time, until the end; all of them have started when the body begins."""
    with ExitStack() as stack:
        for _ in range(n):
            process = subprocess.Popen([sys.executable, "-S", "-c", _SPIN], stdout=subprocess.PIPE)
            stack.callback(_end, process)
            assert process.stdout
            process.stdout.readline()
        yield


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()
