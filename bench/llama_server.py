"""llama.cpp's server of the pinned release: compiled once from the source that llama-cpp-python ships, and kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from runtime.base.cache_folder import cache_folder
from runtime.base.processors import default_threads
from runtime.errors import UserError

# One program that needs no library beside it: it is moved when it is complete. No tests, no page, nothing to fetch.
_OFF = (
    "BUILD_SHARED_LIBS",
    "LLAMA_BUILD_EXAMPLES",
    "LLAMA_BUILD_TESTS",
    "LLAMA_BUILD_UI",
    "LLAMA_OPENSSL",
    "LLAMA_USE_PREBUILT_UI",
)
_PACKAGE = "llama-cpp-python"


def kept() -> Path:
    """Where the program is kept, or will be. Raises UserError where there is no folder for it."""
    folder = cache_folder()
    if folder is None:
        raise UserError("no home folder to keep llama-server in", "set LAZYNEURON_CACHE to a folder")
    suffix = ".exe" if sys.platform == "win32" else ""
    return folder / f"llama-server-{metadata.version(_PACKAGE)}-{sysconfig.get_platform()}{suffix}"


def llama_server() -> Path:
    """The program, compiled where it is not there yet: minutes, said on stderr. Raises UserError where that fails."""
    program = kept()
    if not program.exists():
        if not shutil.which("cmake"):
            raise UserError("cmake is missing, which llama-server needs", "install it, or use --no-llama-server")
        print(f"compiling {_PACKAGE}'s llama-server into {program}: this takes some 10 minutes", file=sys.stderr)
        program.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="building.", dir=program.parent) as work:
            _build(Path(work), program.with_name(f"{program.name}.log")).replace(program)
    return program


def _build(work: Path, log: Path) -> Path:
    """The compiled program, in a folder `work` that is empty before; log: what the tools say."""
    log.unlink(missing_ok=True)
    wanted = f"{_PACKAGE}=={metadata.version(_PACKAGE)}"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", _PACKAGE, "--dest", str(work)]
    _run([sys.executable, "-m", "pip", "download", *options, wanted], log)
    shutil.unpack_archive(next(work.glob("*.tar.gz")), work / "source")
    source = next((work / "source").glob("*/vendor/llama.cpp"))
    build = work / "build"
    settings = ["-DCMAKE_BUILD_TYPE=Release", *(f"-D{name}=OFF" for name in _OFF)]
    _run(["cmake", "-S", str(source), "-B", str(build), *settings], log)
    jobs = str(default_threads())
    _run(["cmake", "--build", str(build), "--config", "Release", "--target", "llama-server", "--parallel", jobs], log)
    return next(path for path in build.rglob(_built_name()) if path.is_file() and os.access(path, os.X_OK))


def _built_name() -> str:
    """The name under which llama.cpp builds it."""
    return "llama-server.exe" if sys.platform == "win32" else "llama-server"


def _run(command: Sequence[str], log: Path) -> None:
    with log.open("ab") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        raise UserError(f"`{' '.join(command[:3])} ...` failed: {lines[-1] if lines else 'no word'}", f"see {log}")
