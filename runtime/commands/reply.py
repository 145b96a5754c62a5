"""One reply of a chat, over as many generations as it takes: where the context fills up, old messages make room and it
goes on.
"""

from __future__ import annotations

import codecs
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

from runtime.bindings import llama
from runtime.commands.conversation import Conversation
from runtime.errors import UserError
from runtime.generation import Generation, Stats
from runtime.model import Model
from runtime.text.sampling import Sampling

_ROOM = 4  # a prompt that had to be shortened leaves this fraction of the context to the reply


@dataclass(frozen=True)
class Dropped:
    """What was left out of the prompt because it no longer fitted."""

    messages: int = 0
    tokens: int = 0

    def __add__(self, other: Dropped) -> Dropped:
        return Dropped(self.messages + other.messages, self.tokens + other.tokens)


@dataclass(frozen=True)
class Reply:
    """A reply as it came, and its figures. stop_reason: None where the user stopped it.

    generations: how many it took. positions: tokens in the context at its end. dropped: what made room for it
    meanwhile.
    """

    text: str
    stats: Stats
    stop_reason: str | None
    generations: int
    positions: int
    dropped: Dropped


class Draft:
    """A reply while it is made: iterate over `pieces`, then take `reply`.

    conversation: ends with the text to answer. max_tokens: the longest reply, None for no limit; seed: of the first
    generation.
    shift: whether old messages may be left out of the prompt. dropped_before: those that the reply begins without.
    Raises UserError when the conversation does not fit into the context.
    """

    def __init__(
        self,
        model: Model,
        conversation: Conversation,
        sampling: Sampling,
        max_tokens: int | None,
        seed: int,
        shift: bool,
    ) -> None:
        self._model, self._conversation, self._sampling = model, conversation, sampling
        self._max_tokens, self._seed, self._shift = max_tokens, seed, shift
        self._generations: list[Generation] = []
        self._text, self._dropped = "", Dropped()
        self._prompt, before = self._ids(), conversation.dropped
        self.dropped_before = self._make_room()
        if len(self._prompt) >= model.n_ctx:
            conversation.dropped = before
            raise self._too_long()

    def pieces(self) -> Generator[str, None, None]:
        """The reply as it comes; whole characters, also where a generation ended within one."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while True:
            with self._generate() as generation:
                self._generations.append(generation)
                known = 0
                for _ in generation:
                    new, known = generation.token_ids[known:], len(generation.token_ids)
                    yield from self._shown(decoder.decode(b"".join(map(self._model.tokenizer.token_bytes, new))))
            if not self._goes_on(generation):
                break
        yield from self._shown(decoder.decode(b"", final=True))

    @property
    def reply(self) -> Reply | None:
        """The reply as far as it came; None where it never began."""
        if not self._generations or not (self._text or self._generations[-1].stop_reason):
            return None
        return Reply(
            self._text,
            sum((generation.stats for generation in self._generations), Stats()),
            self._stop_reason(),
            len(self._generations),
            len(self._prompt) + len(self._token_ids()),
            self._dropped,
        )

    def _generate(self) -> Generation:
        """The first generation, or one that goes on with the reply."""
        ids = self._token_ids()
        left = None if self._max_tokens is None else self._max_tokens - len(ids)
        # Its own seed, or a reply could repeat its random choices.
        seed = (self._seed + len(self._generations)) % llama.DEFAULT_SEED
        return self._model.generate([*self._prompt, *ids], left, replace(self._sampling, seed=seed), cache_prompt=True)

    def _goes_on(self, generation: Generation) -> bool:
        if generation.stop_reason != "context" or self._stop_reason() == "length":
            return False
        self._dropped += self._make_room()
        return len(self._prompt) + len(self._token_ids()) < self._model.n_ctx

    def _stop_reason(self) -> str | None:
        if self._max_tokens is not None and len(self._token_ids()) >= self._max_tokens:
            return "length"  # the context may be full at the same time
        return self._generations[-1].stop_reason

    def _make_room(self) -> Dropped:
        """Leave old messages out of the prompt if it and the reply so far do not fit, until there is room to go on."""
        before, n_before, done = self._conversation.dropped, len(self._prompt), len(self._token_ids())
        n_ctx = self._model.n_ctx
        if not self._shift or n_before + done < n_ctx:
            return Dropped()
        left = n_ctx if self._max_tokens is None else self._max_tokens - done
        room = max(1, min(n_ctx // _ROOM, left))
        while len(self._prompt) + done + room > n_ctx and self._conversation.drop_oldest():
            self._prompt = self._ids()
        return Dropped(self._conversation.dropped - before, n_before - len(self._prompt))

    def _ids(self) -> list[int]:
        # A template spells the start token itself.
        plain = self._conversation.chat_template is None
        return self._model.tokenize(self._conversation.prompt(), add_special=plain)

    def _token_ids(self) -> list[int]:
        return [token for generation in self._generations for token in generation.token_ids]

    def _shown(self, piece: str) -> Iterator[str]:
        self._text += piece
        if piece:
            yield piece

    def _too_long(self) -> UserError:
        what, lost = ("your text", "it") if self._shift else ("the conversation", "your last text")
        return UserError(
            f"{what} has {len(self._prompt)} tokens, expected fewer than the context of {self._model.n_ctx}; "
            f"{lost} was not added",
            ("shorten it" if self._shift else "/reset begins anew") + larger_context(self._model),
        )


def larger_context(model: Model) -> str:
    """The part of a hint that says how to get a larger context, if the model allows one."""
    limit = model.structure.context_length
    return f", or start with a larger --n-ctx (at most {limit})" if model.n_ctx < limit else ""
