"""`python -m runtime chat` in a process of its own: through a pipe, and at a pseudo-terminal."""

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

import pytest

import runtime
from convert import convert
from runtime.sampling import Sampling

ROOT = Path(__file__).parent.parent
CHATML = """\
{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
"""
GREEDY = Sampling(temperature=0)


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
PROMPT = ">"  # the space after it is drawn as a movement of the cursor
PASTE = "\x1b[200~{}\x1b[201~"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-Z\\-_=>]|\x1b\].*?\x07")
FOOTER = r"\[\d+ tokens · [\d.]+ tokens/s · [\d.]+% of neurons computed · [\d.]+ MB per token( · [a-z ]+)?\]"


class Screen:
    """A chat in a process of its own whose terminal we are."""

    def __init__(self, state: Path, *arguments: object) -> None:
        import fcntl
        import termios

        self._ours, theirs = pty.openpty()
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
        self.expect(PROMPT)
        self.send(line + ENTER)

    def expect(self, pattern: str, seconds: float = 20) -> str:
        """Read until `pattern` appears; returns the text up to its end and forgets it."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self._text)):
            assert select.select([self._ours], [], [], max(0, until - time.monotonic()))[0], (pattern, self._text)
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
    screen.expect(PROMPT)
    screen.send("\x1b[A" + ENTER)
    screen.expect(FOOTER)
    screen.expect(PROMPT)
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
    screen.expect(PROMPT)
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
