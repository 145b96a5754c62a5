"""`python -m runtime chat` at a real pseudo-terminal: what is typed, what is seen, and what becomes of the process."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from parrot import WOMEN, make_parrot
from terminal import ALT_ENTER, CTRL_C, CTRL_D, CTRL_Z, ENTER, PASTE, TAB, UP, Terminal, chat

PROMPT = r"(^|\n)>( |\n|$)"
FOOTER = r"\[\d+ tokens · [\d.,]+ tokens/s · [\d.]+% of neurons computed · [\d.]+ [kM]B per token( · [a-z ]+)?\]"
EMOJI = "👩‍👩‍👧 ❤️ 日本語 éé"  # joined, with a variation selector, wide, and with combining marks
FAMILY = "\N{WOMAN}"


@pytest.fixture
def screen(tiny_gguf: Path, tmp_path: Path) -> Iterator[Terminal]:
    with chat(tmp_path / "state", tiny_gguf, "--temp", 0, "-n", 8) as opened:
        yield opened


@pytest.fixture
def endless(emoji_gguf: Path, tmp_path: Path) -> Iterator[Terminal]:
    """A chat whose replies end with the context only."""
    with chat(tmp_path / "state", emoji_gguf, "--temp", 0, "-n", 16_000, "-c", 16_384, columns=100) as opened:
        yield opened


def enter(terminal: Terminal, keys: str) -> None:
    """Type something once the prompt is there."""
    terminal.expect(PROMPT)
    terminal.send(keys + ENTER)


def saved(terminal: Terminal, file: Path) -> list[dict[str, Any]]:
    """The messages of the chat."""
    enter(terminal, f"/save {file}")
    terminal.expect(r"saved \d+ messages")
    messages: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["messages"]
    return messages


# --- a whole chat -----------------------------------------------------------------------------------------------------


def test_a_chat_from_start_to_exit(screen: Terminal, tmp_path: Path) -> None:
    greeting = screen.expect("/help lists")
    assert "no chat template" in greeting
    assert "context of 1024 tokens" in greeting
    enter(screen, "My fellow citizens,")
    reply = screen.expect(FOOTER)
    assert "[8 tokens ·" in reply
    enter(screen, "/stats")
    stats = screen.expect(r"5 █\S* +[\d.]+%")
    assert re.search(r"replies +1\b", stats)
    bars = re.findall(r"\n\d (\S*) +([\d.]+)%", stats)
    assert len(bars) == 6
    shares = [float(share) for _, share in bars]
    assert max(bars, key=lambda row: len(row[0]))[1] == str(max(shares)) == re.findall(r"bar: ([\d.]+)%", stats)[0]
    messages = saved(screen, tmp_path / "talk.json")
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert messages[1]["content"].split()[-1] in reply
    enter(screen, "/reset")
    screen.expect("conversation cleared")
    enter(screen, f"/load {tmp_path / 'talk.json'}")
    screen.expect("loaded 2 messages")
    enter(screen, f"/load {tmp_path / 'missing.json'}")
    screen.expect("error: .*missing.json.*No such file")
    enter(screen, "/sav")
    screen.expect("unknown command `/sav`\nhint: did you mean `/save`")
    enter(screen, "/undo")
    screen.expect("took back: My fellow citizens,")
    enter(screen, "/retry")
    screen.expect("error: nothing to take back")
    enter(screen, "/help")
    screen.expect("begin anew")
    enter(screen, "/exit")
    assert screen.ended() == 0


def test_a_first_text_and_a_system_prompt(tiny_gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "first.txt"
    file.write_text(f"{EMOJI}\nMy fellow\x1b[2J citizens,\n", encoding="utf-8")
    options = ("--system", "A speech.", "--prompt-file", file, "--json")
    with chat(tmp_path, tiny_gguf, "--temp", 0, "-n", 4, *options) as terminal:
        shown = terminal.expect(FOOTER)
        assert f"> {EMOJI}\n  My fellow\ufffd[2J citizens,\n" in shown
        messages = saved(terminal, tmp_path / "talk.json")
        assert [m["role"] for m in messages] == ["system", "user", "assistant"]
        assert messages[1]["content"] == f"{EMOJI}\nMy fellow\x1b[2J citizens,"
        enter(terminal, "/retry")
        terminal.expect(FOOTER)
        again = saved(terminal, tmp_path / "talk.json")
        assert again == messages
        enter(terminal, "/exit")
        result = json.loads(re.findall(r"\{.*\}", terminal.expect(r"\{[\s\S]*\}").replace("\n", ""))[-1])
        assert terminal.ended() == 0
    assert (result["tokens"], len(result["replies"])) == (8, 2)


# --- typing -----------------------------------------------------------------------------------------------------------


def test_the_history_is_private_and_offered_to_the_next_chat(tiny_gguf: Path, tmp_path: Path) -> None:
    options = (tmp_path / "state", tiny_gguf, "--temp", 0, "-n", 2)
    with chat(*options) as first:
        enter(first, "My fellow\\" + ENTER + "citizens,")
        first.expect(FOOTER)
        first.expect(PROMPT)
        first.send(CTRL_D)
        assert first.ended() == 0
    history = tmp_path / "state/lazyneuron/history"
    assert history.stat().st_mode & 0o077 == 0
    with chat(*options) as second:
        second.expect(PROMPT)
        second.send(UP)
        second.expect("My fellow\n  citizens,")
        second.send(ENTER)
        second.expect(FOOTER)
        messages = saved(second, tmp_path / "talk.json")
    assert messages[0]["content"] == "My fellow\ncitizens,"


def test_a_history_that_cannot_be_written_does_no_harm(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "lazyneuron/history").mkdir(parents=True)
    with chat(tmp_path, tiny_gguf, "--temp", 0, "-n", 2) as terminal:
        terminal.expect("the history is not kept: .*Is a directory")
        enter(terminal, "We")
        terminal.expect(FOOTER)
        terminal.expect(PROMPT)
        terminal.send(UP)
        terminal.expect("We")
        terminal.send(ENTER)
        terminal.expect(FOOTER)


@pytest.mark.parametrize(
    "keys", ["one\\" + ENTER + "two", "one" + ALT_ENTER + "two", PASTE.format("one\ntwo"), PASTE.format("one\r\ntwo")]
)
def test_several_lines(keys: str, screen: Terminal, tmp_path: Path) -> None:
    screen.expect(PROMPT)
    screen.send(keys)
    screen.expect("one\n  two")  # and nothing is sent yet
    screen.send(" three" + ENTER)
    screen.expect(FOOTER)
    messages = saved(screen, tmp_path / "talk.json")
    assert [m["content"] for m in messages if m["role"] == "user"] == ["one\ntwo three"]


def test_tab_completes_commands_and_files(screen: Terminal, tmp_path: Path) -> None:
    (tmp_path / "talk of the town.json").write_text("{}")
    screen.expect(PROMPT)
    screen.send("/s" + TAB)
    menu = screen.expect("/stats .*layers")
    assert "/save" in menu
    screen.send("a" + TAB)
    screen.expect("> /save")
    screen.send(f"{tmp_path}/talk" + TAB)
    screen.expect("talk of the town.json")
    screen.send(ENTER)
    screen.expect("error: .*talk of the town.json`: exists and is no saved conversation")
    screen.expect(PROMPT)
    screen.send("no /s" + TAB + "!" + ENTER)
    screen.expect("no /s!")
    screen.expect(FOOTER)


def test_a_line_of_2000_emoji(emoji_gguf: Path, tmp_path: Path) -> None:
    line = "🙂👩‍👩‍👧日é"
    line = (line * (2000 // len(line) + 1))[:1999] + "!"
    with chat(tmp_path, emoji_gguf, "--temp", 0, "-n", 7, "-c", 16_384, lines=24) as terminal:
        enter(terminal, PASTE.format(line))
        terminal.expect(FOOTER)
        messages = saved(terminal, tmp_path / "talk.json")
        enter(terminal, line[:200])  # typed, not pasted
        terminal.expect(FOOTER)
        more = saved(terminal, tmp_path / "talk.json")
    assert [m["content"] for m in messages] == [line, WOMEN]
    assert more[2]["content"] == line[:200]


def test_bytes_that_are_no_text(screen: Terminal, tmp_path: Path) -> None:
    screen.expect(PROMPT)
    screen.send(b"a\xff\xfeb" + ENTER.encode())
    screen.expect(FOOTER)
    assert saved(screen, tmp_path / "talk.json")[0]["content"] == "a\ufffd\ufffdb"


def test_wide_characters_are_edited_where_they_stand(screen: Terminal, tmp_path: Path) -> None:
    screen.expect(PROMPT)
    screen.send("日本語🙂é" + "\x7f" * 2 + "\x1b[D" * 2 + "x")
    screen.expect("日x本語")
    screen.expect_cursor(len("> ") + len("日") * 2 + 1)
    screen.send(ENTER)
    screen.expect(FOOTER)
    assert saved(screen, tmp_path / "talk.json")[0]["content"] == "日x本語"


# --- interrupting -----------------------------------------------------------------------------------------------------


def test_ctrl_c_stops_only_the_reply(endless: Terminal) -> None:
    enter(endless, "Go")
    endless.expect(f"({FAMILY}.*\n){{3}}")
    endless.send(CTRL_C)
    endless.expect(r"· stopped\]")
    enter(endless, "/stats")
    endless.expect(r"replies +1\b")
    enter(endless, "Go")
    endless.expect(f"({FAMILY}.*\n){{2}}")
    endless.send(CTRL_C * 3)  # an impatient user
    endless.expect(r"· stopped\]")
    enter(endless, "/stats")
    endless.expect(r"replies +2\b")
    enter(endless, "/exit")
    assert endless.ended() == 0


def test_ctrl_c_before_the_first_token_takes_the_text_back(emoji_gguf: Path, tmp_path: Path) -> None:
    with chat(tmp_path, emoji_gguf, "--temp", 0, "-n", 7, "-c", 10_000) as terminal:
        enter(terminal, PASTE.format("a " * 2000))
        terminal.expect(FOOTER)
        enter(terminal, PASTE.format("b " * 8000))
        terminal.expect("dropped the 2 oldest messages")  # the prompt that is left takes seconds
        terminal.send(CTRL_C)
        terminal.expect("stopped before the reply began")
        messages = saved(terminal, tmp_path / "talk.json")
        enter(terminal, "c")
        terminal.expect(FOOTER)
    assert [m["content"][:2] for m in messages] == ["a ", WOMEN]


def test_ctrl_c_at_the_prompt_clears_the_line_and_then_hints(screen: Terminal) -> None:
    screen.expect(PROMPT)
    screen.send("never sent")
    screen.expect("never sent")
    screen.send(CTRL_C)
    screen.expect_gone("never sent")
    screen.send(CTRL_C)
    screen.expect("Ctrl-D or /exit leaves")
    enter(screen, "/stats")
    screen.expect("no replies yet")
    screen.process.kill(signal.SIGTERM)
    assert screen.ended() == 128 + signal.SIGTERM


def test_ctrl_z_and_back(tiny_gguf: Path, tmp_path: Path) -> None:
    with Terminal("bash", "--norc", "--noprofile", "-i", PS1="shell$ ", XDG_STATE_HOME=str(tmp_path)) as shell:
        shell.expect(r"shell\$")
        shell.send(f"{sys.executable} -m runtime chat {tiny_gguf} --temp 0 -n 4{ENTER}")
        shell.expect(PROMPT)
        shell.send("half")
        shell.expect("half")
        shell.send(CTRL_Z)
        shell.expect("Stopped")
        shell.expect(r"shell\$")
        shell.send("fg" + ENTER)
        shell.expect("> half")
        shell.send(" of it" + ENTER)
        shell.expect(FOOTER)
        assert saved(shell, tmp_path / "talk.json")[0]["content"] == "half of it"
        enter(shell, "/exit")
        shell.expect(r"shell\$")


def test_ctrl_z_during_a_reply(emoji_gguf: Path, tmp_path: Path) -> None:
    with Terminal("bash", "--norc", "--noprofile", "-i", PS1="shell$ ", XDG_STATE_HOME=str(tmp_path)) as shell:
        shell.expect(r"shell\$")
        shell.send(f"{sys.executable} -m runtime chat {emoji_gguf} --temp 0 -n 3500 --threads 1 -p Go{ENTER}")
        shell.expect(f"{FAMILY}.*\n")
        shell.send(CTRL_Z)
        shell.expect("Stopped")
        shell.expect(r"shell\$")
        shell.send("fg" + ENTER)
        shell.expect(r"\[3500 tokens")
        messages = saved(shell, tmp_path / "talk.json")
        enter(shell, "/exit")
        shell.expect(r"shell\$")
    assert messages[1]["content"] == WOMEN * 500


# --- the end of input -------------------------------------------------------------------------------------------------


def test_ctrl_d_leaves_after_the_line_is_empty(screen: Terminal) -> None:
    screen.expect(PROMPT)
    screen.send("x" + CTRL_D)
    screen.expect("x")
    screen.send("\x7f" + CTRL_D)
    assert screen.ended() == 0


@pytest.mark.parametrize("replying", [False, True])
@pytest.mark.parametrize("ignoring", [False, True])
def test_a_terminal_that_goes_away_ends_the_chat(
    ignoring: bool, replying: bool, emoji_gguf: Path, tmp_path: Path
) -> None:
    options = f"--temp 0 -n 16000 -c 16384 --threads 1{' -p Go' if replying else ''}"
    script = f"exec {sys.executable} -m runtime chat {emoji_gguf} {options} 2> {tmp_path / 'errors'}"
    with Terminal("sh", "-c", f"trap '' HUP; {script}" if ignoring else script, XDG_STATE_HOME=str(tmp_path)) as gone:
        gone.expect(f"{FAMILY}.*\n" if replying else PROMPT)
        gone.hang_up()
        status = gone.ended()
    # At the prompt the signal itself ends it, in a reply the clean-up that it asks for.
    assert status == (128 + signal.SIGHUP if replying else -signal.SIGHUP) or (ignoring and status in (0, 1))
    errors = (tmp_path / "errors").read_text()
    assert "Traceback" not in errors
    assert errors.count("error: ") <= 1


# --- the size of the window -------------------------------------------------------------------------------------------


def test_resizing_while_typing(screen: Terminal, tmp_path: Path) -> None:
    text = f"{EMOJI} and some words more"
    screen.expect(PROMPT)
    screen.send(text)
    screen.expect("words more")
    for columns, lines in ((30, 10), (20, 5), (120, 50)):
        screen.resize(columns, lines)
        screen.expect_raw(rb"\x1b\[\?25h")  # it was drawn again
    screen.send("!" + ENTER)
    screen.expect_raw(rb"tokens/s")
    screen.expect_raw(rb"\[\?2004h")
    screen.send(f"/save {tmp_path / 'talk.json'}{ENTER}")
    screen.expect_raw(rb"saved 2 messages")
    assert json.loads((tmp_path / "talk.json").read_text())["messages"][0]["content"] == text + "!"


def test_resizing_during_a_reply(emoji_gguf: Path, tmp_path: Path) -> None:
    with chat(tmp_path, emoji_gguf, "--temp", 0, "-n", 1400) as terminal:
        enter(terminal, "Go")
        for columns, lines in ((40, 10), (20, 5), (100, 40)):
            terminal.expect_raw(FAMILY.encode())
            terminal.resize(columns, lines)
        terminal.expect_raw(rb"reached\]")
        terminal.expect_raw(rb"\[\?2004h")
        terminal.send(f"/save {tmp_path / 'talk.json'}{ENTER}")
        terminal.expect_raw(rb"saved 2 messages")
        assert (WOMEN * 200).encode() in terminal.raw
    assert json.loads((tmp_path / "talk.json").read_text())["messages"][1]["content"] == WOMEN * 200


def test_a_window_of_20_columns(tiny_gguf: Path, tmp_path: Path) -> None:
    with chat(tmp_path, tiny_gguf, "--temp", 0, "-n", 8, columns=20, lines=12) as narrow:
        narrow.expect(PROMPT)
        text = "日本語の長い文章を書く🙂"
        narrow.send(text)
        narrow.expect("🙂")
        assert "> 日本語の長い文章を\n  書く🙂" in narrow.screen.text()
        narrow.send(ENTER)
        narrow.expect(r"reached\]")
        enter(narrow, "/stats")
        narrow.expect(r"5 █\S* +[\d.]+%")
        enter(narrow, "/exit")
        assert narrow.ended() == 0


# --- colours and simple terminals -------------------------------------------------------------------------------------

COLOUR = rb"\x1b\[(?:[\d;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]"


@pytest.mark.parametrize(("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_are_for_those_who_want_them(
    env: dict[str, str], coloured: bool, tiny_gguf: Path, tmp_path: Path
) -> None:
    with chat(tmp_path, tiny_gguf, "--temp", 0, "-n", 4, **env) as terminal:
        enter(terminal, "We")
        terminal.expect(FOOTER)
        enter(terminal, "/stats")
        terminal.expect(r"5 █\S* +[\d.]+%")
        enter(terminal, "/exit")
        assert terminal.ended() == 0
    assert (re.search(COLOUR, terminal.raw) is not None) == coloured
    assert (b"\x1b[" in terminal.raw) == (env.get("TERM") != "dumb")


@pytest.mark.parametrize("command", ["chat MODEL -p Go", "complete MODEL -p Go", "chat MODEL"])
def test_a_model_cannot_steer_the_terminal(command: str, tmp_path: Path) -> None:
    model = make_parrot(tmp_path, "\x1b[31m\u202e")
    line = f"exec {sys.executable} -m runtime {command.replace('MODEL', str(model))} --temp 0 -n 16"
    with Terminal(
        "sh", "-c", line if "-p" in command else f"echo Go | {line}", XDG_STATE_HOME=str(tmp_path)
    ) as terminal:
        terminal.expect("\ufffd\\[31m\ufffd\ufffd\\[31m\ufffd")
    assert b"\x1b[31m" not in terminal.raw


def test_bars_without_unicode(tiny_gguf: Path, tmp_path: Path) -> None:
    with chat(tmp_path, tiny_gguf, "--temp", 0, "-n", 4, PYTHONIOENCODING="ascii") as terminal:
        enter(terminal, "We")
        terminal.expect("per token")
        enter(terminal, "/stats")
        terminal.expect(r"5 #+ +[\d.]+%")


# --- a full context ---------------------------------------------------------------------------------------------------


def test_what_is_dropped_is_said_below_the_reply(emoji_gguf: Path, tmp_path: Path) -> None:
    with chat(tmp_path, emoji_gguf, "--temp", 0, "-n", 60, "-c", 64, columns=200) as terminal:
        enter(terminal, "Go")
        terminal.expect(r"reached\]")
        enter(terminal, "Go")
        shown = terminal.expect(r"dropped the 2 oldest messages \(\d+ tokens\) to fit the context of 64 tokens")
        assert FAMILY not in shown
        terminal.expect(r"reached\]")
        messages = saved(terminal, tmp_path / "talk.json")
    assert [len(m["content"].encode()) for m in messages] == [2, 60, 2, 60]
