"""What passes between HTTP and the engine: plain values, which know of neither."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from runtime.errors import UserError
from runtime.generation import Stats
from runtime.text.grammar import Grammar
from runtime.text.sampling import Sampling


@dataclass(frozen=True)
class Job:
    """What one answer is to be, settled and checked.

    prompt: ids, at least one. max_tokens: None goes on until the context is full. stop: texts that end it.
    top_logprobs: None for no probabilities, 0 for those of the chosen tokens, n for those of the n likeliest, too.
    prompt_logprobs: of the prompt's tokens, too; nothing of the prompt is reused then.
    ignore_eos: go on behind what ends a text. cache_prompt: reuse what is known of the prompt.
    activity: tell with every piece which share of each layer's neurons was computed.
    grammar: what the answer must look like. name: of the request, for logs.
    """

    prompt: tuple[int, ...]
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    ignore_eos: bool = False
    cache_prompt: bool = True
    activity: bool = False
    grammar: Grammar | None = None
    name: str = ""


@dataclass(frozen=True)
class TokenInfo:
    """A token: its bytes, which need not be whole characters, the natural logarithm of its probability by the model's
    logits (nan where none were asked for, and for the first token of a prompt), and the likeliest tokens at its place
    with theirs, likeliest first.
    """

    id: int
    data: bytes
    logprob: float = float("nan")
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Progress:
    """How many of a prompt's `total` tokens are there; of these `cached` were reused."""

    done: int
    total: int
    cached: int


@dataclass(frozen=True)
class PromptTokens:
    """The prompt's tokens with their probabilities, where these were asked for."""

    tokens: tuple[TokenInfo, ...]


@dataclass(frozen=True)
class Piece:
    """Text that follows, and the tokens that came since the last piece.

    text: may be empty, while a character is not complete or what came may become a stop text. layers: share of each
    layer's neurons computed for these tokens, empty where it was not asked for. bytes: read for one of them.
    """

    text: str
    tokens: tuple[TokenInfo, ...]
    layers: tuple[float, ...] = ()
    bytes: float = 0.0


@dataclass(frozen=True)
class End:
    """The answer has ended. reason: "eos", "stop", "length", "context" or "cancelled"; text: all of it; stop: the text
    that ended it, if one did.
    """

    reason: str
    stats: Stats
    seed: int
    text: str
    stop: str | None = None


Event: TypeAlias = Progress | PromptTokens | Piece | End


class FullError(UserError):
    """No more requests may wait. seconds: when to ask again."""

    def __init__(self, waiting: int, seconds: float) -> None:
        super().__init__(f"{waiting} requests are waiting already", "try again later")
        self.seconds = seconds


class UnavailableError(UserError):
    """Requests are not taken, or not finished: the server is loading, ends, or has lost its engine."""


class FailedError(UserError):
    """An answer that ended by a fault of ours."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"the answer failed: {type(error).__name__}", "the server's log says more")


class PromptTooLongError(UserError):
    """A prompt that leaves no room for an answer."""

    def __init__(self, n_prompt: int, n_ctx: int) -> None:
        super().__init__(
            # The words by which clients know this error from others, and shorten their prompt.
            f"the prompt has {n_prompt} tokens, expected fewer: this model's maximum context length is {n_ctx} tokens",
            "shorten the prompt",
        )
        self.n_prompt, self.n_ctx = n_prompt, n_ctx
