"""Standard streams that are closed, full, left by their reader, or of another encoding: the three programs alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from runtime.cli import standard_streams
from runtime.cli.output import print_json
from runtime.cli.program import run_command
from runtime.cli.standard_streams import StdoutError, _Descriptor

ROOT = Path(__file__).parent.parent
GREEDY = ("--temp", "0", "-n", "6", "--threads", "1")
OVERVIEWS = ("-m runtime", "-m convert --list", "-m predictors fit --help")

posix = pytest.mark.skipif(sys.platform == "win32", reason="redirects as a POSIX shell does")


def run(redirect: str, *words: object, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
    """`python WORDS` with a redirection such as `<&-`."""
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, *map(str, words)]
    values = {k: v for k, v in os.environ.items() if k not in ("PYTHONIOENCODING", "PYTHONUNBUFFERED")} | env
    return subprocess.run(command, cwd=ROOT, input=stdin, env=values, capture_output=True, timeout=600, check=False)


def model_command(name: str, model: Path, *options: object) -> tuple[object, ...]:
    return ("-m", "runtime", name, model, *GREEDY, *options)


# --- closed -----------------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("command", ["complete", "chat"])
def test_a_closed_stdin_is_an_empty_one(tiny_gguf: Path, command: str) -> None:
    words = model_command(command, tiny_gguf, *(("-p", "We hold") if command == "chat" else ()))
    usual, closed = run("</dev/null", *words), run("<&-", *words)
    assert (closed.returncode, closed.stdout, closed.stderr) == (0, usual.stdout, usual.stderr)
    assert usual.stdout


@posix
@pytest.mark.parametrize(
    ("redirect", "words"), [(">&-", OVERVIEWS[0]), ("2>&-", OVERVIEWS[1]), *(("<&- >&- 2>&-", o) for o in OVERVIEWS)]
)
def test_closed_outputs_are_the_null_device(redirect: str, words: str) -> None:
    done = run(redirect, *words.split())
    assert (done.returncode, done.stderr) == (0, b"")
    assert bool(done.stdout) == (redirect == "2>&-")


@posix
def test_what_is_written_while_streams_are_closed_is_whole(tiny_gguf: Path, tmp_path: Path) -> None:
    """The next file to be opened would take the number of a closed stream, and the notes would go into it."""
    talk = tmp_path / "talk.json"
    done = run(">&- 2>&-", *model_command("chat", tiny_gguf), stdin=f"We hold\n/save {talk}\n/nothing\n".encode())
    assert done.returncode == 1
    assert [m["role"] for m in json.loads(talk.read_text(encoding="utf-8"))["messages"]] == ["user", "assistant"]
    assert not run(
        ">&- 2>&-", "-m", "convert", "examples/tiny-relu-llama", tmp_path / "x.gguf", "--calibration", "none"
    ).returncode
    assert (tmp_path / "x.gguf").read_bytes() == tiny_gguf.read_bytes()


def test_there_may_be_no_streams_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under pythonw."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    standard_streams.prepare()
    found = [sys.stdin, sys.stdout, sys.stderr]
    monkeypatch.undo()
    assert [stream.fileno() for stream in found] == [0, 1, 2]
    assert [stream.encoding for stream in found] == ["utf-8"] * 3


# --- full, or left by the reader --------------------------------------------------------------------------------------


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
@pytest.mark.parametrize(
    ("words", "unbuffered"), [*((o, "") for o in (*OVERVIEWS, "chat", "complete")), (OVERVIEWS[2], "1")]
)
def test_a_full_stdout_is_one_error(tiny_gguf: Path, words: str, unbuffered: str) -> None:
    command = words.split() if " " in words else model_command(words, tiny_gguf, "--json")
    done = run(">/dev/full", *command, stdin=b"We\nhold\n", PYTHONUNBUFFERED=unbuffered)
    errors = [line for line in done.stderr.decode().splitlines() if not line.startswith("this file has no chat")]
    assert done.returncode == 1
    assert errors == ["error: `stdout`: No space left on device", "hint: free some space or write to another disk"]


@posix
@pytest.mark.parametrize("words", OVERVIEWS)
def test_a_reader_who_leaves_is_no_error(words: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = _left_alone(writing, words.split())
    assert done == (0, b"")


def _left_alone(writing: int, words: list[str]) -> tuple[int, bytes]:
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE) as process:
        os.close(writing)
        _, errors = process.communicate(timeout=600)
    return process.returncode, errors


@posix
def test_notes_that_cannot_be_written_change_nothing(tiny_gguf: Path) -> None:
    words = model_command("chat", tiny_gguf)
    usual = run("", *words, stdin=b"We hold\n")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(
        command, cwd=ROOT, input=b"We hold\n", stdout=subprocess.PIPE, stderr=writing, timeout=600, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stdout) == (0, usual.stdout)


@posix
def test_a_stream_of_the_wrong_direction_is_named(tiny_gguf: Path, tmp_path: Path) -> None:
    words = model_command("complete", tiny_gguf)
    for redirect, name in ((f'0>"{tmp_path}/x"', "stdin"), ("1</dev/null", "stdout")):
        done = run(redirect, *words, stdin=b"We")
        assert (done.returncode, done.stderr) == (1, f"error: `{name}`: Bad file descriptor\n".encode())


# --- descriptors that do not wait -------------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    return ends


@posix
def test_output_waits_for_a_slow_reader(pipe: tuple[int, int]) -> None:
    text, found = b"x" * 300_000, bytearray()

    def read() -> None:
        os.set_blocking(pipe[0], True)
        while part := os.read(pipe[0], 5000):
            found.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    assert _Descriptor(pipe[1], "stdout").write(text) == len(text)
    os.close(pipe[1])
    reader.join()
    os.close(pipe[0])
    assert found == text


@posix
def test_input_waits_for_a_slow_writer(pipe: tuple[int, int]) -> None:
    def write() -> None:
        for part in (b"We ", b"hold"):
            time.sleep(0.05)
            os.write(pipe[1], part)
        os.close(pipe[1])

    writer = threading.Thread(target=write)
    writer.start()
    assert _Descriptor(pipe[0], "stdin").readall() == b"We hold"
    writer.join()
    os.close(pipe[0])


def test_only_the_first_failure_is_raised(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    out, notes = _Descriptor(pipe[1], "stdout"), _Descriptor(pipe[1], "stderr")
    with pytest.raises(StdoutError, match="stdout"):
        out.write(b"x")
    assert (out.write(b"xyz"), notes.write(b"xyz")) == (3, 3)
    os.close(pipe[1])


# --- encodings --------------------------------------------------------------------------------------------------------


@posix
def test_any_locale(emoji_gguf: Path) -> None:
    done = run(
        "", *model_command("complete", emoji_gguf, "-p", "Go"), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"
    )
    assert done.stdout.decode().startswith("\N{WOMAN}")


@posix
def test_what_a_stream_cannot_show(emoji_gguf: Path, tmp_path: Path) -> None:
    """It is replaced for people, and escaped in JSON, which loses nothing."""
    done = run("", *model_command("complete", emoji_gguf, "-p", "Go"), PYTHONIOENCODING="ascii")
    assert done.stdout.startswith(b"?")
    words = ("convert", ROOT / "examples/tiny-relu-llama", tmp_path / "é☃.gguf", "--calibration", "none", "--json")
    done = run("", "-m", *words, PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout)["path"] == str(tmp_path / "é☃.gguf")
    assert b"??.gguf`: wrote" in done.stderr


def test_json_loses_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    print_json({"text": "é☃", "path": "\udcff"})
    assert json.loads(capsys.readouterr().out) == {"text": "é☃", "path": "\udcff"}
    print_json({"text": "é☃"})
    assert capsys.readouterr().out == '{"text": "é☃"}\n'


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_in_a_finaliser_is_not_lost(number: str, status: int) -> None:
    program = f"""
import signal, sys, time, weakref
from runtime.cli.program import run_command

class Held:
    pass

def command():
    held = Held()
    watch = weakref.ref(held, lambda _: signal.raise_signal(signal.{number}))
    del held
    time.sleep(60)

sys.exit(run_command(command))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (status, "interrupted\n" if number == "SIGINT" else "")


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_a_signal_while_a_class_is_made_ends_the_program_as_ever(error: BaseException, status: int) -> None:
    """Python 3.11 wraps what `__set_name__` raises; imports make classes."""

    class Field:
        def __set_name__(self, owner: type, name: str) -> None:
            raise error

    def command() -> None:
        type("Made", (), {"field": Field()})

    assert run_command(command) == status
