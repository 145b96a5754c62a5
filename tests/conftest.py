"""Converted models, made once per test run, however many workers it has; the variants of the native kernels."""

from __future__ import annotations

import gc
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CHECKPOINTS
from filelock import FileLock
from handles import Handles, idle
from hub_client import Client
from hub_server import Hub
from parrot import WOMEN, make_parrot

from convert import convert
from runtime.bindings import sparse_ffn
from runtime.draft_length import DraftLength

BUNDLED = Path(__file__).parent.parent / "examples/tiny-relu-llama"

# The teams of two workers, and of the commands that tests start, share the processors: a thread that waits must leave
# its processor to others. Before any library with OpenMP is loaded; a team's size is still what each test asks for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A shell lets what it starts in the background ignore Ctrl-C, and so would everything that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

Converted = Callable[..., Path]
MakeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """make_once(name, make): the file or folder `name` of this test run, by `make(path)` where no worker has made it yet."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"

    def get(name: str, make: Callable[[Path], object]) -> Path:
        path = shared / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not (done := Path(f"{path}.done")).exists():  # of a `make` that failed, something may be there
                make(path)
                done.touch()
        return path

    return get


@pytest.fixture(scope="session")
def checkpoint(make_once: MakeOnce) -> Callable[[str], Path]:
    """Folder of a checkpoint: "bundled", one of tests/checkpoints.py, or a case of tests/families.py."""

    def make(path: Path) -> None:
        from_table = CHECKPOINTS.get(path.name) or __import__("families").CASES[path.name].make  # torch takes seconds
        from_table(path)

    return lambda name: BUNDLED if name == "bundled" else make_once(f"checkpoints/{name}", make)


@pytest.fixture(scope="session")
def converted(make_once: MakeOnce, checkpoint: Callable[[str], Path]) -> Converted:
    """Path of a checkpoint's GGUF file in a type, e.g. converted("bundled", "q4_0"); tokens: of calibration, None for none."""

    def get(name: str, type: str = "f32", tokens: int | None = None) -> Path:  # noqa: A002
        options = {"calibration": "none"} if tokens is None else {"calibration_tokens": tokens}
        return make_once(
            f"converted/{name}-{type}-{tokens}.gguf",
            lambda path: convert(checkpoint(name), path, type=type, force=True, **options),
        )

    return get


@pytest.fixture(scope="session")
def tiny_gguf(converted: Converted) -> Path:
    """The bundled model in F16, without calibration."""
    return converted("bundled", "f16")


@pytest.fixture(scope="session")
def fitted_gguf(make_once: MakeOnce) -> Path:
    """The bundled model in F16 as `python -m convert` makes it: hot neurons first, with predictors."""
    return make_once("fitted.gguf", lambda path: convert(BUNDLED, path, type="f16", force=True))


@pytest.fixture(scope="session")
def emoji_gguf(make_once: MakeOnce) -> Path:
    """A model that writes emoji for ever, with a context of 16,384 tokens."""
    return make_once("emoji", lambda folder: make_parrot(folder, WOMEN)) / "parrot.gguf"


@pytest.fixture(params=sparse_ffn.variants())
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


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> Handles:
    """Counts what native code has handed out since, and makes its calls fail. To be asked for behind fixtures that open models."""
    gc.collect()
    idle()
    return Handles(monkeypatch)


@pytest.fixture(params=["fixed", "random"])
def drafting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Drafts all the time, whether they pay or not: of one length, or of every length and kind."""
    chance = random.Random(1)

    def choose(_: DraftLength, at_most: int, usable: Sequence[Any]) -> tuple[Any, int]:
        n = min(at_most, 4 if request.param == "fixed" else chance.randint(0, 15))
        return (usable[chance.randrange(len(usable))], n) if n and usable else (None, 0)

    monkeypatch.setattr(DraftLength, "choose", choose)
    return str(request.param)
