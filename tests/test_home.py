"""Users without a home folder, terminals without a name, folders that are gone: what can be done without them is done."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from prompt_toolkit.history import FileHistory, InMemoryHistory
from terminal import Terminal

from runtime.base.cache_folder import cache_folder
from runtime.base.home import expanded, home
from runtime.commands import terminal
from runtime.commands.conversation import Conversation
from runtime.commands.session import Session
from runtime.errors import UserError
from runtime.hub.locate import locate
from runtime.hybrid import bandwidth

posix = pytest.mark.skipif(sys.platform == "win32", reason="a home folder is found in another way there")


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user whom the system does not know, without HOME."""

    def unknown(_: object) -> None:
        raise KeyError

    for name in ("HOME", "XDG_STATE_HOME", "LAZYNEURON_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("pwd.getpwnam", unknown)


@posix
def test_home_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LAZYNEURON_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (home(), expanded("~/x"), cache_folder()) == (tmp_path, tmp_path / "x", tmp_path / ".cache/lazyneuron")
    for useless in ("", "relative/folder"):
        monkeypatch.setenv("HOME", useless)
        assert (home(), cache_folder()) == (None, None)
    monkeypatch.setenv("LAZYNEURON_CACHE", "elsewhere")
    assert cache_folder() == Path("elsewhere")


@posix
@pytest.mark.usefixtures("homeless")
def test_paths_without_a_home_stay_as_they_are() -> None:
    assert (home(), cache_folder()) == (None, None)
    for path in ("~/x.gguf", "~nobody-of-that-name/x.gguf", "x.gguf", "/x.gguf"):
        assert expanded(path) == locate(path) == Path(path)


@posix
@pytest.mark.usefixtures("homeless")
def test_a_chat_without_history(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert isinstance(terminal._history(), InMemoryHistory)
    assert capsys.readouterr().err == "the history is not kept: there is no home folder\n"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert isinstance(terminal._history(), FileHistory)


@posix
@pytest.mark.usefixtures("homeless")
def test_speeds_are_measured_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def measure(_device: object, threads: int) -> bandwidth.Speed:
        measured.append(threads)
        return bandwidth.Speed(1e9, 1e-6)

    monkeypatch.setattr(bandwidth, "measure", measure)
    for _ in range(2):
        assert bandwidth.speed_of(bandwidth.cpu(), 1) == bandwidth.Speed(1e9, 1e-6)
    assert measured == [1, 1]


@pytest.mark.parametrize("name", ["HF_HOME", "HF_HUB_CACHE"])
def test_the_hub_needs_a_folder(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """huggingface_hub would make one that is called `~`."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, name, "~/.cache/huggingface")
    with pytest.raises(UserError, match="no home folder for files of the Hub"):
        locate("user/repo")
    assert not list(tmp_path.iterdir())


@posix
@pytest.mark.usefixtures("homeless")
def test_a_chat_is_not_saved_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    session = Session.__new__(Session)
    session.conversation = Conversation(None)
    with pytest.raises(UserError, match="`~`: no such folder"):
        session._save("~/talk.json")
    assert not list(tmp_path.iterdir())


@posix
@pytest.mark.parametrize("folder", ["", "/nonexistent"])
def test_a_terminal_of_no_kind_in_a_folder_that_is_gone(folder: str, tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    line = (
        f"cd {tmp_path}/gone; rmdir {tmp_path}/gone; unset TERM; exec {sys.executable} -m runtime chat {tiny_gguf} -n 4"
    )
    # Not even root can make a folder in /proc.
    env = {"HOME": folder, "XDG_STATE_HOME": "/proc/nothing" if folder else ""}
    with Terminal("sh", "-c", line, **env) as shown:
        shown.expect("the history is not kept: .*(No such file|no home folder)")
        shown.send("We hold\r")
        shown.expect(r"4 tokens · ")
        shown.send("/exit\r")
        assert shown.ended() == 0
