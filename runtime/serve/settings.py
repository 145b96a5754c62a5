"""How the server is to behave: one value, from the command line to every endpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from runtime.errors import UserError
from runtime.text.sampling import Sampling

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What the operator settles.

    name: of the model, as clients see it; aliases: other names for it. keys: any of them opens the server, () none is
    asked for. max_tokens: of an answer whose request does not say. sampling: where a request does not say.
    chat_template: in place of the file's. strict_model: refuse the names of other models.
    cors_origins: web pages of these origins may use the server, "*" for all. hosts: names, beside the usual ones, that
    it may be called by, "*" for any. page: serve the chat page.
    ping: seconds of silence before a comment is sent in a stream, 0 for none. max_body: bytes of a request, unpacked;
    body_seconds: for sending it.
    Raises UserError for values out of range.
    """

    name: str = "model"
    aliases: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    chat_template: str | None = None
    strict_model: bool = False
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    page: bool = True
    ping: float = 15.0
    max_body: int = 8 * MIB
    body_seconds: float = 60.0

    def __post_init__(self) -> None:
        if any(not key.strip() or not key.isascii() for key in self.keys):
            raise UserError("an API key is empty or not ASCII, expected letters, digits and signs")
        if not 0 <= self.ping <= 3600:
            raise UserError(f"ping is {self.ping:g} seconds, expected 0 to 3600")

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the model."""
        return (self.name, *self.aliases)
