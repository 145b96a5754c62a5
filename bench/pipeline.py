"""How fast stages are that are machines of their own: a calculation, from what works take and what a network adds."""

from __future__ import annotations

from dataclasses import dataclass

SEQUENCES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Line:
    """Seconds of a stage's work: `each` for any work, and `token` for each token in it."""

    each: float
    token: float

    def __call__(self, n_tokens: int) -> float:
        """Seconds of a work of so many tokens."""
        return self.each + self.token * n_tokens

    @classmethod
    def through(cls, measured: dict[int, float]) -> Line:
        """The line with the least squares of errors through seconds by number of tokens, without negative parts."""
        n = len(measured)
        x, y = sum(measured) / n, sum(measured.values()) / n
        spread = sum((k - x) ** 2 for k in measured)
        token = sum((k - x) * (v - y) for k, v in measured.items()) / spread if spread else 0.0
        token = min(max(0.0, token), y / x)
        return cls(y - token * x, token)

    def divided(self, parts: int) -> Line:
        """That of a part of the blocks."""
        return Line(self.each / parts, self.token / parts)


@dataclass(frozen=True)
class Network:
    """latency: seconds of a hop whatever it carries; bandwidth: bytes/s."""

    name: str
    latency: float
    bandwidth: float

    def hop(self, nbytes: float) -> float:
        """Seconds until so many bytes are on the next machine."""
        return self.latency + nbytes / self.bandwidth


# Half a round trip of small messages in one building, and nominal rates.
NETWORKS = (Network("1 GbE", 100e-6, 125e6), Network("10 GbE", 30e-6, 1.25e9), Network("100 GbE", 10e-6, 12.5e9))


def round_seconds(work: Line, n_stages: int, n_sequences: int, groups: int, hop: float) -> float:
    """Until each of the sequences has its next token, in groups that follow each other through the stages: the last
    group leaves the last stage after groups + stages - 1 works. hop: of one group; the way back to the sampler is one.
    """
    most = -(-n_sequences // groups)
    return (groups + n_stages - 1) * work(most) + n_stages * hop


def best(work: Line, n_stages: int, n_sequences: int, hop: float) -> tuple[float, int]:
    """Tokens/s of all sequences, and the number of groups that gives most."""
    options = range(1, min(n_sequences, 2 * n_stages) + 1)
    seconds, groups = min((round_seconds(work, n_stages, n_sequences, m, hop), m) for m in options)
    return n_sequences / seconds, groups
