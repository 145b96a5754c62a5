"""`python -m runtime chat`: talk to a model at a terminal, or line by line through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from runtime.base.text_file import check_mark, decoded, without_line_end
from runtime.cli.options import add_json, add_model, add_prompt, given_prompt, typed
from runtime.cli.output import cleaner, note, print_json
from runtime.cli.parser import Parser
from runtime.cli.running import add_loading, add_sampling, open_noted
from runtime.commands.conversation import Conversation
from runtime.commands.session import Session, attempt
from runtime.errors import UserError
from runtime.model import Model
from runtime.options import RunOptions
from runtime.text.sampling import Sampling

PLAIN_MAX_TOKENS = 256  # a model without chat template seldom ends by itself


def configure_parser(parser: Parser) -> None:
    """Options of `chat`."""
    add_model(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    add_prompt(parser, "the first text, answered at once; then the chat goes on")
    parser.add_argument(
        "--no-shift",
        dest="shift",
        action="store_false",
        help="stop when the context is full (default: leave the oldest messages out of the prompt, and say so)",
    )
    add_sampling(parser, f"none, or {PLAIN_MAX_TOKENS} without a chat template")
    add_loading(parser)
    add_json(parser)


def chat(
    model: Path,
    system: str = "",
    prompt: str | None = None,
    prompt_file: Path | None = None,
    shift: bool = True,
    max_tokens: int | None = None,
    sampling: Sampling | None = None,
    run: RunOptions | None = None,
    as_json: bool = False,
) -> None:
    """Talk to a model; with no terminal, each line of stdin is a prompt and stdout gets the replies."""
    first, system = given_prompt(prompt, prompt_file), typed(system, "--system")
    if first is not None and not first.strip():
        raise UserError("the prompt is blank", "give some text, or leave --prompt and --prompt-file out")
    with open_noted(model, run or RunOptions()) as loaded:
        session = _session(loaded, system, max_tokens, sampling or Sampling(), shift)
        worked = _converse(session, first)
        if as_json:
            print_json(session.result())
    if not worked:
        raise SystemExit(1)


def _session(model: Model, system: str, max_tokens: int | None, sampling: Sampling, shift: bool) -> Session:
    if model.chat_template is None:
        max_tokens = max_tokens or PLAIN_MAX_TOKENS
        note(
            "this file has no chat template: your text is continued as running text,"
            f" up to {max_tokens} tokens at a time (-n N changes that)"
        )
    return Session(model, Conversation(model.chat_template, model.special_tokens, system), sampling, max_tokens, shift)


def _converse(session: Session, first: str | None) -> bool:
    if sys.stdin.isatty() and sys.stdout.isatty():
        from runtime.commands.terminal import Terminal  # noqa: PLC0415  (slow to import, and needless in a pipe)

        Terminal(session).run(first)
        return True
    return answer_lines(session, sys.stdin.buffer, first)


def answer_lines(session: Session, lines: Iterable[bytes], first: str | None = None) -> bool:
    """Answer `first` and each line that is not blank on stdout; returns whether all of them could be answered."""
    worked = first is None or attempt(lambda: _answer(session, first))
    running, begins = True, True

    def take(raw: bytes) -> None:
        nonlocal running
        line = without_line_end(decoded(raw, "stdin", begins))
        running = session.take(line, lambda text: _answer(session, text))

    for raw in lines:
        if begins:
            check_mark(raw, "stdin")  # cut at bytes that are no ends of lines, the rest is no text either
        worked &= attempt(lambda raw=raw: take(raw))  # type: ignore[misc]
        begins = False
        if not running:
            break
    return worked


def _answer(session: Session, text: str) -> None:
    clean = cleaner(sys.stdout)

    def show(piece: str) -> bool:
        sys.stdout.write(clean(piece))
        sys.stdout.flush()
        return True

    reply = session.reply(text, show)
    if not reply.text.endswith("\n"):
        show("\n")
    for line in session.context_notes(reply):
        note(line)
