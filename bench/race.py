"""A race: contenders take turns on one machine in one run, and what came of it is kept as numbers. Prints nothing."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import stock
from bench.contender_process import BANDWIDTH, ContenderProcess
from bench.contenders import LLAMA_CPP, Spec
from bench.machine import busy, describe
from bench.make_model import ACTIVE_KEY, random_ids
from bench.resident_memory import read_through
from runtime.compute.traffic import Activity, bytes_per_token, kv_bytes
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile, TensorInfo
from runtime.model_file.structure import Structure
from runtime.text.tokenizer import Tokenizer

PROMPT = 16  # tokens in the context before decoding starts
PROMPTS = (32, 128, 512)  # lengths of the prompts that are timed
N_CTX = 1024
BUSY_S = 3.0  # seconds of decoding beside busy programs in a turn: a process that slept before goes first for a while
_BUSY = 0.7  # load average above which others take part
_KV_ELEMENT = 2  # bytes; F16, as in every contender
_TEXT = Path(__file__).parent.parent / "examples/heldout.txt"
_UNUSED = {  # tensors that no token touches in a mode
    LLAMA_CPP: (".ffn_down_t.", ".predictor_", ".ffn_neuron_"),
    "dense": (".ffn_down_t.", ".predictor_", ".ffn_neuron_"),
    "exact": (".ffn_down.weight", ".predictor_", ".ffn_neuron_"),
    "predicted": (".ffn_down.weight", ".ffn_neuron_"),
}


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

    @property
    def modes(self) -> list[str]:
        """Our modes that this file allows."""
        return ["dense", "exact", *(["predicted"] if any(self.structure.predictor_rank) else [])]


@dataclass
class RaceEntry:
    """One contender's results so far."""

    worker: ContenderProcess
    path: Path
    speeds: list[float] = field(default_factory=list)  # tokens per second
    busy: list[float] = field(default_factory=list)  # the same beside busy programs
    loads: list[dict[str, float]] = field(default_factory=list)
    prompts: dict[int, list[float]] = field(default_factory=dict)  # tokens per second, by length
    activity: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    def turn(self) -> ContenderProcess:
        """The worker, with its file in the page cache: some systems drop what lay idle while the others had their
        turns.
        """
        read_through(self.path)
        return self.worker


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


def race(
    setup: RaceSetup, tokens: int, rounds: int, prompts: bool, say: Callable[[str], object], programs: int = 0
) -> dict[str, Any]:
    """Let the contenders take turns, the first round to warm up; returns the figures that are printed as JSON.

    programs: that compute all the time, beside which every contender decodes a second time in each round, if any.
    say: gets a line when something begins, and the speeds of a round when it has ended.
    """
    others = load_average(say)
    with ExitStack() as stack:
        entries = {}
        for kind in (LLAMA_CPP, *setup.modes):
            path = setup.twin if kind == LLAMA_CPP else setup.path
            worker = ContenderProcess(Spec(kind, str(path), setup.threads, setup.n_ctx))
            entries[kind] = RaceEntry(stack.enter_context(worker), path)
        yardstick = stack.enter_context(ContenderProcess(Spec(BANDWIDTH, str(setup.path), setup.threads, setup.n_ctx)))
        say("loading")
        _load(entries, setup, rounds if prompts else 1)
        bandwidths = []
        for i in range(rounds + 1):
            say(f"round {i} of {rounds}" if i else "warming up")
            _decode_round(entries, setup, tokens, counts=i > 0)
            bandwidths.append(yardstick.ask("measure"))
            if i:
                _busy_round(entries, setup, tokens, programs)
                say(_speeds_of_round(entries, programs))
        for entry in entries.values():
            entry.memory = entry.worker.ask("memory")
        for i in range(rounds + 1 if prompts else 0):
            say(f"prompts, round {i} of {rounds}" if i else "prompts, warming up")
            _prompt_round(entries, setup, counts=i > 0)
        for (
            entry
        ) in entries.values():  # what is mapped and allocated now includes prompts; the peak is that of the whole run
            entry.memory |= {"peak_bytes": entry.worker.ask("memory").get("peak_bytes", 0)}
    figures = _figures(entries, setup, bandwidths[1:], tokens, prompts)
    return {**figures, **describe(), "busy_programs": programs, "load_average_before": others}


def _load(entries: dict[str, RaceEntry], setup: RaceSetup, times: int) -> None:
    for _ in range(times):
        for entry in entries.values():
            entry.loads.append(entry.turn().open(setup.ids[:PROMPT]))


