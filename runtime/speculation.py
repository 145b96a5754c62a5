"""Logits of tokens before they are asked for: some are drafted cheaply, and one batch then checks them all.

What a token's logits are does not depend on its batch (runtime/compute/products.py), and whoever asks chooses each
token from the same logits, with the same random numbers, as without drafts. So the text is the same, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtime.compute.counters import Counters
from runtime.compute.traffic import Activity, bytes_per_token, union
from runtime.draft_length import DraftLength
from runtime.lookup import Lookup
from runtime.model_file.frequencies import frequencies
from runtime.model_file.reader import GgufFile
from runtime.options import SettledOptions
from runtime.sequence import CachedSequence

Floats = npt.NDArray[np.float32]


class Guesser(Protocol):
    """Chooses drafted tokens by their logits, as the tokens themselves will be chosen."""

    def sample(self, logits: Floats) -> int:
        """A token, by logits [n_vocab]."""
        ...


Guessing = Callable[[], AbstractContextManager[Guesser]]


@dataclass
class Drafted:
    """What was computed in one generation. ffn: how tokens are decided. drafted, accepted: tokens. steps: of drafted
    tokens, by the bias of the predictors. batches: by their number of tokens, how many there were, and what they did.
    """

    file: GgufFile
    ffn: str
    drafted: int = 0
    accepted: int = 0
    steps: dict[float, Counters] = field(default_factory=dict)
    batches: dict[int, tuple[int, Counters]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Every eighth tells enough.
        self.usual = {i: frequencies(self.file, i)[::8] for i in self.file.structure.ffns}

    def add_to(self, counters: Counters) -> None:
        """Add what the batches did to other counters; drafts are not among them."""
        for _, counted in self.batches.values():
            counters.add(dict(enumerate(counted.layers)))

    def bytes_read(self, kv: float) -> float:
        """What all of it has read, drafts included; kv: of keys and values, for a token.

        Of a batch's rows only their number for each token is known: how many tokens have in common is estimated.
        """
        file, usual, total = self.file, self.usual, 0.0
        s = file.structure
        for n, (number, counters) in self.batches.items():
            shares = counters.layer_shares(), counters.gate_shares()
            fired, gates = (
                [union(usual[i], x, n) if i in usual else 0.0 for i, x in enumerate(part)] for part in shares
            )
            total += number * bytes_per_token(s, file.tensors, Activity(self.ffn, fired, gates), kv).total
        for counters in self.steps.values():
            activity = Activity("predicted", counters.layer_shares(), counters.gate_shares())
            number = max(layer.seen for layer in counters.layers)
            total += number * bytes_per_token(s, file.tensors, activity, kv).total
        return total


@dataclass
class _Ahead:
    """A batch that was computed: the ids before it, its drafts, and the logits after each token."""

    start: int
    ids: list[int]
    logits: Floats
    arm: object
    drafted: int


class Speculation:
    """The logits after each token of a sequence that grows token by token.

    guessing: opens a `Guesser` in the state that the next token will be chosen in.
    """

    def __init__(self, sequence: CachedSequence, file: GgufFile, guessing: Guessing) -> None:
        self._sequence, self._guessing = sequence, guessing
        self._engine, options = sequence.engine, sequence.engine.options
        self._drafting = drafting_runs(options)
        self._lookup = Lookup() if options.lookup else None
        arms = [*(["lookup"] if self._lookup else []), *self._drafting]
        self._lengths = sequence.draft_length = sequence.draft_length or DraftLength(arms, options.draft_max)
        self._ahead: _Ahead | None = None
        self.did = Drafted(file, options.deciding.ffn)

    def logits(self, ids: Sequence[int], at_most: int) -> Floats:
        """Logits after the last of `ids`, float32 [1, n_vocab]. at_most: so many tokens more are wanted after the next
        one.
        """
        found = self._known(ids)
        return self._computed(ids, at_most) if found is None else found

    def _known(self, ids: Sequence[int]) -> Floats | None:
        """The logits after `ids`, where the last batch has them."""
        ahead = self._ahead
        if ahead is None:
            return None
        at = len(ids) - ahead.start
        if at < len(ahead.ids) and ahead.ids[at] == ids[-1]:
            self.did.accepted += 1
            return ahead.logits[at : at + 1]
        self._judge(ahead, at - 1)
        self._ahead = None
        return None

    def _judge(self, ahead: _Ahead, accepted: int) -> None:
        if ahead.drafted:
            self._lengths.arms[ahead.arm].judge(ahead.drafted, min(accepted, ahead.drafted))

    def _computed(self, ids: Sequence[int], at_most: int) -> Floats:
        if not self._engine.cells.can_trim:
            self._sequence.catch_up(ids)
        arm, drafts = self._drafts(ids, max(0, min(at_most, self._engine.options.n_ctx - len(ids))))
        started, n = time.perf_counter(), 1 + len(drafts)
        number, counters = self.did.batches.get(n) or (0, Counters(self._engine.structure, self.did.ffn))
        logits = self._sequence.logits([*ids, *drafts], last=n, counters=counters)
        self._timed(None, n, lambda seconds: self._lengths.batches.add(n, seconds), time.perf_counter() - started)
        self.did.batches[n] = number + 1, counters
        self._ahead = _Ahead(len(ids), [ids[-1], *drafts], logits, arm, len(drafts))
        return logits[:1]

    # --- drafts ------------------------------------------------------------------------------------------------------

    def _drafts(self, ids: Sequence[int], at_most: int) -> tuple[object, list[int]]:
        """Drafted tokens, and the arm that they come from."""
        found = self._lookup.drafts(ids, at_most) if self._lookup else []
        usable = ["lookup"] if found else list(self._drafting)
        arm, n = self._lengths.choose(at_most, usable)
        if not n:
            return None, []
        if arm == "lookup":
            drafts = found[:n]
            self._lengths.arms[arm].seconds.append(0.0)
        else:
            assert isinstance(arm, float)
            drafts = self._predicted(ids, n, arm)
        self.did.drafted += len(drafts)
        return arm, drafts

    def _predicted(self, ids: Sequence[int], n: int, bias: float) -> list[int]:
        """n tokens that the neurons chosen by predictors lead to."""
        engine, run = self._engine, self._drafting[bias]
        counters = self.did.steps.setdefault(bias, Counters(engine.structure, run.ffn))
        started = time.perf_counter()
        with self._guessing() as guesser:
            drafts = self._sequence.drafts(ids, n, run, guesser.sample, counters)
        seconds = (time.perf_counter() - started) / n
        self._timed(bias, 1, self._lengths.arms[bias].seconds.append, seconds)
        return drafts

    def _timed(self, kind: Hashable, n: int, add: Callable[[float], None], seconds: float) -> None:
        """Keep a time, but for the first one of a graph, which has to be built."""
        if not self._lengths.is_new(kind, n, self._engine.cells.n_kv):
            add(seconds)


def drafting_runs(options: SettledOptions) -> dict[float, SettledOptions]:
    """How drafts are computed, by the bias of their predictors: none where they are not."""
    if options.ffn != "verified":
        return {}
    biases = DRAFT_BIASES if options.draft_bias is None else (options.draft_bias,)
    return {bias: options.as_mode("predicted", bias) for bias in biases}


DRAFT_BIASES = (0.0, -0.5, -1.0)  # to choose among, in units of the predictors' typical error
