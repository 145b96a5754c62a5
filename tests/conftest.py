"""Converted models, made once per test run; the variants of the native kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import CHECKPOINTS
from hub_client import Client
from hub_server import Hub
from parrot import WOMEN, make_parrot

from convert import convert
from runtime import native_ffn

BUNDLED = Path(__file__).parent.parent / "examples/tiny-relu-llama"

Converted = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a checkpoint: "bundled", one of tests/checkpoints.py, or a case of tests/families.py."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        if name == "bundled":
            return BUNDLED
        if not (folder / name).exists():
            make = CHECKPOINTS.get(name) or __import__("families").CASES[name].make  # which takes torch some seconds
            make(folder / name)
        return folder / name

    return get


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Converted:
    """Path of a checkpoint's GGUF file in a type, without calibration, e.g. converted("bundled", "q4_0")."""
    folder = tmp_path_factory.mktemp("converted")

    def get(name: str, type: str = "f32", calibration: str | None = "none") -> Path:  # noqa: A002
        out = folder / f"{name}-{type}-{calibration}.gguf"
        if not out.exists():
            convert(checkpoint(name), out, type=type, calibration=calibration)
        return out

    return get


@pytest.fixture(scope="session")
def tiny_gguf(converted: Converted) -> Path:
    """The bundled model in F16, without calibration."""
    return converted("bundled", "f16")


@pytest.fixture(scope="session")
def fitted_gguf(converted: Converted) -> Path:
    """The bundled model in F16 as `python -m convert` makes it: hot neurons first, with predictors."""
    return converted("bundled", "f16", None)


@pytest.fixture(scope="session")
def emoji_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes emoji for ever, with a context of 16,384 tokens."""
    return make_parrot(tmp_path_factory.mktemp("emoji"), WOMEN)


@pytest.fixture(params=[v for i, v in enumerate(native_ffn.VARIANTS) if native_ffn.library().lzn_has_variant(i)])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each variant of the kernels that this CPU can run."""
    monkeypatch.setenv("LAZYNEURON_KERNELS", request.param)
    return str(request.param)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty Hub on this machine."""
    server = Hub()
    yield server
    server.stop()


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Client:
    """Runs commands against `hub`, with a cache of their own."""
    return Client(hub, tmp_path / "home")
