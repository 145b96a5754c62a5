"""A chat that outgrows its context: what its replies begin and go on with, and what is said about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from parrot import WOMEN

import runtime
from runtime.commands.conversation import Conversation
from runtime.commands.session import Session
from runtime.errors import UserError
from runtime.model import Model
from runtime.text.sampling import Sampling

CHATML = """\
{% if messages[0].role == 'assistant' %}{{ raise_exception('begins with a reply') }}{% endif %}
{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
"""
GREEDY = Sampling(temperature=0)
N_CTX = 96


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[Model]:
    with runtime.load(tiny_gguf, threads=1, n_ctx=N_CTX) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def emoji(emoji_gguf: Path) -> Iterator[Model]:
    with runtime.load(emoji_gguf, threads=1, n_ctx=N_CTX) as loaded:
        yield loaded


def going_on(_piece: str) -> bool:
    return True


def prompt_ids(model: Model, template: str | None, *messages: tuple[str, str]) -> list[int]:
    """The ids of a conversation that holds nothing but `messages`."""
    conversation = Conversation(template, {"bos_token": "<s>", "eos_token": "</s>"})
    for role, content in messages:
        conversation.add(role, content)
    return model.tokenize(conversation.prompt(), add_special=template is None)


@dataclass
class Asked:
    """A generation that a session asked for."""

    ids: list[int]
    max_tokens: int | None
    seed: int | None
    generation: runtime.Generation


@pytest.fixture
def asked(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """All that is asked of `model` from here on."""
    asked: list[Asked] = []
    generate = model.generate

    def seen(ids: list[int], left: int | None, sampling: Sampling, cache_prompt: bool) -> runtime.Generation:
        generation = generate(ids, left, sampling, cache_prompt=cache_prompt)
        asked.append(Asked(ids, left, sampling.seed, generation))
        return generation

    monkeypatch.setattr(model, "generate", seen)
    return asked


@pytest.mark.parametrize("template", [None, CHATML])
def test_the_oldest_turns_go_and_the_system_prompt_stays(
    template: str | None, model: Model, asked: list[Asked], capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(model, Conversation(template, {"bos_token": "<s>", "eos_token": "</s>"}, "A speech."), GREEDY, 4)
    said: list[tuple[str, str]] = []
    n_dropped, notes = 0, []
    for limit in (*[4] * 9, 20, 20, 40, 40):
        said.append(("user", f"We must {len(said)}"))
        session.max_tokens = limit
        ids = before = prompt_ids(model, template, ("system", "A speech."), *said[n_dropped:])
        n_before = n_dropped
        if len(ids) >= N_CTX:
            # The reply shall fit, if it is no longer than a quarter of the context.
            while len(ids) + min(limit, N_CTX // 4) > N_CTX:
                n_dropped += 2
                ids = prompt_ids(model, template, ("system", "A speech."), *said[n_dropped:])
            notes.append(
                f"dropped the {n_dropped - n_before} oldest messages ({len(before) - len(ids)} tokens)"
                f" to fit the context of {N_CTX} tokens"
            )
        n_asked = len(asked)
        reply = session.reply(said[-1][1], going_on)
        assert asked[n_asked].ids == ids
        n_dropped += reply.dropped.messages  # while it was made
        said.append(("assistant", reply.text))
    assert notes
    assert capsys.readouterr().err.splitlines() == notes
    assert [(m["role"], m["content"]) for m in session.conversation.messages] == [("system", "A speech."), *said]


def test_a_reply_goes_on_where_the_context_was_full(model: Model, asked: list[Asked]) -> None:
    session = Session(model, Conversation(None), GREEDY, 30)
    first = session.reply("My fellow citizens,", going_on).text
    session.max_tokens = 90
    pieces: list[str] = []

    def show(piece: str) -> bool:
        pieces.append(piece)
        return True

    reply = session.reply("We must", show)
    _, before, after = asked
    whole = prompt_ids(model, None, ("user", "My fellow citizens,"), ("assistant", first), ("user", "We must"))
    short = prompt_ids(model, None, ("user", "We must"))
    begun, added = before.generation.token_ids, after.generation.token_ids
    assert (before.ids, before.max_tokens, len(begun)) == (whole, 90, N_CTX - len(whole))
    assert (after.ids, after.max_tokens) == ([*short, *begun], 90 - len(begun))
    text = b"".join(map(model.tokenizer.token_bytes, [*begun, *added])).decode()
    assert reply.text == text == "".join(pieces) == session.conversation.messages[-1]["content"]
    assert (reply.generations, reply.stop_reason) == (2, after.generation.stop_reason)
    assert session.context_notes(reply)[0] == (
        f"dropped the 2 oldest messages ({len(whole) - len(short)} tokens) to fit the context of 96 tokens"
    )
    stats = reply.stats
    assert stats.tokens == len(begun) + len(added) == reply.positions - len(short)
    assert stats.decoded_tokens == stats.tokens - 2
    assert stats.prompt_tokens == len(whole) + len(short) + len(begun)
    parts = (before.generation.stats, after.generation.stats)
    assert stats.computed_share == pytest.approx(sum(s.computed_share * s.tokens for s in parts) / stats.tokens)


def test_a_reply_that_fills_the_context_alone_stops(model: Model) -> None:
    session = Session(model, Conversation(None), GREEDY, 20)
    session.reply("My fellow citizens,", going_on)
    session.max_tokens = None
    reply = session.reply("We must", going_on)
    assert (reply.stop_reason, reply.positions, reply.dropped.messages) == ("context", N_CTX, 2)
    dropped, full = session.context_notes(reply)
    assert dropped.startswith("dropped the 2 oldest messages")
    assert full.startswith("the context of 96 tokens is full: /reset")


def test_a_character_may_be_torn_by_the_context(emoji: Model) -> None:
    for n in range(len(WOMEN.encode())):
        session = Session(emoji, Conversation(None), GREEDY, 40)
        session.reply("Go", going_on)
        session.max_tokens = 70 + n
        reply = session.reply("Go" + " on" * n, going_on)
        assert reply.generations == 2
        assert reply.text == (WOMEN * 20).encode()[: 70 + n].decode("utf-8", "replace")


def test_the_random_choices_of_a_reply_do_not_repeat(model: Model, asked: list[Asked]) -> None:
    session = Session(model, Conversation(None), Sampling(seed=7), 30)
    session.reply("My fellow citizens,", going_on)
    session.max_tokens = 80
    session.reply("We must", going_on)
    session.reply("/ /", lambda _: False)
    assert [one.seed for one in asked] == list(range(7, 7 + len(asked)))
    assert len(asked) == 4


def test_without_shifting_nothing_is_dropped(model: Model) -> None:
    session = Session(model, Conversation(None), GREEDY, 40, shift=False)
    session.reply("My fellow citizens,", going_on)
    session.max_tokens = None
    reply = session.reply("We must", going_on)
    assert (reply.stop_reason, reply.positions, session.conversation.dropped) == ("context", N_CTX, 0)
    with pytest.raises(UserError, match=r"the conversation has \d+ tokens, .*; your last text was not added"):
        session.reply("word " * 20, going_on)


def test_a_text_too_long_by_itself_drops_nothing(model: Model) -> None:
    session = Session(model, Conversation(None, system="A speech."), GREEDY, 8)
    session.reply("One", going_on)
    before = list(session.conversation.messages)
    with pytest.raises(UserError, match=r"your text has \d+ tokens, expected fewer than the context of 96"):
        session.reply("word " * 100, going_on)
    assert (session.conversation.messages, session.conversation.dropped) == (before, 0)


def test_a_saved_chat_is_whole_and_dropped_anew(model: Model, tmp_path: Path) -> None:
    session = Session(model, Conversation(None), GREEDY, 40)
    for text in ("One", "Two", "Three"):
        session.reply(text, going_on)
    assert session.conversation.dropped
    session.command(f"/save {tmp_path / 'talk.json'}")
    loaded = Session(model, Conversation(None), GREEDY, 40)
    loaded.command(f"/load {tmp_path / 'talk.json'}")
    assert loaded.conversation.messages == session.conversation.messages
    assert loaded.reply("Four", going_on).text == session.reply("Four", going_on).text
    assert loaded.conversation.dropped == session.conversation.dropped


# --- other replies ----------------------------------------------------------------------------------------------------


def test_undo_and_retry(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(model, Conversation(None), Sampling(seed=1, temperature=1.5), 8)

    def answer(text: str) -> None:
        session.reply(text, going_on)

    answer("One")
    first = list(session.conversation.messages)
    assert session.take("Two\x1b\nlines", answer)
    session.take("/retry", answer)
    contents = [m["content"] for m in session.conversation.messages]
    assert contents == ["One", session.replies[0].text, "Two\x1b\nlines", session.replies[2].text]
    assert session.replies[1].text != session.replies[2].text
    session.take("/undo", answer)
    assert session.conversation.messages == first
    assert capsys.readouterr().err == "took back: Two\ufffd ...\n"


def test_a_retry_that_never_began_keeps_the_reply(model: Model) -> None:
    session = Session(model, Conversation(None), GREEDY, 8)
    session.reply("One", going_on)
    before = list(session.conversation.messages)

    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.take("/retry", interrupted)
    assert session.conversation.messages == before


@pytest.mark.parametrize("template", [None, CHATML])
def test_the_repeat_penalty_of_a_reply_sees_the_whole_conversation(
    template: str | None, model: Model, asked: list[Asked]
) -> None:
    penalty = Sampling(temperature=0, repeat_penalty=1.5, repeat_last_n=-1, seed=1)
    session = Session(model, Conversation(template, {"bos_token": "<s>", "eos_token": "</s>"}), penalty, 8)
    session.reply("My fellow citizens,", going_on)
    session.reply("we must", going_on)
    session.take("/retry", lambda text: session.reply(text, going_on))
    for request in asked[:]:
        ids, expected = [*request.ids], []
        for _ in request.generation.token_ids:
            row = model.logits(ids)[-1].astype(np.float64)
            seen = np.unique(ids)
            row[seen] = np.where(row[seen] > 0, row[seen] / 1.5, row[seen] * 1.5)
            expected.append(int(row.argmax()))
            ids.append(expected[-1])
        assert request.generation.token_ids == expected
