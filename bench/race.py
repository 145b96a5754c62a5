"""A race: contenders take turns on one machine in one run, and what came of it is kept as numbers. Prints nothing.

Only rounds that have ended count. So a race can be cut short at any time, by Ctrl-C or because its time is over, and
has figures from the first round on.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import stock
from bench.contender_process import BANDWIDTH, ContenderProcess
from bench.contenders import LLAMA_CPP, Spec, in_order
from bench.machine import busy
from bench.make_model import ACTIVE_KEY, random_ids
from bench.resident_memory import drop_cached, read_through
from runtime.base.memory_left import memory_left
from runtime.compute.traffic import Activity, bytes_per_token, kv_bytes
from runtime.errors import UserError
from runtime.model_file import tensor_names as names
from runtime.model_file.reader import GgufFile, TensorInfo
from runtime.model_file.structure import Structure
from runtime.options import FFN_MODES, RunOptions
from runtime.text.tokenizer import Tokenizer

PROMPT = 16  # tokens in the context before decoding starts
PROMPTS = (32, 128, 512)  # lengths of the prompts that are timed
N_CTX = 1024
TURN_S = 5.0  # seconds of decoding in a turn, at most
BUSY_S = 3.0  # seconds of decoding beside busy programs in a turn: a process that slept before goes first for a while
MAX_PROGRAMS = 256  # busy ones
INTERRUPTED, OUT_OF_TIME = "interrupted", "out of time"  # why a race was cut short
_BUSY = 0.7  # load average above which others take part
_KV_ELEMENT = 2  # bytes; F16, as in every contender
_OF_DRAFTS = ("drafted_tokens", "accepted_tokens")  # of modes that draft
_TEXT = Path(__file__).parent.parent / "examples/heldout.txt"
_NOTES = names.NEURON_NOTES
_PREDICTORS = (names.weight(names.PREDICTOR_IN), *names.PREDICTOR_ROWS)
_UNUSED = {  # what no token touches in a mode, by its name in a block
    LLAMA_CPP: (*names.TRANSPOSED, *_PREDICTORS, *_NOTES),
    "dense": (*names.TRANSPOSED, *_PREDICTORS, *_NOTES),
    "exact": (*names.NEURON_COLUMNS, *_PREDICTORS, *_NOTES),
}
_UNUSED_OTHERWISE = (*names.NEURON_COLUMNS, *_NOTES)


@dataclass(frozen=True)
class RacePlan:
    """How a race is run. tokens: decoded in a turn, fewer where a turn takes too long. rounds: that count.

    prompts: whether prompts are timed, too. programs: that compute all the time, beside which every contender decodes a
    second time in each round, if any. modes: ours that take part, () for all that the file allows. alone: one model at
    a time is in memory, for those that do not fit beside each other.
    Raises UserError for values out of range.
    """

    tokens: int = 64
    rounds: int = 5
    prompts: bool = False
    programs: int = 0
    modes: tuple[str, ...] = ()
    alone: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.rounds < 1:
            raise UserError("--tokens and --rounds: expected at least 1")
        if not 0 <= self.programs <= MAX_PROGRAMS:
            raise UserError(f"--busy {self.programs}, expected 0 to {MAX_PROGRAMS}")
        if unknown := [mode for mode in self.modes if mode not in FFN_MODES]:
            raise UserError(f"--ffn: `{unknown[0]}`, expected some of {', '.join(FFN_MODES)}")


@dataclass(frozen=True)
class RaceSetup:
    """A model to race on. ids: what all contenders compute, at least as long as the longest prompt."""

    path: Path
    twin: Path
    structure: Structure
    tensors: dict[str, TensorInfo]
    synthetic: bool
    ids: list[int]
    threads: int

    @property
    def n_ctx(self) -> int:
        """Positions of every contender's context."""
        return min(N_CTX, self.structure.context_length)

    def modes(self, wanted: Sequence[str] = ()) -> list[str]:
        """Our modes that this file allows; or the wanted ones: raises UserError for one that it does not allow."""
        with GgufFile(self.path) as file:
            for mode in wanted:
                RunOptions(ffn=mode).for_file(file)
            return in_order(wanted or [mode for mode in FFN_MODES if _allows(file, mode)])


def _allows(file: GgufFile, mode: str) -> bool:
    try:
        RunOptions(ffn=mode).for_file(file)
    except UserError:
        return False
    return True


