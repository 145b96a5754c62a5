"""What `bench.decode` shows to people: the tables of one model's races, a part for each number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.contenders import LLAMA_CPP, in_order
from bench.race import PROMPTS
from bench.tables import table
from runtime.options import FFN_MODES

Result = Mapping[str, Any]
_MEMORY = ("peak_bytes", "anonymous_bytes", "file_bytes", "touchable_bytes")


def show(races: Sequence[Result], out: Console) -> None:
    """Print the tables."""
    out.print(_decoding(races))
    for result in races:
        if result["cut_short"]:
            out.print(f"{result['threads']} threads: {result['cut_short']} after {result['rounds']} rounds")
    if any("prompt" in result[LLAMA_CPP] for result in races):
        out.print(_prompts([result for result in races if "prompt" in result[LLAMA_CPP]]))
        out.print("In every mode a prompt goes through whole matrices where that is expected to be faster.")
        out.print(_loading(races))
    if races[0]["synthetic"]:
        out.print("SYNTHETIC weights: speed and memory only.")
    out.print("The bound is bandwidth / bytes per token; a model that fits the CPU's caches may exceed it.")


def _decoding(races: Sequence[Result]) -> Table:
    first = races[0]
    title = (
        f"decoding {first['model']}, {first['date']}\n"
        f"{first['cpu']} ({' '.join(first['instruction_sets'])})\n"
        f"kernels: {first['kernels']}, ggml: {' '.join(first['ggml'])}"
    )
    if first["alone"]:
        title += "\none model at a time in memory, loaded anew for each turn"
    programs = first["busy_programs"]
    beside = (f"beside {programs} busy", "of idle") if programs else ()
    columns = ("", "tokens/s", "min - max", "x llama.cpp", "active", "MB/token", "bound", "of bound", *beside)
    return table(title, columns, list(_parts(races, _memory, _speeds)))


def _parts(
    races: Sequence[Result],
    heading: Callable[[Result], str],
    cells: Callable[[Result, str], Sequence[str]],
) -> Iterator[tuple[str, ...]]:
    """A heading for each number of threads, and a row for each contender."""
    for result in races:
        yield (heading(result),)
        for kind in (LLAMA_CPP, *in_order(FFN_MODES)):
            if kind in result:
                yield kind, *cells(result, kind)


def _threads(result: Result) -> str:
    return f"{result['threads']} threads"


def _memory(result: Result) -> str:
    low, mean, high = (
        result[key] / 1e9 for key in ("bandwidth_min", "bandwidth_bytes_per_s", "bandwidth_max")
    )  # fmt: skip
    return f"{_threads(result)}, {mean:.1f} GB/s\n({low:.1f} - {high:.1f})"


def _speeds(result: Result, kind: str) -> Sequence[str]:
    r = result[kind]
    return (
        f"{r['tokens_per_s']:.2f}",
        f"{r['min']:.2f} - {r['max']:.2f}",
        f"{result['ratios'].get(kind, 1.0):.2f}",
        f"{r['active']:.1%}",
        f"{r['bytes_per_token'] / 1e6:.1f}",
        f"{r['bound_tokens_per_s']:.1f}",
        f"{r['share_of_bound']:.0%}",
        *((f"{r['busy']['tokens_per_s']:.2f}", f"{r['busy']['share_of_idle']:.0%}") if "busy" in r else ()),
    )


def _prompts(races: Sequence[Result]) -> Table:
    lengths = [str(n) for n in PROMPTS if str(n) in races[0][LLAMA_CPP]["prompt"]]

    def speeds(result: Result, kind: str) -> Sequence[str]:
        prompts, base = result[kind]["prompt"], result[LLAMA_CPP]["prompt"]
        return [f"{prompts[n]:.1f} ({prompts[n] / base[n]:.2f}x)" for n in lengths]

    columns = ("", *(f"{n} tokens" for n in lengths))
    return table("prompts, tokens/s (x llama.cpp)", columns, list(_parts(races, _threads, speeds)))


def _loading(races: Sequence[Result]) -> Table:
    def cells(result: Result, kind: str) -> Sequence[str]:
        r = result[kind]
        sizes = [f"{r['memory'].get(key, 0) / 1e6:.0f}" for key in _MEMORY]
        return [f"{r['load_s']:.2f}", f"{r['first_token_s']:.2f}", *sizes]

    columns = ("", "load s", "first token s", "peak MB", "anonymous MB", "file MB", "touchable MB")
    title = "loading a mapped, cached file; memory after decoding"
    return table(title, columns, list(_parts(races, _threads, cells)))
