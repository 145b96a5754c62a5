"""What a figure depends on and its table has to name: the CPU, what it can do, the kernels chosen for it, and programs
that keep it busy meanwhile.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from runtime.bindings.sparse_ffn import VARIANTS, variant

_CPUINFO = Path("/proc/cpuinfo")
# As Linux spells those that matter to products with packed weights, on x86-64 and on Arm.
_SETS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vbmi", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "avx10", "amx_int8", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
_SPIN = "print(flush=True)\nwhile True: pass"


def describe() -> dict[str, Any]:
    """`cpu`, its name; `instruction_sets` that it has, as Linux names them, empty on other systems; `kernels`, the
    variant of ours that computes.

    Raises UserError where LAZYNEURON_KERNELS names none.
    """
    text = _CPUINFO.read_text(encoding="utf-8", errors="replace") if _CPUINFO.exists() else ""
    return {**parse(text), "kernels": VARIANTS[variant()]}


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