@dataclass
class RaceEntry:
    """One contender's results of the rounds that have ended."""

    worker: ContenderProcess
    path: Path
    speeds: list[float] = field(default_factory=list)  # tokens per second
    busy: list[float] = field(default_factory=list)  # the same beside busy programs
    loads: list[dict[str, float]] = field(default_factory=list)
    prompts: dict[int, list[float]] = field(default_factory=dict)  # tokens per second, by length
    activity: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)


@contextmanager
def set_up(path: Path, twin: Path | None, threads: int, tokens: int, warm_up: int = 0) -> Iterator[RaceSetup]:
    """The setup for a model; its twin for llama.cpp is made where none is given, and goes away at the end.

    tokens: decoded after the prompt and `warm_up` tokens.
    """
    with ExitStack() as stack:
        with GgufFile(path) as file:
            s, tensors, synthetic = file.structure, dict(file.tensors), ACTIVE_KEY in file.metadata
        before, n_ctx = PROMPT + warm_up, min(N_CTX, s.context_length)
        if before + tokens > n_ctx:
            raise UserError(f"--tokens {tokens}, expected at most {n_ctx - before}")
        if twin is None:
            twin = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "stock.gguf"
            stock.write(path, twin)
        wanted = max(*PROMPTS, before + tokens)
        ids = random_ids(s.vocab_size, wanted) if synthetic else _text_ids(path, wanted)
        yield RaceSetup(path, twin, s, tensors, synthetic, ids, threads)


