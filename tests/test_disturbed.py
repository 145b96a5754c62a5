"""Every command that writes, killed, interrupted or refused space at any moment: what it writes is absent, the old one or whole, and nothing stays behind.

`make test-kill` tries more moments than `make test` does.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from checkpoints import load_tensors, save_tensors
from disturb import ERRORS, Disturber, Outcome, disturber, moments
from hub_client import Client
from hub_server import TOKEN, Hub

from runtime.errors import UserError
from runtime.model_file.reader import GgufFile

MOMENTS = int(os.environ.get("LAZYNEURON_MOMENTS", "8"))
ONE_CORE = ("--threads", 1)
CALIBRATED = (*ONE_CORE, "--calibration-tokens", 1024)
Files = dict[str, bytes]
KEPT = re.compile(r"\.lazyneuron-\w+(/kept(/[\w.-]+)?)?")


@dataclass
class Scene:
    """A command that writes into `folder`, which holds the files `old` before and `whole` after it. normal: what of a file is the same each time."""

    disturber: Disturber
    folder: Path
    command: tuple[object, ...]
    out: Path
    stdin: str = ""
    normal: Callable[[bytes], Any] = bytes
    old: Files = field(default_factory=dict)
    whole: Files = field(default_factory=dict)
    usual: Outcome | None = None

    def begin(self) -> Scene:
        """Run the command without disturbance."""
        self.old = files(self.folder)
        self.usual = self.undisturbed()
        self.whole = files(self.folder)
        assert self.normals(self.whole) != self.normals(self.old)
        return self

    def undisturbed(self) -> Outcome:
        """The shorter of two runs: the first one warms up, and any may meet a busy machine."""
        first = self.run()
        assert first.status == 0, first.err
        self.reset()
        second = self.run()
        assert second.status == 0, second.err
        return min(first, second, key=lambda done: done.seconds)

    def run(self, **how: Any) -> Outcome:
        return self.disturber.run(*self.command, below=self.folder, stdin=self.stdin, **how)

    def reset(self) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, data in self.old.items():
            (self.folder / name).write_bytes(data)

    def normals(self, found: Files) -> dict[str, Any]:
        return {name: self.normal(data) for name, data in found.items()}

    def is_whole(self) -> bool:
        """Whether all in the folder is as after an undisturbed run; nothing hidden is there either."""
        return self.normals(files(self.folder)) == self.normals(self.whole)

    def check(self, killed: bool = False) -> None:
        """That the folder is as before or as after the command."""
        found = files(self.folder)
        if killed:
            found = {name: data for name, data in found.items() if not name.startswith(".")}
        assert self.normals(found) in (self.normals(self.old), self.normals(self.whole)), sorted(found)

    def check_next_run(self) -> None:
        """That the command works where it was killed before, and that nothing is left then."""
        done = self.run()
        assert done.status == 0, done.err
        assert self.is_whole(), sorted(files(self.folder))


class Calibrating(Scene):
    """Layers that are calibrated stay for the next run, unless the file is whole; nothing else does."""

    def check(self, killed: bool = False) -> None:
        found = files(self.folder)
        others = {name: data for name, data in found.items() if not KEPT.fullmatch(name)}
        if killed or not any(name.endswith("/hidden") for name in found):
            super().check(killed)
        else:
            assert self.normals(others) == self.normals(self.old), sorted(found)


class Shards(Scene):
    """Several files: there may be a moment without the first one, but never one with old and new ones."""

    def check(self, killed: bool = False) -> None:
        try:
            super().check(killed)
        except AssertionError:
            assert killed
            with pytest.raises((UserError, FileNotFoundError)):
                GgufFile(self.out.with_name(min(self.whole)))


class Card(Scene):
    """Two files, each of which is the old one or the new one."""

    def check(self, killed: bool = False) -> None:
        found = files(self.folder)
        for name in ("README.md", "sparsity.png"):
            assert found.pop(name, None) in (self.old.get(name), self.whole[name])
        assert killed or not found


class Push(Scene):
    """What is pushed is on the Hub at once or not at all; what is here is as before."""

    hub: Hub
    n = 0

    def run(self, **how: Any) -> Outcome:
        return self.disturber.run(*self.command, f"user/model{self.n}", below=self.folder, **how)

    def begin(self) -> Scene:
        self.old = files(self.folder)
        self.usual = self.undisturbed()
        self.whole = self.old
        self.pushed, self.name = self.on_hub(), f"user/model{self.n}".encode()
        assert sum(name.endswith(".gguf") for name in self.pushed) > 1
        return self

    def on_hub(self) -> Files:
        found = self.hub.repos.get(f"user/model{self.n}")
        return found.commits[found.branches["main"]] if found else {}

    def reset(self) -> None:
        super().reset()
        self.n += 1
        self.hub.storage.objects.clear()

    def check(self, killed: bool = False) -> None:
        super().check(killed)
        assert {name: data for name, data in self.on_hub().items() if name != ".gitattributes"} in ({}, self.uploaded())

    def uploaded(self) -> Files:
        return {name: data for name, data in self.expected().items() if name != ".gitattributes"}

    def expected(self) -> Files:
        """As the first time, but for the name of the repository."""
        data = self.pushed["README.md"].replace(self.name, f"user/model{self.n}".encode())
        return self.pushed | {"README.md": data}

    def check_next_run(self) -> None:
        super().check_next_run()
        assert self.on_hub() == self.expected()


def files(folder: Path) -> Files:
    """All files below a folder; folders as empty ones."""
    return {str(p.relative_to(folder)): b"" if p.is_dir() else p.read_bytes() for p in sorted(folder.rglob("*"))}


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub_here() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def disturb(hub_here: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disturber]:
    client = Client(hub_here, tmp_path_factory.mktemp("home"))
    with disturber(client.environment(HF_TOKEN=TOKEN)) as found:
        yield found


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path], disturb: Disturber, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small calibrated model."""
    out = tmp_path_factory.mktemp("model") / "m.gguf"
    assert disturb.run("convert", checkpoint("llama-gqa"), out, "--type", "q8_0", *CALIBRATED, below=out).status == 0
    return out


