"""What a file to be written may be called, and what two runs, links and strange folders do to it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from convert import convert
from convert.__main__ import main as convert_main
from predictors.__main__ import main as predictors_main
from runtime.__main__ import main as runtime_main
from runtime.base import workspace as module
from runtime.base.atomic import check_target, new_path, replacing, writing
from runtime.commands.conversation import Conversation
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile
from runtime.model_file.shard_writer import check_shards

ROOT = Path(__file__).parent.parent
PLAIN = ("--calibration", "none")


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is there already -------------------------------------------------------------------------------------------


def test_targets_that_will_not_do(tmp_path: Path) -> None:
    there = tmp_path / "there.gguf"
    there.touch()
    for out, nbytes, message in (
        (tmp_path, 0, "a folder, expected a file name"),
        (tmp_path / "no" / "x.gguf", 0, "no such folder"),
        (there / "x.gguf", 0, "no such folder"),
        (there, 0, "exists already"),
        (tmp_path / "x.gguf", 1 << 60, "GB free, expected at least the"),
    ):
        with pytest.raises(UserError, match=message):
            check_target(out, nbytes, force=False)
    check_target(there, 0, force=True)
    assert left(tmp_path) == ["there.gguf"]


@pytest.fixture(params=["device", "pipe", "socket", "link to a device"])
def special(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Something that is no regular file, and what it is called."""
    path = tmp_path / "x.gguf"
    with socket.socket(socket.AF_UNIX) as opened:
        if request.param == "device":
            if os.geteuid():
                pytest.skip("needs root, to make a device")
            os.mknod(path, 0o666 | 0o020000, os.makedev(1, 3))
        elif request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "socket":
            opened.bind(os.path.relpath(path))  # paths of sockets are short
        else:
            path.symlink_to("/dev/null")
        yield path, request.param.removeprefix("link to ").removeprefix("a ")


def test_what_is_no_file_stays_so(special: tuple[Path, str], checkpoint: Callable[[str], Path]) -> None:
    path, kind = special
    before = path.lstat()
    with pytest.raises(UserError, match=f"`{path}`: a {kind}, expected a regular file"):
        convert(checkpoint("llama-gqa"), path, calibration="none", force=True)
    with pytest.raises(UserError, match=f"a {kind}, expected"):
        Conversation(None).save(path)
    with pytest.raises(UserError, match=f"a {kind}, expected"), replacing(path):
        raise AssertionError("it was begun")
    after = path.lstat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert left(path.parent) == [path.name]