def _text_ids(path: Path, n: int) -> list[int]:
    """The first `n` ids of a real text, repeated where it is shorter."""
    tokenizer = Tokenizer(path)
    try:
        ids = tokenizer.encode(_TEXT.read_text(encoding="utf-8"))
    finally:
        tokenizer.close()
    return (ids * (n // len(ids) + 1))[:n]


def load_average(say: Callable[[str], object]) -> float:
    """The machine's load before a race; says so where others take part."""
    others = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if others > _BUSY:
        say(f"warning: the machine is busy (load {others:.1f}): these figures will not be worth much")
    return others


def warn_if_crowded(setup: RaceSetup, say: Callable[[str], object]) -> None:
    """Say so where both files and llama.cpp's repacked copy of its own do not fit into memory."""
    if setup.path.stat().st_size + 2 * setup.twin.stat().st_size > memory_left():
        say("warning: these models may not fit into memory together: then rows are read from the disk; try --alone")


def race(setup: RaceSetup, plan: RacePlan, say: Callable[[str], object], ends: float = math.inf) -> dict[str, Any]:
    """Let the contenders take turns, the first round to warm up; returns the figures that are printed as JSON.

    say: gets a line when something begins, and the speeds of a round when it has ended. ends: of `time.monotonic`; no
    round begins that would end later, except for the first that counts.
    An interrupt ends it, too; raises KeyboardInterrupt where no round had ended.
    """
    others = load_average(say)
    if not plan.alone:
        warn_if_crowded(setup, say)
    with ExitStack() as stack:
        runners = _Race(setup, plan, say, stack)
        cut = None
        try:
            cut = runners.run(ends)
        except BaseException as stopped:
            runners.kill()
            if not isinstance(stopped, KeyboardInterrupt) or not runners.bandwidths:
                raise
            cut = INTERRUPTED
    return {**runners.figures(), "cut_short": cut, "load_average_before": others}


def _rounds(n: int, ends: float, first: int = 0) -> Iterator[int]:
    """0, to warm up, and 1 to n; fewer where another one like the last would not end in time. first: of them."""
    for i in range(first, n + 1):
        begin = time.monotonic()
        yield i
        if i and time.monotonic() + (time.monotonic() - begin) > ends:
            return


class _Race:
    """The contenders, the yardstick of bandwidth, and what the rounds that have ended gave."""

    def __init__(self, setup: RaceSetup, plan: RacePlan, say: Callable[[str], object], stack: ExitStack) -> None:
        self.setup, self.plan, self.say = setup, plan, say
        self.entries: dict[str, RaceEntry] = {}
        self.bandwidths: list[float] = []
        for kind in (LLAMA_CPP, *setup.modes(plan.modes)):
            path = setup.twin if kind == LLAMA_CPP else setup.path
            worker = ContenderProcess(Spec(kind, str(path), setup.threads, setup.n_ctx))
            self.entries[kind] = RaceEntry(stack.enter_context(worker), path)
        yardstick = ContenderProcess(Spec(BANDWIDTH, str(setup.path), setup.threads, setup.n_ctx))
        self.yardstick = stack.enter_context(yardstick)

    def kill(self) -> None:
        """End all processes at once, whatever they are doing."""
        for worker in (self.yardstick, *(entry.worker for entry in self.entries.values())):
            worker.kill()

    def run(self, ends: float) -> str | None:
        """Run all rounds, or as many as there is time for; returns why it was cut short, if it was."""
        plan, say, cut = self.plan, self.say, None
        first = int(plan.alone)  # then each turn warms up by itself
        if not plan.alone:
            say("loading")
            self._load(plan.rounds if plan.prompts else 1)
        half = (time.monotonic() + ends) / 2 if plan.prompts else ends
        for i in _rounds(plan.rounds, half, first):
            say(f"round {i} of {plan.rounds}" if i else "warming up")
            self._round(counts=i > 0)
        if len(self.bandwidths) < plan.rounds:
            cut = OUT_OF_TIME
        for i in _rounds(plan.rounds, ends, first) if plan.prompts else ():
            say(f"prompts, round {i} of {plan.rounds}" if i else "prompts, warming up")
            self._prompt_round(counts=i > 0)
        if plan.prompts:
            for entry in self.entries.values():  # the peak is that of the whole run
                entry.memory |= {"peak_bytes": entry.worker.ask("memory").get("peak_bytes", 0)}
            if any(len(speeds) < plan.rounds for entry in self.entries.values() for speeds in entry.prompts.values()):
                cut = OUT_OF_TIME
        return cut

    def _load(self, times: int) -> None:
        for _ in range(times):
            for entry in self.entries.values():
                with self._turn(entry) as worker:
                    entry.loads.append(worker.open(self.setup.ids[:PROMPT]))

    @contextmanager
    def _turn(self, entry: RaceEntry) -> Iterator[ContenderProcess]:
        """The worker, with its file in the page cache: some systems drop what lay idle while the others had their
        turns.

        Where one model at a time is in memory, it is loaded here, and computes its tokens once, as it would have in the
        round before: so the pages that they want are mapped. The other file leaves the page cache before.
        """
        alone = self.plan.alone
        for path in {other.path for other in self.entries.values()} - {entry.path} if alone else ():
            drop_cached(path)
        read_through(entry.path)
        if alone:
            entry.loads.append(entry.worker.open(self.setup.ids[:PROMPT]))
            self._decode(entry.worker, TURN_S)
        yield entry.worker
        if alone:
            entry.worker.ask("close")

    def _decode(self, worker: ContenderProcess, limit_s: float) -> Any:
        return worker.ask("decode", prompt=self.setup.ids[:PROMPT], ids=self._ids, limit_s=limit_s)

    def _round(self, counts: bool) -> None:
        """Every contender once, then the yardstick, then every contender beside busy programs."""
        idle, beside, memory = {}, {}, {}
        for kind, entry in self.entries.items():
            with self._turn(entry) as worker:
                idle[kind] = self._decode(worker, TURN_S if counts else 1.0)
                memory[kind] = worker.ask("memory")
        bandwidth = self.yardstick.ask("measure")
        if not counts:
            return
        for kind, entry in self.entries.items():
            if self.plan.programs:
                beside[kind] = self._beside(entry)
        self.bandwidths.append(bandwidth)
        for kind, entry in self.entries.items():
            reply = idle[kind]
            entry.speeds.append(reply["tokens"] / reply["seconds"])
            entry.busy += [beside[kind]] if kind in beside else []
            entry.activity, entry.memory = reply, memory[kind]
        self.say(self._speeds_of_round())

    @property
    def _ids(self) -> list[int]:
        return self.setup.ids[PROMPT : PROMPT + self.plan.tokens]

    def _beside(self, entry: RaceEntry) -> float:
        """Tokens per second beside the busy programs, decoding again and again until the time is over."""
        computed, seconds = 0, 0.0
        with self._turn(entry) as worker, busy(self.plan.programs):
            while seconds < BUSY_S:
                reply = self._decode(worker, BUSY_S - seconds)
                computed, seconds = computed + reply["tokens"], seconds + reply["seconds"]
        return computed / seconds

    def _speeds_of_round(self) -> str:
        entries = self.entries.items()
        parts = [f"{kind} {e.speeds[-1]:.2f}" + (f" ({e.busy[-1]:.2f})" if e.busy else "") for kind, e in entries]
        programs = self.plan.programs
        beside = f" (beside {programs} busy programs)" if programs else ""
        return f"  tokens/s{beside}: {', '.join(parts)}"

    def _prompt_round(self, counts: bool) -> None:
        found, lengths = {}, [length for length in PROMPTS if length <= self.setup.n_ctx]
        for kind, entry in self.entries.items():
            with self._turn(entry) as worker:
                for length in lengths * (2 if self.plan.alone else 1):  # the last time counts
                    found[kind, length] = length / worker.ask("prompt", ids=self.setup.ids[:length])
        for (kind, length), speed in found.items() if counts else ():
            self.entries[kind].prompts.setdefault(length, []).append(speed)

    def figures(self) -> dict[str, Any]:
        """Medians of the rounds that have ended."""
        setup, bandwidth = self.setup, statistics.median(self.bandwidths)
        result: dict[str, Any] = {
            "model": setup.path.name,
            "synthetic": setup.synthetic,
            "threads": setup.threads,
            "tokens": self.plan.tokens,
            "rounds": len(self.bandwidths),
            "busy_programs": self.plan.programs,
            "alone": self.plan.alone,
            "bandwidth_bytes_per_s": bandwidth,
            "bandwidth_min": min(self.bandwidths),
            "bandwidth_max": max(self.bandwidths),
        }
        result |= {kind: _entry_figures(kind, entry, setup, bandwidth) for kind, entry in self.entries.items()}
        base = result[LLAMA_CPP]["tokens_per_s"]
        ours = [kind for kind in self.entries if kind != LLAMA_CPP]
        return {**result, "ratios": {kind: result[kind]["tokens_per_s"] / base for kind in ours}}


def _entry_figures(kind: str, entry: RaceEntry, setup: RaceSetup, bandwidth: float) -> dict[str, Any]:
    fired = entry.activity.get("fired") or [1.0] * setup.structure.block_count
    gates = entry.activity.get("gates") or fired
    size, speed = _bytes(kind, entry, setup, fired, gates), statistics.median(entry.speeds)
    loads = {key: statistics.median(load[key] for load in entry.loads) for key in ("load_s", "first_token_s")}
    prompts = {str(length): statistics.median(speeds) for length, speeds in entry.prompts.items()}
    beside = {}
    if entry.busy:
        busy_speed = statistics.median(entry.busy)
        beside = {"tokens_per_s": busy_speed, "min": min(entry.busy), "max": max(entry.busy)}
        beside["share_of_idle"] = busy_speed / speed
    return {
        **({"busy": beside} if beside else {}),
        "tokens_per_s": speed,
        "min": min(entry.speeds),
        "max": max(entry.speeds),
        "bytes_per_token": size,
        "bound_tokens_per_s": bandwidth / size,
        "share_of_bound": speed * size / bandwidth,
        "active": statistics.mean(fired[i] for i in setup.structure.ffns),
        "gate_rows": statistics.mean(gates[i] for i in setup.structure.ffns),
        **{key: entry.activity[key] for key in _OF_DRAFTS if key in entry.activity},
        **loads,
        "memory": {**entry.memory, "touchable_bytes": _touchable(kind, setup)},
        **({"prompt": prompts} if prompts else {}),
    }


def _bytes(kind: str, entry: RaceEntry, setup: RaceSetup, fired: list[float], gates: list[float]) -> float:
    """Bytes that one token of the last turn read."""
    if "bytes_per_token" in entry.activity:
        return float(entry.activity["bytes_per_token"])
    mode = "dense" if kind == LLAMA_CPP else kind
    kv = kv_bytes(setup.structure, PROMPT + (entry.activity["tokens"] + 1) / 2, _KV_ELEMENT)
    return bytes_per_token(setup.structure, setup.tensors, Activity(mode, fired, gates), kv).total


def _touchable(kind: str, setup: RaceSetup) -> float:
    """Bytes of the tensors that some token reads in this mode, and of all keys and values."""
    unused = _UNUSED.get(kind, _UNUSED_OTHERWISE)
    weights = sum(t.nbytes for name, t in setup.tensors.items() if (names.parsed(name) or (0, name))[1] not in unused)
    return weights + kv_bytes(setup.structure, setup.n_ctx, _KV_ELEMENT)
