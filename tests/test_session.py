"""A chat without a terminal: its conversation as data, and its session with a model."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import runtime
from runtime.commands.chat import answer_lines
from runtime.commands.conversation import Conversation
from runtime.commands.session import Session
from runtime.errors import UserError
from runtime.model import Model
from runtime.text.sampling import Sampling

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
    conversation = Conversation(CHATML, {"bos_token": "<s>", "eos_token": "</s>"}, "Be brief.")
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


def test_a_save_that_fails_keeps_what_was_saved(tmp_path: Path) -> None:
    conversation = Conversation(None)
    conversation.add("user", "kept")
    conversation.save(tmp_path / "talk.json")
    conversation.add("user", "x" * 100_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"talk\.json"):
            conversation.save(tmp_path / "talk.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    loaded = Conversation(None)
    loaded.load(tmp_path / "talk.json")
    assert [m["content"] for m in loaded.messages] == ["kept"]
    assert [file.name for file in tmp_path.iterdir()] == ["talk.json"]


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


def session_with(model: Model, max_tokens: int | None = 8, shift: bool = True, **conversation: Any) -> Session:
    return Session(model, Conversation(None, **conversation), GREEDY, max_tokens, shift)


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
    (note,) = session.context_notes(reply)
    assert "context of 96 tokens is full: /reset" in note
    assert "at most 1024" in note


def test_a_conversation_that_no_longer_fits_is_said_and_kept(model: Model) -> None:
    session = session_with(model, shift=False)
    session.reply("One", going_on)
    before = list(session.conversation.messages)
    with pytest.raises(UserError, match="fewer than the context of 96; your last text was not added") as caught:
        session.reply("word " * 100, going_on)
    assert "/reset" in caught.value.hint
    assert session.conversation.messages == before
    session.command("/reset")
    assert session.reply("One", going_on).text == session.replies[0].text


def test_a_template_spells_the_special_tokens(model: Model) -> None:
    # Behind a special token this model's texts get no space by themselves: `"legacy": false`.
    session = Session(
        model,
        Conversation("{{ bos_token }} {{ messages[-1].content }}", {"bos_token": "<s>", "eos_token": "</s>"}),
        GREEDY,
        8,
    )
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
