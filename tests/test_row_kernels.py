"""The row kernels alone, by a C++ program with its own oracle (tests/native): on this machine, and under an emulator of aarch64."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.bindings import sparse_ffn
from runtime.bindings.sparse_ffn import VARIANTS

ROOT = Path(__file__).parent.parent
X86 = platform.machine() in ("x86_64", "AMD64")
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
X86_FORMATS = "f32 f16 bf16 q8_0 q4_0 q4_1 q5_0 q5_1 iq4_nl q4_K q5_K q6_K iq4_xs"
NEON_FORMATS = "f32 f16 bf16 q8_0 q4_0 q4_K q6_K signs"
ARM64 = (
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    f"-DCMAKE_CXX_COMPILER={CROSS_COMPILER}",
    "-DCMAKE_EXE_LINKER_FLAGS=-static",
)


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [p for p in programs if not shutil.which(p)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


PROGRAMS = ("row_kernels_test", "tiles_test")


def build(folder: str, *options: str, targets: tuple[str, ...] = PROGRAMS) -> Path:
    """The row kernels' program, in build/<folder>, the tiles' beside it: only what changed is compiled again."""
    out = ROOT / "build" / folder
    configure = ["cmake", "-S", ROOT / "runtime/native", "-B", out, f"-DPython_EXECUTABLE={sys.executable}", *options]
    for command in (configure, ["cmake", "--build", out, "--parallel", "2", "--target", *targets]):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"LD_PRELOAD": ""})
        assert done.returncode == 0, done.stdout + done.stderr
    return out / "row_kernels_test"


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def of_this_machine() -> list[str]:
    """Which builds test the variants of this machine. The one with AVX-VNNI emulated has all the others as they are, so
    a CPU without these instructions needs no other.
    """
    emulated = ["emulated"] if X86 and "avx2" in sparse_ffn.variants() else []
    return [*emulated, "as it is"] if not emulated or "avxvnni" in sparse_ffn.variants() else emulated


@needs("cmake", "c++")
@pytest.mark.skipif(sys.platform == "win32", reason="the program wants mmap")
@pytest.mark.parametrize("avx_vnni", of_this_machine())
def test_row_kernels_of_this_machine(avx_vnni: str) -> None:
    """Emulated: also the emulation against the instructions, where this CPU has them in any encoding."""
    variants, folder, options, targets = sparse_ffn.variants()[1:], "row-kernels", list[str](), PROGRAMS
    if avx_vnni == "emulated":
        variants = [name for name in VARIANTS if name in {*variants, "avxvnni"}]
        folder, options = f"{folder}-avxvnni", ["-DLZN_EMULATE_AVXVNNI=ON"]
        targets = (*targets, "avxvnni_emulated_test")
    program = build(folder, *options, targets=targets)
    tested = run(program, *variants).splitlines()[:-1]
    assert [line.split(":")[0] for line in tested] == variants
    if X86:
        assert {line.split(": ")[1] for line in tested} <= {f"{X86_FORMATS} signs"}
    tiles = {"avx2": "q4_0", "avxvnni": "q4_0"}
    lines = run(program.parent / "tiles_test", *variants).splitlines()[:-1]
    assert lines == [f"{variant}: {tiles.get(variant, 'q4_0 q8_0')}" for variant in variants]
    if avx_vnni == "emulated":
        assert run(program.parent / "avxvnni_emulated_test").endswith(" compared, 0 wrong\n")


@needs("cmake", CROSS_COMPILER, EMULATOR)
@pytest.mark.skipif(platform.machine() == "aarch64", reason="aarch64 itself runs the test above")
def test_row_kernels_of_aarch64() -> None:
    """Under an emulator: of a CPU with i8mm, of one with dotprod alone, of one with neither. The library is compiled too."""
    program = build("row-kernels-aarch64", *ARM64, targets=(*PROGRAMS, "lazyneuron"))
    for tested, of in ((program, NEON_FORMATS), (program.parent / "tiles_test", "q4_0 q8_0")):
        found = run(EMULATOR, "-cpu", "max", tested, "neon", "i8mm")
        assert found.startswith(f"neon: {of}\ni8mm: {of}\n")
        assert run(EMULATOR, "-cpu", "neoverse-n1", tested, "neon").splitlines()[:-1] == [f"neon: {of}"]
        assert run(EMULATOR, "-cpu", "cortex-a53", tested) == "0 checks, 0 failed\n"


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="reads /proc/cpuinfo of x86-64")
def test_variants_are_those_of_the_cpu_as_the_system_describes_it() -> None:
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())  # type: ignore[index]
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = {f"avx512{name}" for name in ("f", "dq", "bw", "vl", "vbmi", "_vnni", "_bf16", "_vpopcntdq")}
    needed = {"portable": set(), "avx2": avx2, "avxvnni": avx2 | {"avx_vnni"}, "avx512": avx2 | avx512}
    assert sparse_ffn.variants() == [name for name, wanted in needed.items() if wanted <= flags]
