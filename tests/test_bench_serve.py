"""What the benchmark of servers counts, beside what the server says of itself."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from serving import running

from bench.llama_server import kept, llama_server
from bench.serve import Load, measure, served
from runtime.errors import UserError
from runtime.model import open_model
from runtime.options import RunOptions
from runtime.serve.service import Service


def test_figures_of_a_load_are_those_of_the_server(tiny_gguf: Path) -> None:
    options = RunOptions(ffn="exact", threads=1, n_ctx=256, n_cells=1024)
    with running(Service(2, 8), lambda: open_model(tiny_gguf, options)) as server:
        found = measure(int(server.url.rpartition(":")[2]), Load(2, 2.0, 12, 4000))
        figures = server.service.figures()
    assert found["errors"] == 0
    assert found["first_p50"] <= found["first_p95"]
    assert found["between_p50"] <= found["between_p95"]
    assert found["per_client"] == found["tokens_per_s"] / 2
    # A part of the time counts, so at most what was generated in all counts for it.
    assert 0 < found["tokens_per_s"] * 1.6 <= figures.counts.generated_tokens


def test_a_server_that_does_not_begin_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not serve"), served([sys.executable, "-c", "pass"], 1):
        pass


def test_options_that_do_not_fit_are_refused(tiny_gguf: Path) -> None:
    command = [sys.executable, "-m", "bench.serve", str(tiny_gguf), "--llama-server", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --llama-server needs --twin")


def test_the_kept_program_is_the_one_that_races(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of the pinned release, and compiled where it is missing only."""
    monkeypatch.setenv("LAZYNEURON_CACHE", str(tmp_path))
    assert f"-{metadata.version('llama-cpp-python')}-" in kept().name
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="cmake is missing"):
        llama_server()
    kept().touch()
    assert llama_server() == kept()


def test_a_build_that_fails_is_one_line_and_leaves_nothing_but_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZYNEURON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    cmake = tmp_path / "bin/cmake"
    cmake.parent.mkdir()
    cmake.write_text("#!/bin/sh\n")
    cmake.chmod(0o755)
    monkeypatch.setenv("PATH", str(cmake.parent))
    with pytest.raises(UserError, match=r"pip .* failed: ERROR: No matching distribution") as failed:
        llama_server()
    log = kept().with_name(f"{kept().name}.log")
    assert failed.value.hint == f"see {log}"
    assert list(log.parent.iterdir()) == [log]
