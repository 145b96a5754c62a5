"""The chat: its conversation as data, its session with a model, through a pipe, and at a pseudo-terminal."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import runtime
from convert import convert
from runtime.commands.chat import answer_lines
from runtime.commands.conversation import Conversation
from runtime.commands.session import Session
from runtime.errors import UserError
from runtime.model import Model
from runtime.sampling import Sampling

ROOT = Path(__file__).parent.parent
CHATML = """\
{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
"""
GREEDY = Sampling(temperature=0)


# --- the conversation as data -----------------------------------------------------------------------------------------


def test_running_text_continues_replies_and_starts_lines() -> None:
    conversation = Conversation(None, system="A play.")
    conversation.add("user", "HAMLET.")
    conversation.add("assistant", " To be,")
    conversation.add("user", "or not")
    conversation.add("assistant", " to be.\n")
    conversation.add("user", "HORATIO.")
    assert conversation.prompt() == "A play.\nHAMLET. To be,\nor not to be.\nHORATIO."


def test_a_template_renders_the_messages() -> None:
    conversation = Conversation(CHATML, "<s>", "</s>", "Be brief.")
    conversation.add("user", "Hi")
    assert conversation.prompt() == "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n"


def test_reset_keeps_the_system_prompt() -> None:
    conversation = Conversation(None, system="A play.")
    conversation.add("user", "HAMLET.")
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "A play."}]


def test_save_and_load(tmp_path: Path) -> None:
    saved, loaded = Conversation(None, system="Sé 🙂"), Conversation(CHATML)
    saved.add("user", 'two\nlines "quoted"')
    saved.add("assistant", "")
    saved.save(tmp_path / "talk.json")
    saved.save(tmp_path / "talk.json")
    loaded.load(tmp_path / "talk.json")
    assert loaded.messages == saved.messages
    loaded.reset()
    assert loaded.messages == saved.messages[:1]


def test_save_overwrites_no_other_file(tmp_path: Path) -> None:
    precious = tmp_path / "thesis.json"
    precious.write_text('{"chapter": 1}')
    with pytest.raises(UserError, match="no saved conversation"):
        Conversation(None).save(precious)
    assert precious.read_text() == '{"chapter": 1}'


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no json",
        "[]",
        '{"messages": []}',
        '{"lazyneuron_conversation": 2, "messages": []}',
        '{"lazyneuron_conversation": 1, "messages": {}}',
        '{"lazyneuron_conversation": 1, "messages": [{"role": "root", "content": "x"}]}',
        '{"lazyneuron_conversation": 1, "messages": [{"role": "user", "content": 3}]}',
        "[" * 100_000,
    ],
)
def test_load_refuses_other_files_and_changes_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(content)
    conversation = Conversation(None)
    conversation.add("user", "kept")
    with pytest.raises(UserError, match=r"bad\.json"):
        conversation.load(tmp_path / "bad.json")
    assert conversation.messages == [{"role": "user", "content": "kept"}]


# --- a session with a model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[Model]:
    with runtime.load(tiny_gguf, threads=1, n_ctx=96) as loaded:
        yield loaded


def session_with(model: Model, max_tokens: int | None = 8, **conversation: Any) -> Session:
    return Session(model, Conversation(None, **conversation), GREEDY, max_tokens)


def going_on(_piece: str) -> bool:
    return True


def test_replies_continue_the_whole_conversation(model: Model) -> None:
    session = session_with(model)
    first = session.reply("My fellow citizens,", going_on)
    second = session.reply("We must", going_on)
    whole = f"My fellow citizens,{first.text}\nWe must"
    assert second.text == "".join(model.generate(whole, max_tokens=8, sampling=GREEDY))
    assert second.stats.cached_tokens > 5
    assert [m["role"] for m in session.conversation.messages] == ["user", "assistant"] * 2


def test_each_reply_has_its_own_seed_and_runs_repeat(model: Model) -> None:
    def texts(seed: int) -> list[str]:
        session = Session(model, Conversation(None), Sampling(seed=seed, temperature=1.5), 8)
        for _ in range(2):
            session.reply("We", going_on)
            session.command("/reset")
        return [reply.text for reply in session.replies]

    assert texts(1) == texts(1)
    assert texts(1)[0] != texts(1)[1]


def test_a_stopped_reply_stays_as_far_as_it_came(model: Model) -> None:
    session = session_with(model)
    pieces: list[str] = []

    def three(piece: str) -> bool:
        pieces.append(piece)
        return len(pieces) < 3

    reply = session.reply("My fellow citizens,", three)
    assert reply.stop_reason is None
    assert reply.text == "".join(pieces) == session.conversation.messages[-1]["content"]
    assert session.reply("And", going_on).stop_reason == "length"


def test_a_text_whose_reply_never_began_is_taken_back(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_with(model)
    session.reply("One", going_on)
    before = list(session.conversation.messages)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.reply("Two", going_on)
    assert session.conversation.messages == before


def test_a_full_context_is_said(model: Model) -> None:
    session = session_with(model, max_tokens=None)
    reply = session.reply("My fellow citizens,", going_on)
    assert reply.stop_reason in ("context", "eos")
    assert "context of 96 tokens is full: /reset" in session.context_note(reply)
    assert "at most 1024" in session.context_note(reply)


def test_a_conversation_that_no_longer_fits_is_said_and_kept(model: Model) -> None:
    session = session_with(model)
    session.reply("One", going_on)
    before = list(session.conversation.messages)
    with pytest.raises(UserError, match="fewer than the context of 96; your last text was not added") as caught:
        session.reply("word " * 100, going_on)
    assert "/reset" in caught.value.hint
    assert session.conversation.messages == before
    session.command("/reset")
    assert session.reply("One", going_on).text == session.replies[0].text


def test_a_template_spells_the_special_tokens(model: Model) -> None:
    session = Session(model, Conversation("{{ bos_token }}{{ messages[-1].content }}", "<s>", "</s>"), GREEDY, 8)
    plain = session_with(model)
    text = "My fellow citizens,"
    first, second = session.reply(text, going_on), plain.reply(text, going_on)
    assert (first.text, first.stats.prompt_tokens) == (second.text, second.stats.prompt_tokens)


def test_lines_go_on_after_a_mistake(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    session = session_with(model)
    lines = [b"One\n", b"\n", b"/bogus\n", b"\xff\n", b"   \r\n", b"/save\n", b"Two", b"/exit\n", b"Three\n"]
    assert answer_lines(session, lines) is False
    out, err = capsys.readouterr()
    assert out == "".join(reply.text.removesuffix("\n") + "\n" for reply in session.replies)
    assert len(session.replies) == 2
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        "error: unknown command `/bogus`",
        "error: stdin: byte 0 is 0xff, expected UTF-8 text",
        "error: no file name",
    ]


# --- through a pipe ---------------------------------------------------------------------------------------------------


def chat(*arguments: object, stdin: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtime", "chat", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, input=stdin, capture_output=True, encoding="utf-8", timeout=120, check=False
    )


def test_a_pipe_gets_replies_and_nothing_else(tiny_gguf: Path) -> None:
    done = chat(tiny_gguf, "--temp", 0, "-n", 6, stdin="My fellow citizens,\n\nWe must")
    assert done.returncode == 0
    assert done.stderr.count("no chat template") == len(done.stderr.splitlines()) == 1
    with_json = chat(tiny_gguf, "--temp", 0, "-n", 6, "--json", stdin="My fellow citizens,\n\nWe must\n/stats\n")
    *replies, last = with_json.stdout.splitlines()
    result = json.loads(last)
    assert "\n".join(replies) + "\n" == done.stdout == "".join(r.removesuffix("\n") + "\n" for r in result["replies"])
    assert len(result["replies"]) == 2
    assert (result["tokens"], result["ffn"], result["stop_reasons"]) == (12, "exact", ["length", "length"])
    assert result["tokens_per_s"] > 0
    assert 0 < result["computed_share"] < 0.5
    assert "neurons computed" in with_json.stderr


def test_a_full_context_is_one_line_on_stderr(tiny_gguf: Path) -> None:
    done = chat(tiny_gguf, "--temp", 0, "-n", 100, "-c", 32, stdin="My fellow citizens,\nAnd now\n/reset\nWe\n")
    assert done.returncode == 1
    assert "the context of 32 tokens is full: /reset begins anew" in done.stderr
    assert "error: the conversation has 3" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def templated_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("templated")
    shutil.copytree(ROOT / "examples/tiny-relu-llama", folder / "checkpoint")
    (folder / "checkpoint" / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}\
{{ raise_exception('no system prompts here') }}{% endif %}"
        + CHATML
    )
    convert(folder / "checkpoint", folder / "model.gguf")
    return folder / "model.gguf"


def test_the_files_template_is_used(templated_gguf: Path) -> None:
    done = chat(templated_gguf, "--temp", 0, "-n", 6, "--json", stdin="Hi\n")
    assert (done.returncode, done.stderr) == (0, "")
    with runtime.load(templated_gguf) as model:
        ids = model.tokenize("<|user|>\nHi</s>\n<|assistant|>\n", add_special=False)
        expected = "".join(model.generate(ids, max_tokens=6, sampling=GREEDY))
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["replies"], result["prompt_tokens"]) == ([expected], len(ids))


def test_a_template_that_refuses_is_one_line(templated_gguf: Path) -> None:
    done = chat(templated_gguf, "--system", "Be brief.", stdin="Hi\n")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: chat template: no system prompts here\nhint: ")


# --- at a terminal ----------------------------------------------------------------------------------------------------

pty = pytest.importorskip("pty")
CTRL_C, CTRL_D, ALT_ENTER, ENTER = "\x03", "\x04", "\x1b\r", "\r"
PASTE = "\x1b[200~{}\x1b[201~"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-Z\\-_=>]|\x1b\].*?\x07")
FOOTER = r"\[\d+ tokens · [\d.]+ tokens/s · [\d.]+% of neurons computed · [\d.]+ MB per token( · [a-z ]+)?\]"


class Screen:
    """A chat in a process of its own whose terminal we are."""

    def __init__(self, state: Path, *arguments: object) -> None:
        import fcntl
        import termios

        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, 120)) if sys.version_info >= (3, 11) else None
        env = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(state)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "runtime", "chat", *map(str, arguments)],
            cwd=ROOT,
            env=env,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            # Ctrl-C becomes a signal only on the controlling terminal.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
        )
        os.close(theirs)
        self._text = ""

    def send(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def type(self, line: str) -> None:
        """Type a line once the prompt is there."""
        self.expect("> ")
        self.send(line + ENTER)

    def expect(self, pattern: str, seconds: float = 60) -> str:
        """Read until `pattern` appears; returns the text up to its end and forgets it."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self._text)):
            assert select.select([self._ours], [], [], until - time.monotonic())[0], (pattern, self._text)
            self._text = ESCAPES.sub("", self._text + self._read())
        text, self._text = self._text[: found.end()], self._text[found.end() :]
        return text

    def _read(self) -> str:
        try:
            return os.read(self._ours, 65536).decode("utf-8", "replace")
        except OSError:  # Linux's way to say that the other side is closed
            raise AssertionError(f"the chat has ended: {self._text}") from None

    def ended(self) -> int:
        """The exit status, once the chat has ended."""
        return self.process.wait(timeout=30)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)