@pytest.fixture(scope="module")
def scenes(
    disturb: Disturber,
    checkpoint: Callable[[str], Path],
    model: Path,
    hub_here: Hub,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Scene]:
    known: dict[str, Scene] = {}

    def get(name: str) -> Scene:
        if name not in known:
            (folder := tmp_path_factory.mktemp(name) / "out").mkdir()
            made = SCENES[name](disturb, folder, checkpoint("llama-gqa"), model)
            if isinstance(made, Push):
                made.hub = hub_here
            known[name] = made.begin()
        known[name].reset()
        return known[name]

    return get


@pytest.fixture
def scene(request: pytest.FixtureRequest, scenes: Callable[[str], Scene]) -> Scene:
    return scenes(request.param)


def one_file(disturb: Disturber, folder: Path, _: Path, __: Path) -> Scene:
    (out := folder / "m.gguf").write_text("an older file")
    return Scene(disturb, folder, ("files", out, 1, 2), out)


def some_files(disturb: Disturber, folder: Path, _: Path, __: Path) -> Scene:
    """Over those of a model that differs only in its weights."""
    out = folder / "m.gguf"
    assert disturb.run("files", out, 3, 1, below=folder).status == 0
    return Shards(disturb, folder, ("files", out, 3, 2), out)


def converting(disturb: Disturber, folder: Path, source: Path, _: Path) -> Scene:
    (out := folder / "m.gguf").write_text("an older file")
    return Calibrating(disturb, folder, ("convert", source, out, "--type", "q8_0", "--force", *CALIBRATED), out)


def converting_to_shards(disturb: Disturber, folder: Path, source: Path, _: Path) -> Scene:
    """Over the shards of a model that differs only in its weights."""
    other = folder.parent / "other"
    shutil.copytree(source, other)
    save_tensors(other, {name: tensor.flip(0) for name, tensor in load_tensors(other).items()})
    out, options = folder / "m.gguf", ("--type", "q8_0", "--split-max-size", "160K", "--calibration", "none", *ONE_CORE)
    done = disturb.run("convert", other, out, *options, below=folder)
    assert done.status == 0, done.err
    return Shards(disturb, folder, ("convert", source, out, "--force", *options), out)


def fitting(disturb: Disturber, folder: Path, _: Path, model: Path) -> Scene:
    (out := folder / "m.gguf").write_text("an older file")
    return Scene(disturb, folder, ("predictors", "fit", model, out, "--kind", "signbit", "--force", *CALIBRATED), out)


def saving(disturb: Disturber, folder: Path, _: Path, model: Path) -> Scene:
    """Saved again and again, so that moments meet it."""
    out = folder / "chat.json"
    out.write_text(json.dumps({"lazyneuron_conversation": 1, "messages": []}))
    command = ("runtime", "chat", model, "-n", 2, "--n-ctx", 128, "--temp", 0, "--device", "none", *ONE_CORE)
    return Scene(disturb, folder, command, out, "river\n" + f"/save {out}\n" * 50)


def pushing(disturb: Disturber, folder: Path, _: Path, model: Path) -> Scene:
    shutil.copy(model, out := folder / "m.gguf")
    return Push(disturb, folder, ("convert", "push", out, "--split-max-size", "160K", "--no-plot"), out)


def carding(disturb: Disturber, folder: Path, _: Path, model: Path) -> Scene:
    (out := folder / "README.md").write_text("an older card")
    return Card(disturb, folder, ("convert", "card", model, "-o", out, "--force"), out)


def reporting(disturb: Disturber, folder: Path, _: Path, model: Path) -> Scene:
    (out := folder / "page.html").write_text("an older page")
    machine = ("--device-bandwidth", 500, "--cpu-bandwidth", 50)
    return Scene(disturb, folder, ("runtime", "report", model, out, "--force", *machine), out)


