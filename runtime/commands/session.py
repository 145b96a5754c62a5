"""One chat with one model: texts and slash commands in, replies and notes out.

What is typed and how replies are shown belongs to `runtime.commands.terminal` and `runtime.commands.chat`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from runtime.analysis.experts import busiest_share
from runtime.base.atomic import new_path
from runtime.base.figures import duration, number, part, share, size
from runtime.base.home import expanded
from runtime.cli.output import note
from runtime.cli.parser import did_you_mean
from runtime.cli.standard_streams import StdoutError
from runtime.commands.conversation import Conversation
from runtime.commands.footer import paged_figures, print_layers
from runtime.commands.reply import Draft, Dropped, Reply, larger_context
from runtime.errors import UserError, os_error, printable
from runtime.generation import Stats
from runtime.model import Model
from runtime.text.sampling import Sampling

COMMANDS = {
    "/retry": "another reply to your last text",
    "/undo": "take back your last text and its reply",
    "/reset": "begin anew",
    "/save FILE": "write the whole conversation to a file",
    "/load FILE": "continue a saved conversation",
    "/stats": "figures of this session, and a chart of the last reply's layers",
    "/help": "this list",
    "/exit": "leave (or Ctrl-D)",
}
HELP = "\n".join(
    [
        *(f"{usage:<14}{text}" for usage, text in COMMANDS.items()),
        "A text that begins with a slash: put a space before it.",
    ]
)


class Session:
    """A conversation with a model, reply by reply.

    max_tokens: the longest reply, None for no limit. Each reply has its own seed, counted up from `sampling.seed`.
    shift: where the conversation outgrows the context, leave its oldest messages out of the prompt and say so; else
    stop.
    """

    def __init__(
        self,
        model: Model,
        conversation: Conversation,
        sampling: Sampling,
        max_tokens: int | None,
        shift: bool = True,
    ) -> None:
        self.model, self.conversation, self.max_tokens, self.shift = model, conversation, max_tokens, shift
        self.sampling = sampling.seeded()
        self.replies: list[Reply] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/undo": self._undo,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
            "/help": lambda _: note(HELP),
        }

    def take(self, text: str, answer: Callable[[str], object]) -> bool:
        """Run a slash command, or let `answer` reply to a text; returns False for the command that leaves.

        Raises UserError for an unknown command, and what `answer` raises.
        """
        command = text.strip()
        if command == "/exit":
            return False
        if command == "/retry":
            self._retry(answer)
        elif text.startswith("/"):
            self.command(command)
        elif command:
            answer(text)
        return True

    def reply(self, text: str, go_on: Callable[[str], bool]) -> Reply:
        """Answer `text`, handing over each piece of the reply as it comes, until `go_on` says no.

        A reply that was cut short belongs to the conversation; a text whose reply never began does not.
        Raises UserError when the conversation does not fit into the context.
        """
        self.conversation.add("user", text)
        draft: Draft | None = None
        try:
            draft = self._draft()
            with closing(draft.pieces()) as pieces:
                for piece in pieces:
                    if not go_on(piece):
                        break
        finally:
            self._keep(draft.reply if draft else None)
        return self.replies[-1]

    def _draft(self) -> Draft:
        assert self.sampling.seed is not None
        seed = self.sampling.seed + sum(reply.generations for reply in self.replies)
        draft = Draft(self.model, self.conversation, self.sampling, self.max_tokens, seed, self.shift)
        if draft.dropped_before.messages:
            note(self._dropped_note(draft.dropped_before))
        return draft

    def _keep(self, reply: Reply | None) -> None:
        if reply is None:
            self.conversation.drop_last()
            return
        self.conversation.add("assistant", reply.text)
        self.replies.append(reply)

    def context_notes(self, reply: Reply) -> list[str]:
        """The lines to show after `reply`: what was dropped to make room for it, and whether the context ended it."""
        notes = [self._dropped_note(reply.dropped)] if reply.dropped.messages else []
        if reply.stop_reason == "context":
            notes.append(
                f"the context of {self.model.n_ctx} tokens is full: /reset begins anew{larger_context(self.model)}"
            )
        return notes

    def _dropped_note(self, dropped: Dropped) -> str:
        which = "oldest message" if dropped.messages == 1 else f"{dropped.messages} oldest messages"
        return f"dropped the {which} ({dropped.tokens} tokens) to fit the context of {self.model.n_ctx} tokens"

    def command(self, line: str) -> None:
        """Run a slash command that neither leaves nor answers. Raises UserError for an unknown one."""
        name, _, argument = line.partition(" ")
        if name not in self._commands:
            raise UserError(
                f"unknown command `{name}`",
                f"{did_you_mean(name, (usage.split()[0] for usage in COMMANDS))}/help lists them",
            )
        self._commands[name](argument.strip())

    def _retry(self, answer: Callable[[str], object]) -> None:
        messages, n_replies = self.conversation.messages[:], len(self.replies)
        text = self.conversation.undo()
        try:
            answer(text)
        finally:
            if len(self.replies) == n_replies:  # no other reply came: the last one stays
                self.conversation.messages = messages

    def _undo(self, _: str) -> None:
        first, *others = printable(self.conversation.undo()).strip().splitlines() or [""]
        note(f"took back: {first}{' ...' if others else ''}")

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        note("conversation cleared")

    def _save(self, argument: str) -> None:
        path = new_path(_file(argument, "/save FILE"), "chat.json")
        self.conversation.save(path)
        note(f"saved {len(self.conversation.messages)} messages to `{path}`")

    def _load(self, argument: str) -> None:
        path = Path(_file(argument, "/load FILE"))
        self.conversation.load(path)
        note(f"loaded {len(self.conversation.messages)} messages from `{path}`")

    def _stats(self, _: str) -> None:
        if not self.replies:
            note("no replies yet")
            return
        total, last = self.totals(), self.replies[-1]
        dropped = f", without the {self.conversation.dropped} oldest messages" if self.conversation.dropped else ""
        note(f"replies             {len(self.replies)}")
        note(f"tokens              {total['tokens']} at {number(total['tokens_per_s'])} per second")
        note(f"prompt tokens       {total['prompt_tokens']}, {total['cached_tokens']} of them cached")
        note(f"neurons computed    {share(total['computed_share'])} ({self.model.ffn})")
        note(f"bytes per token     {size(total['bytes_per_token'])}")
        if busiest := busiest_share(self.model.expert_shares()):
            note(f"experts             the busiest quarter took {share(busiest)} of all choices")
        if total["drafted_tokens"]:
            note(f"drafts              {total['drafted_tokens']}, {total['accepted_tokens']} of them right")
        if paged := self.model.stats().paged:
            note(f"from the disk       {size(paged.read)} in {paged.reads:,} reads and {duration(paged.seconds)}")
            held, missed = size(paged.resident), share(part(paged.read, paged.wanted))
            note(f"neurons in memory   {held} of {size(paged.limit)}; {missed} of what was wanted was not")
        note(f"context             {last.positions} of {self.model.n_ctx} tokens after the last reply{dropped}")
        print_layers("last reply, neurons computed by layer", last.stats.layer_shares)

    def totals(self) -> dict[str, Any]:
        """Figures of all replies together, as they are printed with --json."""
        total = sum((reply.stats for reply in self.replies), Stats())
        return {
            "tokens": total.tokens,
            "tokens_per_s": total.tokens_per_s,
            "computed_share": total.computed_share,
            "bytes_per_token": total.bytes_per_token,
            "drafted_tokens": total.drafted_tokens,
            "accepted_tokens": total.accepted_tokens,
            "prompt_tokens": total.prompt_tokens,
            "cached_tokens": total.cached_tokens,
            "expert_shares": self.model.expert_shares(),
        }

    def result(self) -> dict[str, Any]:
        """The session as one JSON object."""
        return {
            "replies": [reply.text for reply in self.replies],
            "stop_reasons": [reply.stop_reason for reply in self.replies],
            "dropped_messages": self.conversation.dropped,
            **self.totals(),
            "seed": self.sampling.seed,
            "ffn": self.model.ffn,
            "threads": self.model.threads,
            "n_ctx": self.model.n_ctx,
            "kv_type": self.model.kv_type,
            "paged": paged_figures(self.model),
        }


def _file(argument: str, usage: str) -> str:
    if not argument:
        raise UserError("no file name", f"type {usage}")
    return os.fspath(expanded(argument))


def attempt(action: Callable[[], object]) -> bool:
    """Run one step of a session; a user's mistake is reported and the session goes on. Returns whether it worked."""
    try:
        action()
    except StdoutError:
        raise  # nobody reads any more, or can
    except OSError as error:
        return _report(os_error(error))
    except UserError as error:
        return _report(error)
    return True


def _report(error: UserError) -> bool:
    note(f"error: {error.message}")
    if error.hint:
        note(f"hint: {error.hint}")
    return False