def _decode_round(entries: dict[str, RaceEntry], setup: RaceSetup, tokens: int, counts: bool) -> None:
    for entry in entries.values():
        reply = entry.turn().ask("decode", prompt=setup.ids[:PROMPT], ids=setup.ids[PROMPT : PROMPT + tokens])
        if counts:
            entry.speeds.append(reply.pop("tokens") / reply.pop("seconds"))
            entry.activity = reply


def _busy_round(entries: dict[str, RaceEntry], setup: RaceSetup, tokens: int, programs: int) -> None:
    """Every contender beside the same busy programs, again and again until the time is over."""
    ids = setup.ids[PROMPT : PROMPT + tokens]
    for entry in entries.values() if programs else ():
        worker, computed, seconds = entry.turn(), 0, 0.0
        with busy(programs):
            while seconds < BUSY_S:
                reply = worker.ask("decode", prompt=setup.ids[:PROMPT], ids=ids, limit_s=BUSY_S - seconds)
                computed, seconds = computed + reply["tokens"], seconds + reply["seconds"]
        entry.busy.append(computed / seconds)


def _speeds_of_round(entries: dict[str, RaceEntry], programs: int) -> str:
    """A line with what the round that has ended gave: it is all that is left of a run that is cut short."""
    parts = [f"{kind} {e.speeds[-1]:.2f}" + (f" ({e.busy[-1]:.2f})" if e.busy else "") for kind, e in entries.items()]
    beside = f" (beside {programs} busy programs)" if programs else ""
    return f"  tokens/s{beside}: {', '.join(parts)}"


def _prompt_round(entries: dict[str, RaceEntry], setup: RaceSetup, counts: bool) -> None:
    for length in PROMPTS:
        for entry in entries.values():
            if length <= setup.n_ctx:
                seconds = entry.turn().ask("prompt", ids=setup.ids[:length])
                if counts:
                    entry.prompts.setdefault(length, []).append(length / seconds)


def _figures(
    entries: dict[str, RaceEntry], setup: RaceSetup, bandwidths: Sequence[float], tokens: int, prompts: bool
) -> dict[str, Any]:
    bandwidth = statistics.median(bandwidths)
    result: dict[str, Any] = {
        "model": setup.path.name,
        "synthetic": setup.synthetic,
        "threads": setup.threads,
        "tokens": tokens,
        "rounds": len(bandwidths),
        "bandwidth_bytes_per_s": bandwidth,
        "bandwidth_min": min(bandwidths),
        "bandwidth_max": max(bandwidths),
    }
    for kind, entry in entries.items():
        result[kind] = _entry_figures(kind, entry, setup, bandwidth, tokens)
        if not prompts:
            result[kind].pop("prompt")
    base = result[LLAMA_CPP]["tokens_per_s"]
    result["ratios"] = {kind: result[kind]["tokens_per_s"] / base for kind in setup.modes}
    return result


def _entry_figures(kind: str, entry: RaceEntry, setup: RaceSetup, bandwidth: float, tokens: int) -> dict[str, Any]:
    mode = "dense" if kind == LLAMA_CPP else kind
    fired = entry.activity.get("fired") or [1.0] * setup.structure.block_count
    gates = entry.activity.get("gates") or fired
    kv = kv_bytes(setup.structure, PROMPT + (tokens + 1) / 2, _KV_ELEMENT)
    traffic = bytes_per_token(setup.structure, setup.tensors, Activity(mode, fired, gates), kv)
    speed = statistics.median(entry.speeds)
    loads = {key: statistics.median(load[key] for load in entry.loads) for key in ("load_s", "first_token_s")}
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
        "bytes_per_token": traffic.total,
        "bound_tokens_per_s": bandwidth / traffic.total,
        "share_of_bound": speed * traffic.total / bandwidth,
        "active": statistics.mean(fired),
        "gate_rows": statistics.mean(gates),
        **loads,
        "memory": {**entry.memory, "touchable_bytes": _touchable(kind, setup)},
        "prompt": {str(length): statistics.median(speeds) for length, speeds in entry.prompts.items()},
    }


def _touchable(kind: str, setup: RaceSetup) -> float:
    """Bytes of the tensors that some token reads in this mode, and of all keys and values."""
    weights = sum(t.nbytes for name, t in setup.tensors.items() if not any(part in name for part in _UNUSED[kind]))
    return weights + kv_bytes(setup.structure, setup.n_ctx, _KV_ELEMENT)
