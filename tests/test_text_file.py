"""Texts from files, pipes and streams: marks before them, line ends after them, and each read once."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import runtime
from convert.publish.card import CardOptions, examine
from predictors import calibration_text
from predictors.evaluate import evaluate
from runtime.__main__ import main
from runtime.base.text_file import decoded, read_text, without_line_end
from runtime.commands.chat import answer_lines
from runtime.commands.conversation import Conversation
from runtime.commands.session import Session
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile
from runtime.text.sampling import Sampling

PROMPT = "We hold"
GREEDY = ("--temp", "0", "-n", "4", "--threads", "1")
LONG = (Path(__file__).parent.parent / "examples/heldout.txt").read_bytes()[:6000]

posix = pytest.mark.skipif(os.name == "nt", reason="has no FIFOs")


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Callable[[bytes], Path]]:
    """A named pipe that gives some bytes once."""
    writers: list[threading.Thread] = []

    def make(content: bytes) -> Path:
        path = tmp_path / f"fifo{len(writers)}"
        os.mkfifo(path)
        writers.append(threading.Thread(target=lambda: path.write_bytes(content), daemon=True))
        writers[-1].start()
        return path

    yield make
    for writer in writers:
        writer.join(10)
        assert not writer.is_alive()


def result_of(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main([*map(str, words), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


class Stdin:
    """Bytes in place of sys.stdin."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)

    def isatty(self) -> bool:
        return False


# --- what is text -----------------------------------------------------------------------------------------------------


def test_a_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "marked.txt"
    path.write_bytes(codecs.BOM_UTF8 + "é\ufeff☃".encode())
    found = read_text(path)
    assert (found.text, found.name) == ("é\ufeff☃", "marked.txt")  # within a text it is a character
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(codecs.BOM_UTF8)
    assert read_text(path).text == ""


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_are_named(encoding: str) -> None:
    raw = (PROMPT if encoding in ("utf-16", "utf-32") else "\ufeff" + PROMPT).encode(encoding)
    with pytest.raises(UserError, match=f"^here: text in {encoding[:6].upper()}, expected UTF-8$"):
        decoded(raw, "here")


def test_the_wrong_byte_is_named() -> None:
    for mark in (b"", codecs.BOM_UTF8):
        with pytest.raises(UserError, match=f"^here: byte {len(mark) + 3} is 0xe9, expected UTF-8 text"):
            decoded(mark + b"caf\xe9", "here")


def test_one_line_end_is_taken_away() -> None:
    for given, left in {
        "a": "a",
        "a\n": "a",
        "a\r\n": "a",
        "a\n\n": "a\n",
        "a\r\n\r\n": "a\r\n",
        "a\r": "a\r",
        "\n": "",
        "": "",
    }.items():
        assert without_line_end(given) == left


# --- prompts ----------------------------------------------------------------------------------------------------------