@pytest.fixture
def screen(tiny_gguf: Path, tmp_path: Path) -> Iterator[Screen]:
    opened = Screen(tmp_path / "state", tiny_gguf, "--temp", 0, "-n", 8, "--threads", 1)
    yield opened
    opened.close()


@pytest.fixture
def endless(tiny_gguf: Path, tmp_path: Path) -> Iterator[Screen]:
    opened = Screen(tmp_path / "state", tiny_gguf, "--seed", 1, "-n", 1000, "--threads", 1)
    yield opened
    opened.close()


def test_a_chat_from_start_to_exit(screen: Screen, tmp_path: Path) -> None:
    greeting = screen.expect("/help lists")
    assert "no chat template" in greeting
    assert "context of 1024 tokens" in greeting
    screen.type("My fellow citizens,")
    reply = screen.expect(FOOTER)
    assert "8 tokens ·" in reply
    screen.type("/stats")
    assert re.search(r"replies +1\b", screen.expect("after the last reply"))
    screen.type(f"/save {tmp_path / 'talk.json'}")
    screen.expect("saved 2 messages")
    screen.type("/reset")
    screen.expect("conversation cleared")
    screen.type(f"/load {tmp_path / 'talk.json'}")
    screen.expect("loaded 2 messages")
    screen.type(f"/load {tmp_path / 'missing.json'}")
    screen.expect("error: .*missing.json.*No such file")
    screen.type("/bogus")
    screen.expect("unknown command `/bogus`")
    screen.type("/help")
    screen.expect("begin anew")
    screen.type("/exit")
    assert screen.ended() == 0
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"]
    assert saved["messages"][1]["content"].split()[-1] in reply