@pytest.mark.parametrize("text", ["", "-", "folder/", "a\0b"])
def test_no_names_of_files(text: str) -> None:
    with pytest.raises(UserError, match="expected a file name"):
        new_path(text)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (convert_main, ("SOURCE", "OUT", "--force", *PLAIN)),
        (predictors_main, ("fit", "MODEL", "OUT", "--force")),
        (runtime_main, ("report", "MODEL", "OUT", "--force")),
        (runtime_main, ("sparsity", "MODEL", "--plot", "OUT")),
        (runtime_main, ("complete", "MODEL", "-p", "a", "-n", "1", "--trace", "OUT")),
    ],
)
def test_every_command_says_so_first(
    program: Callable[[list[str]], int],
    words: tuple[str, ...],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before it looks for the source, which is nowhere."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    os.mkfifo("p.html")
    (tmp_path / "folder").mkdir()
    long = f"{'ü' * 126}.html"  # 257 bytes
    for out, message in (
        ("-", "standard output, expected a file name"),
        ("folder/", "a folder, expected a file name"),
        ("folder", "a folder, expected a file name"),
        ("missing/x.html", "no such folder"),
        ("p.html", "a pipe, expected a regular file"),
        (long, "File name too long"),
    ):
        given = [{"OUT": out, "SOURCE": "user/nowhere", "MODEL": "user/nowhere"}.get(word, word) for word in words]
        assert program(given) == 1
        error, hint = capfd.readouterr().err.splitlines()
        assert error.startswith("error: `")
        assert message in error
        assert hint.startswith("hint: ")
    assert left(tmp_path) == ["folder", "p.html"]


def test_names_as_long_as_they_can_be(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source, longest = checkpoint("llama-gqa"), tmp_path / f"{'ü' * 125}.gguf"  # 255 bytes
    assert convert(source, longest, calibration="none").files == [str(longest)]
    with pytest.raises(OSError, match="File name too long for shards"):
        convert(source, longest, calibration="none", force=True, split_max_size="600K")
    assert left(tmp_path) == [longest.name]
    fitting = tmp_path / f"{'x' * 235}.gguf"
    assert len(convert(source, fitting, type="f32", calibration="none", split_max_size="600K").files) > 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_protected_files(tmp_path: Path) -> None:
    (path := tmp_path / "x").touch(0o444)
    with pytest.raises(UserError, match="is protected from being written"):
        check_target(path, 0, force=True)


def test_permissions_of_the_replaced_file(tmp_path: Path) -> None:
    (path := tmp_path / "x").touch(0o600)
    with replacing(path) as partial:
        partial.write_text("new")
    assert path.stat().st_mode & 0o777 == 0o600


# --- links -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["to a file", "dangling", "chain"])
def link(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A link, and where it points."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    place, out = tmp_path / "there/real.gguf", tmp_path / "here/x.gguf"
    if request.param == "chain":
        (tmp_path / "there/middle").symlink_to("real.gguf")
        out.symlink_to("../there/middle")
    else:
        out.symlink_to("../there/real.gguf")
    if request.param == "to a file":
        place.write_text("old")
    return out, place


def test_links_are_followed(link: tuple[Path, Path], checkpoint: Callable[[str], Path]) -> None:
    out, place = link
    points_to = out.readlink()
    if place.exists():
        with pytest.raises(UserError, match=f"`{out}`: exists already"):
            convert(checkpoint("llama-gqa"), out, calibration="none")
    report = convert(checkpoint("llama-gqa"), out, calibration="none", force=True)
    assert report.files == [str(out)]
    assert out.readlink() == points_to
    assert not place.is_symlink()
    with GgufFile(out) as file:
        assert file.size == place.stat().st_size
    assert left(out.parent) == ["x.gguf"]


def test_shards_through_a_link(link: tuple[Path, Path], checkpoint: Callable[[str], Path]) -> None:
    out, place = link
    report = convert(checkpoint("llama-gqa"), out, type="f32", calibration="none", force=True, split_max_size="600K")
    assert [Path(file).parent for file in report.files] == [place.parent] * len(report.files)
    assert Path(report.files[0]).name.startswith("real-00001-of-")
    GgufFile(report.files[0]).close()


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").symlink_to("no/x")
    with pytest.raises(OSError, match=f"symbolic links.*{tmp_path / 'a'}"):
        check_target(tmp_path / "a", 0, force=True)
    with pytest.raises(UserError, match=f"`{tmp_path / 'c'}`: points to `{tmp_path}/no/x`: no such folder"):
        check_target(tmp_path / "c", 0, force=True)


def test_shards_that_are_links(tmp_path: Path) -> None:
    (tmp_path / "blob").touch()
    (tmp_path / "x-00001-of-00002.gguf").symlink_to("blob")
    with pytest.raises(UserError, match="no regular file, expected a shard or nothing"):
        check_shards(tmp_path / "x.gguf", force=True)


def test_shards_of_the_source_are_not_written_over(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    out, options = tmp_path / "m.gguf", {"type": "f32", "calibration": "none", "force": True, "split_max_size": "600K"}
    first = Path(convert(checkpoint("llama-gqa"), out, **options).files[0])
    before = first.read_bytes()
    with pytest.raises(UserError, match=f"`{first}`: is the source itself"):
        convert(first, out, **options)
    assert first.read_bytes() == before


def test_a_source_is_not_written_over(
    checkpoint: Callable[[str], Path], fitted_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not through a link either, and no file of a checkpoint."""
    source, model = checkpoint("llama-gqa"), tmp_path / "m.gguf"
    os.link(fitted_gguf, model)
    weights, text = tmp_path / "weights", tmp_path / "text"
    weights.symlink_to(source / "model.safetensors")
    text.write_text("A calibration text.")
    for name in ("page.html", "plot.png", "README.md"):
        (tmp_path / name).symlink_to(model)
    before = {path: path.read_bytes() for path in (source / "model.safetensors", model, text)}
    for program, command in (
        (convert_main, (source, weights, "--force", *PLAIN)),
        (convert_main, (source, text, "--force", "--calibration", text)),
        (convert_main, ("card", model, "-o", model, "--force")),
        (convert_main, ("card", model, "-o", tmp_path, "--force")),
        (predictors_main, ("fit", model, model, "--force")),
        (runtime_main, ("report", model, tmp_path / "page.html", "--force")),
        (runtime_main, ("sparsity", model, "--plot", tmp_path / "plot.png")),
        (runtime_main, ("complete", model, "-p", "a", "-n", "1", "--trace", model)),
    ):
        assert program([str(word) for word in command]) == 1
        assert "is the source itself, expected another file" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_other_shards_are_replaced(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """With --force there is one model of the name afterwards, however it was divided before."""
    for size in (None, "600K", "800K", "1G"):
        report = convert(
            checkpoint("llama-gqa"),
            tmp_path / "m.gguf",
            type="f32",
            calibration="none",
            force=True,
            split_max_size=size,
        )
        assert [str(path) for path in sorted(tmp_path.iterdir())] == report.files
    assert len(report.files) == 1


# --- two runs --------------------------------------------------------------------------------------------------------


def test_two_at_once(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The second one is refused before it does anything; under another name of the same file, too."""
    out, alias = tmp_path / "x.gguf", tmp_path / "alias.gguf"
    alias.symlink_to(out)
    with writing(out) as work:
        for name in (out, alias, tmp_path / "." / "x.gguf"):
            with pytest.raises(UserError, match=f"`{name}`: another process is writing it"):
                convert(tmp_path / "no source", name, calibration="none")
        (work.folder / "x.gguf").write_text("first")
        work.publish(["x.gguf"])
    assert out.read_text() == "first"
    assert left(tmp_path) == ["alias.gguf", "x.gguf"]


def test_many_threads_at_once(tmp_path: Path) -> None:
    """Each writes a whole file or is refused."""
    out, written = tmp_path / "x", []

    def write(i: int) -> None:
        for _ in range(20):
            with contextlib.suppress(UserError), replacing(out) as partial:
                partial.write_text(str(i) * 1000)
                written.append(i)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written
    assert out.read_text() in {str(i) * 1000 for i in range(4)}
    assert left(tmp_path) == ["x"]


def test_a_lock_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is refused just as the writer ends and the next one begins leaves the next one's files alone."""
    out, first = tmp_path / "x", contextlib.ExitStack()
    first.enter_context(writing(out))
    second, asked = contextlib.ExitStack(), []
    try_lock = module._try_lock

    def changing(descriptor: int) -> bool | None:
        asked.append(descriptor)
        if len(asked) == 2:  # the refused run has opened the lock, to see whether the folder may go
            first.close()
            second.enter_context(replacing(out)).write_text("the second's")
        return try_lock(descriptor)

    monkeypatch.setattr(module, "_try_lock", changing)
    with pytest.raises(UserError, match="another process"), writing(out):
        pass
    second.close()
    assert len(asked) > 2
    assert out.read_text() == "the second's"
    assert left(tmp_path) == ["x"]


def test_what_a_stopped_run_writes_is_not_removed(tmp_path: Path) -> None:
    """A process that is stopped for an hour is no process that was killed."""
    code = (
        "import sys, time; from pathlib import Path; from runtime.base.atomic import replacing\n"
        "with replacing(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('its own'); print('begun', flush=True); sys.stdin.read()\n"
    )
    out, pipe = tmp_path / "x", subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
    assert process.stdout and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="another process is writing it"):
        check_target(out, 0, force=True)
    process.send_signal(signal.SIGCONT)
    process.communicate()
    assert (out.read_text(), process.returncode) == ("its own", 0)


def test_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    """Where somebody has put a link in the workspace's place, nothing of what it points to is touched."""
    out, victim = tmp_path / "x", tmp_path / "victim"
    with writing(out) as work:
        place = work.folder
    victim.mkdir()
    (victim / "file").write_text("precious")
    place.symlink_to(victim)
    with replacing(out) as partial:
        partial.write_text("new")
    assert (out.read_text(), (victim / "file").read_text()) == ("new", "precious")
    assert left(tmp_path) == sorted([place.name, "victim", "x"])


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs write one after the other, and neither touches what the other writes."""
    monkeypatch.setattr(module, "fcntl", None)
    with replacing(tmp_path / "x") as first:
        first.write_text("first")
        with replacing(tmp_path / "x") as second:
            second.write_text("second")
        assert (tmp_path / "x").read_text() == "second"
    assert (tmp_path / "x").read_text() == "first"
    assert left(tmp_path) == ["x"]


def test_a_name_of_a_file_that_was_never_checked(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """What a killed run has left takes no name: --verify renames what it has checked."""
    with writing(tmp_path / "m.gguf") as work:
        place = work.folder
    for folder in (place, tmp_path):
        folder.mkdir(exist_ok=True)
        (folder / f".{os.getpid()}.unverified.stale.gguf").write_text("never checked")
    (place / "stale.gguf").write_text("never checked")
    convert(checkpoint("llama-gqa"), tmp_path / "m.gguf", type="f32", calibration="none", verify=True)
    assert left(tmp_path) == [f".{os.getpid()}.unverified.stale.gguf", "m.gguf"]
