"""One chat with one model: texts and slash commands in, replies and notes out. Knows no terminal.

What is typed and how replies are shown belongs to `runtime.commands.terminal` and `runtime.commands.chat`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime import llama
from runtime.commands.conversation import Conversation
from runtime.commands.options import note
from runtime.errors import UserError, os_error
from runtime.generate import Generation, Stats
from runtime.model import Model
from runtime.sampling import Sampling

HELP = """\
/reset        begin anew
/save FILE    write the conversation to a file
/load FILE    continue a saved conversation
/stats        figures of this session and of the last reply
/help         this list
/exit         leave (or Ctrl-D)
A text that begins with a slash: put a space before it."""


@dataclass(frozen=True)
class Reply:
    """A reply as it came, and its figures. stop_reason: None where the user stopped it."""

    text: str
    stats: Stats
    stop_reason: str | None


class Session:
    """A conversation with a model, reply by reply.

    max_tokens: the longest reply, None for no limit. Each reply has its own seed, counted up from `sampling.seed`.
    """

    def __init__(self, model: Model, conversation: Conversation, sampling: Sampling, max_tokens: int | None) -> None:
        self.model, self.conversation, self.max_tokens = model, conversation, max_tokens
        self.sampling = sampling.seeded()
        self.replies: list[Reply] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
            "/help": lambda _: note(HELP),
        }

    def reply(self, text: str, go_on: Callable[[str], bool]) -> Reply:
        """Answer `text`, handing over each piece of the reply as it comes, until `go_on` says no.

        A reply that was cut short belongs to the conversation; a text whose reply never began does not.
        Raises UserError when the conversation does not fit into the context.
        """
        self.conversation.add("user", text)
        generation: Generation | None = None
        try:
            with self._generation() as generation:
                for piece in generation:
                    if not go_on(piece):
                        break
        finally:
            self._keep(generation)
        return self.replies[-1]

    def _keep(self, generation: Generation | None) -> None:
        if generation is None or not (generation.text or generation.stop_reason):
            self.conversation.drop_last()
            return
        self.conversation.add("assistant", generation.text)
        self.replies.append(Reply(generation.text, generation.stats, generation.stop_reason))

    def _generation(self) -> Generation:
        # A template spells the start token itself.
        plain = self.conversation.chat_template is None
        ids = self.model.tokenize(self.conversation.prompt(), add_special=plain)
        if len(ids) >= self.model.n_ctx:
            raise UserError(
                f"the conversation has {len(ids)} tokens, expected fewer than the context of {self.model.n_ctx}; "
                "your last text was not added",
                f"/reset begins anew{self._larger_context()}",
            )
        assert self.sampling.seed is not None
        seed = (self.sampling.seed + len(self.replies)) % llama.DEFAULT_SEED
        return self.model.generate(ids, self.max_tokens, replace(self.sampling, seed=seed), cache_prompt=True)

    def _larger_context(self) -> str:
        limit = self.model.structure.context_length
        return f", or start with a larger --n-ctx (at most {limit})" if self.model.n_ctx < limit else ""

    def context_note(self, reply: Reply) -> str:
        """The line to show when `reply` ended because the context was full, else ""."""
        if reply.stop_reason != "context":
            return ""
        return f"the context of {self.model.n_ctx} tokens is full: /reset begins anew{self._larger_context()}"

    def command(self, line: str) -> bool:
        """Run a slash command; returns False for the one that leaves. Raises UserError for an unknown one."""
        name, _, argument = line.partition(" ")
        if name == "/exit":
            return False
        if name not in self._commands:
            raise UserError(f"unknown command `{name}`", "/help lists them")
        self._commands[name](argument.strip())
        return True

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        note("conversation cleared")

    def _save(self, argument: str) -> None:
        path = _file(argument, "/save FILE")
        self.conversation.save(path)
        note(f"saved {len(self.conversation.messages)} messages to `{path}`")

    def _load(self, argument: str) -> None:
        path = _file(argument, "/load FILE")
        self.conversation.load(path)
        note(f"loaded {len(self.conversation.messages)} messages from `{path}`")

    def _stats(self, _: str) -> None:
        if not self.replies:
            note("no replies yet")
            return
        total, last = self.totals(), self.replies[-1].stats
        note(f"replies             {len(self.replies)}")
        note(f"tokens              {total['tokens']} at {total['tokens_per_s']:.1f} per second")
        note(f"prompt tokens       {total['prompt_tokens']}, {total['cached_tokens']} of them cached")
        note(f"neurons computed    {total['computed_share']:.1%} ({self.model.ffn})")
        note(f"bytes per token     {total['bytes_per_token'] / 1e6:.2f} MB")
        note(f"last reply, layers  {' '.join(f'{share:.1%}' for share in last.layer_shares)}")
        note(
            f"context             {last.prompt_tokens + last.tokens} of {self.model.n_ctx} tokens after the last reply"
        )

    def totals(self) -> dict[str, Any]:
        """Figures of all replies together, as they are printed with --json."""
        stats = [reply.stats for reply in self.replies]
        tokens, seconds = sum(s.tokens for s in stats), sum(s.seconds for s in stats)
        decoded = sum(max(0, s.tokens - 1) for s in stats)  # the first token of a reply belongs to its prompt
        return {
            "tokens": tokens,
            "tokens_per_s": decoded / seconds if seconds else 0.0,
            "computed_share": sum(s.computed_share * s.tokens for s in stats) / max(1, tokens),
            "bytes_per_token": sum(s.bytes_per_token * s.tokens for s in stats) / max(1, tokens),
            "prompt_tokens": sum(s.prompt_tokens for s in stats),
            "cached_tokens": sum(s.cached_tokens for s in stats),
        }

    def result(self) -> dict[str, Any]:
        """The session as one JSON object."""
        return {
            "replies": [reply.text for reply in self.replies],
            "stop_reasons": [reply.stop_reason for reply in self.replies],
            **self.totals(),
            "seed": self.sampling.seed,
            "ffn": self.model.ffn,
            "threads": self.model.threads,
            "n_ctx": self.model.n_ctx,
            "kv_type": self.model.kv_type,
        }


def _file(argument: str, usage: str) -> Path:
    if not argument:
        raise UserError("no file name", f"type {usage}")
    return Path(argument).expanduser()


def attempt(action: Callable[[], object]) -> bool:
    """Run one step of a session; a user's mistake is reported and the session goes on. Returns whether it worked."""
    try:
        action()
    except BrokenPipeError:
        raise  # nobody reads any more
    except OSError as error:
        return _report(os_error(error))
    except UserError as error:
        return _report(error)
    return True


def _report(error: UserError) -> bool:
    note(f"error: {' '.join(error.message.split())}")
    if error.hint:
        note(f"hint: {' '.join(error.hint.split())}")
    return False