def plotting(disturb: Disturber, folder: Path, _: Path, model: Path) -> Scene:
    (out := folder / "plot.png").write_text("an older plot")
    return Scene(disturb, folder, ("runtime", "sparsity", model, "--plot", out), out)


def tracing(disturb: Disturber, folder: Path, _: Path, model: Path) -> Scene:
    (out := folder / "trace.json").write_text('{"displayTimeUnit": "ms"}')
    command = ("runtime", "complete", model, "-p", "river", "-n", 4, "--n-ctx", 64, "--device", "none", "--trace", out)
    return Scene(disturb, folder, (*command, *ONE_CORE), out, normal=lambda data: list(json.loads(data)))


SCENES: dict[str, Callable[[Disturber, Path, Path, Path], Scene]] = {
    "file": one_file,
    "files": some_files,
    "convert": converting,
    "shards": converting_to_shards,
    "fit": fitting,
    "save": saving,
    "push": pushing,
    "card": carding,
    "report": reporting,
    "plot": plotting,
    "trace": tracing,
}
SLOW = ("convert", "shards", "fit", "save", "push")
STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", SLOW, indirect=True)
def test_killed_at_any_moment(scene: Scene) -> None:
    assert scene.usual
    killed = 0
    for after in moments(MOMENTS, scene.usual.seconds, seed=13):
        done = scene.run(after=after, send=signal.SIGKILL)
        assert done.killed or done.status == 0, done.err
        killed += done.killed
        scene.check(killed=done.killed)
        scene.check_next_run()
        scene.reset()
    assert killed


@pytest.mark.parametrize("scene", SLOW, indirect=True)
def test_stopped_at_any_moment(scene: Scene) -> None:
    assert scene.usual
    for i, after in enumerate(moments(MOMENTS, scene.usual.seconds, seed=17)):
        number, status = list(STOPS.items())[i % len(STOPS)]
        done = scene.run(after=after, send=number)
        assert done.status in (0, status, -number), done  # below zero: before the command had begun
        assert "Traceback" not in done.err
        scene.check()
        if any(KEPT.fullmatch(name) for name in files(scene.folder)):
            scene.check_next_run()
        scene.reset()


@pytest.mark.parametrize("scene", ["file", "files", "shards"], indirect=True)
def test_killed_at_each_step(scene: Scene) -> None:
    for step in steps_of(scene):
        assert scene.run(step=step, send=signal.SIGKILL).killed
        scene.check(killed=True)
        scene.check_next_run()
        scene.reset()


@pytest.mark.parametrize("scene", ["file", "files"], indirect=True)
def test_stopped_at_each_step(scene: Scene) -> None:
    for number, status in STOPS.items():
        for step in steps_of(scene):
            done = scene.run(step=step, send=number)
            assert done.status == status, done
            assert "Traceback" not in done.err
            scene.check()
            scene.reset()


@pytest.mark.parametrize("scene", ["file", "files"], indirect=True)
def test_refused_at_each_step(scene: Scene) -> None:
    """Once, as a failing disk does, or from then on, as a full one does."""
    for how in (*({"fail": number} for number in ERRORS), {"full": errno.ENOSPC}):
        refused = 0
        for step in steps_of(scene):
            # Where nothing can be renamed, files that were moved aside can return only later.
            later = isinstance(scene, Shards) and "full" in how
            refused += was_refused(scene, scene.run(step=step, **how), os.strerror(next(iter(how.values()))), later)
            if later:
                scene.check_next_run()
            scene.reset()
        assert refused > 3


@pytest.mark.parametrize("scene", SCENES, indirect=True)
def test_no_room(scene: Scene) -> None:
    """From the beginning, and for a part of a file."""
    scene_size = min(
        len(data) for name, data in scene.whole.items() if name == scene.out.name or scene.out.suffix == ".gguf"
    )
    for how, why in (
        ({"full": errno.ENOSPC, "step": 1}, errno.ENOSPC),
        ({"limit": 4}, errno.EFBIG),  # which Python wants for a temporary folder
        ({"limit": scene_size // (8 if isinstance(scene, Push) else 2)}, errno.EFBIG),
    ):
        assert was_refused(scene, scene.run(**how), os.strerror(why)), how
        scene.reset()


def steps_of(scene: Scene) -> range:
    assert scene.usual
    return range(1, scene.usual.steps + 1)


def was_refused(scene: Scene, done: Outcome, why: str, later: bool = False) -> bool:
    """Whether the command was refused; then it said so in a line that names a file it writes, and nothing changed."""
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert (done.status, bool(lines)) in ((0, False), (1, True)), done
    assert len(lines) < 2 or scene.stdin  # a chat goes on
    names = {scene.out, *(scene.folder / name for name in scene.whole), Path(tempfile.gettempdir())}
    assert set(lines) <= {f"error: `{name}`: {why}" for name in names}
    assert "Traceback" not in done.err
    scene.check(killed=later)
    return bool(lines)