def test_the_history_is_kept_private_and_recalled(screen: Screen, tmp_path: Path) -> None:
    screen.type("My fellow citizens,")
    screen.expect(FOOTER)
    screen.expect("> ")
    screen.send("\x1b[A" + ENTER)
    screen.expect(FOOTER)
    screen.expect("> ")
    screen.send(CTRL_D)
    assert screen.ended() == 0
    history = tmp_path / "state/lazyneuron/history"
    assert "+My fellow citizens," in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "keys", ["one\\" + ENTER + "two", "one" + ALT_ENTER + "two", PASTE.format("one\ntwo"), PASTE.format("one\r\ntwo")]
)
def test_several_lines(keys: str, screen: Screen, tmp_path: Path) -> None:
    screen.type(keys)
    screen.expect(FOOTER)
    screen.type(f"/save {tmp_path / 'talk.json'}")
    screen.expect("saved 2 messages")
    assert json.loads((tmp_path / "talk.json").read_text())["messages"][0]["content"] == "one\ntwo"


def test_ctrl_c_stops_only_the_reply(endless: Screen) -> None:
    endless.type("My fellow citizens,")
    endless.expect(r"My fellow citizens,\s+\S+ \S+ \S+")
    endless.send(CTRL_C)
    footer = endless.expect(FOOTER)
    assert "· stopped]" in footer
    assert int(re.findall(r"\[(\d+) tokens", footer)[-1]) < 900
    endless.type("/stats")
    endless.expect(r"replies +1\b")
    endless.type("/exit")
    assert endless.ended() == 0


def test_ctrl_c_at_the_prompt_clears_the_line_and_then_hints(screen: Screen) -> None:
    screen.expect("> ")
    screen.send("never sent")
    screen.expect("never sent")
    screen.send(CTRL_C)
    screen.send(CTRL_C)
    screen.expect("Ctrl-D or /exit leaves")
    screen.type("/stats")
    screen.expect("no replies yet")
    screen.process.send_signal(signal.SIGTERM)
    screen.ended()


def test_json_at_a_terminal_comes_last(tiny_gguf: Path, tmp_path: Path) -> None:
    screen = Screen(tmp_path, tiny_gguf, "--temp", 0, "-n", 4, "--json")
    try:
        screen.type("We")
        screen.expect(FOOTER)
        screen.type("/exit")
        result = json.loads(re.findall(r"\{.*\}", screen.expect(r"\{.*\}"))[-1])
        assert (result["tokens"], len(result["replies"])) == (4, 1)
        assert screen.ended() == 0
    finally:
        screen.close()