@posix
def test_prompts_of_every_origin_are_the_same(
    tiny_gguf: Path, tmp_path: Path, fifo: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = result_of(capsys, "complete", tiny_gguf, *GREEDY, "-p", PROMPT)
    for mark in (b"", codecs.BOM_UTF8):
        for end in (b"", b"\n", b"\r\n"):
            content = mark + PROMPT.encode() + end
            (tmp_path / "prompt.txt").write_bytes(content)
            monkeypatch.setattr("sys.stdin", Stdin(content))
            for words in (("--prompt-file", tmp_path / "prompt.txt"), ("--prompt-file", fifo(content)), ()):
                found = result_of(capsys, "complete", tiny_gguf, *GREEDY, *words)
                assert (found["text"], found["prompt_tokens"]) == (usual["text"], usual["prompt_tokens"])


@pytest.mark.parametrize("first", [codecs.BOM_UTF8 + b"/stats\n", codecs.BOM_UTF8 + b"\r\n", b"\r\n"])
def test_the_lines_of_a_chat(tiny_gguf: Path, capsys: pytest.CaptureFixture[str], first: bytes) -> None:
    with runtime.load(tiny_gguf, threads=1, n_ctx=64) as model:
        session = Session(model, Conversation(None), Sampling(temperature=0), 2)
        assert answer_lines(session, io.BytesIO(first + b"We hold\r\n"))
        assert [m["content"] for m in session.conversation.messages if m["role"] == "user"] == ["We hold"]
        with pytest.raises(UserError, match="stdin: text in UTF-16"):
            answer_lines(session, io.BytesIO("We\nhold\n".encode("utf-16")))
        assert len(session.replies) == 1
        capsys.readouterr()
        assert not answer_lines(session, io.BytesIO(b"We\n\xff\xfe\n\xef\xbb\xbfhold\n"))
        assert "error: stdin: byte 0 is 0xff, expected UTF-8 text" in capsys.readouterr().err
        assert session.conversation.messages[-2]["content"] == "\ufeffhold"


def test_a_saved_chat_with_a_mark(tmp_path: Path) -> None:
    conversation = Conversation(None)
    conversation.add("user", "We hold")
    conversation.save(tmp_path / "talk.json")
    marked = tmp_path / "marked.json"
    marked.write_bytes(codecs.BOM_UTF8 + (tmp_path / "talk.json").read_bytes())
    loaded = Conversation(None)
    loaded.load(marked)
    assert loaded.messages == conversation.messages


# --- texts that are measured ------------------------------------------------------------------------------------------


@posix
def test_perplexity_of_a_pipe(tiny_gguf: Path, tmp_path: Path, fifo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--window", 64, "--tokens", 120, "--threads", 1)
    (tmp_path / "text.txt").write_bytes(LONG)
    (tmp_path / "marked.txt").write_bytes(codecs.BOM_UTF8 + LONG)
    usual = result_of(capsys, "perplexity", tiny_gguf, tmp_path / "text.txt", *words)["perplexity"]
    reading, writing = os.pipe()
    threading.Thread(target=lambda: (os.write(writing, LONG), os.close(writing))).start()
    for path in (tmp_path / "marked.txt", fifo(LONG), Path(f"/dev/fd/{reading}")):
        assert result_of(capsys, "perplexity", tiny_gguf, path, *words)["perplexity"] == usual
    os.close(reading)


@posix
def test_a_card_reads_its_text_once(tiny_gguf: Path, fifo: Any) -> None:
    with GgufFile(tiny_gguf) as file:
        found = examine(
            file, CardOptions(perplexity=fifo(LONG), perplexity_tokens=60, threads=1, plot=False)
        ).perplexity
    assert found is not None
    assert (found.sha256, set(found.modes)) == (hashlib.sha256(LONG).hexdigest(), {"dense", "exact"})


@posix
def test_calibration_and_evaluation_read_pipes(tiny_gguf: Path, tmp_path: Path, fifo: Any) -> None:
    (tmp_path / "text.txt").write_bytes(codecs.BOM_UTF8 + LONG)
    assert (
        calibration_text.read_corpus(fifo(LONG)).text
        == calibration_text.read_corpus(tmp_path / "text.txt").text
        == LONG.decode()
    )
    assert evaluate(tiny_gguf, fifo(LONG), 600, threads=1) == evaluate(tiny_gguf, tmp_path / "text.txt", 600, threads=1)


@pytest.mark.parametrize("command", ["perplexity MODEL PATH", "complete MODEL --prompt-file PATH"])
def test_what_is_no_text_is_one_error(
    command: str, tiny_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, wide = tmp_path / "empty", tmp_path / "wide.txt"
    empty.touch()
    wide.write_text(PROMPT, encoding="utf-16")
    cases = {tmp_path: "Is a directory", wide: "text in UTF-16, expected UTF-8"}
    for path, message in cases.items() if "perplexity" not in command else {**cases, empty: "0 tokens"}.items():
        words = command.replace("MODEL", str(tiny_gguf)).replace("PATH", str(path)).split()
        assert main([*words, "--threads", "1"]) == 1
        assert f"error: `{path}`: {message}" in capsys.readouterr().err
