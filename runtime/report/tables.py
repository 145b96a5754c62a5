"""A page's tables and its texts for people, from its facts: what is there without any script.

Knows no HTML: every cell is plain text, which the page escapes.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.analysis.contents import LITTLE_TO_GAIN
from runtime.analysis.page_facts import POINTS
from runtime.base.figures import memory, number, part, share, size, spread

_CARRY = (1, 5, 10, 20, 50)  # percent of the neurons whose activations the table shows
_DOWN = {"both": "both layouts", "sparse": "sparse layout only", "paged": "beside the neurons' other rows"}
_NOT_SHOWN = ("predictor_rank", "predictor_error")  # of the structure: they stand in the table of predictors
_SHOWN_ELSEWHERE = ("name", "license", "license.name", "base_model.0.name")

_BUDGET_COLUMNS = (
    *("main memory", "of the file", "neurons in memory", "from the disk", "reads", "tokens/s", "takes most"),
)

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """head: names of the columns; rows: cells, the first of each row being its name."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(facts: Facts) -> dict[str, Table]:
    """The tables by name; `neurons`, `experts` and `predictors` are missing where the file says nothing of them."""
    made = {
        "structure": Table(("key", "value"), tuple(_structure(facts))),
        "parts": Table(("part", "tensors", "types", "size", "of the file"), tuple(_parts(facts))),
        "modes": Table(
            ("mode", "FFN and predictor", "attention", "head", "other", "all", "of all neurons"), tuple(_modes(facts))
        ),
        "layers": Table(
            ("layer", "attention, KV", "hot neurons", "of all", "activations", "µs per layer", "waits for"),
            tuple(_layers(facts)),
        ),
        "budgets": Table(
            ("budget", "on the device", "attention of", "neurons", "head", "tokens/s", "takes most"),
            tuple(_budgets(facts)),
        ),
        "bounds": Table(("mode", "bytes per token", "tokens/s, CPU", "tokens/s, device"), tuple(_bounds(facts))),
    }
    if "memory" in facts:
        made["memory"] = Table(_BUDGET_COLUMNS, tuple(_memory(facts)))
    if facts["curves"]:
        columns = ("layer", "fire", "carry 80 %", "fire < 1 %", *(f"hottest {n} %" for n in _CARRY))
        made["neurons"] = Table(columns, tuple(_neurons(facts)))
    if any("experts" in layer for layer in facts["layers"]):
        made["experts"] = Table(("layer", "most chosen", "least chosen", "carry 80 %"), tuple(_experts(facts)))
    if any(layer["rank"] for layer in facts["layers"]):
        columns = ("layer", "predictor", "recall", "precision", "predicted", "fire", "energy kept")
        made["predictors"] = Table(columns, tuple(_predictors(facts)))
    return made


def _structure(facts: Facts) -> Iterator[tuple[str, ...]]:
    for name, value in facts["structure"].items():
        if name not in _NOT_SHOWN:
            yield name, str(value)


def _parts(facts: Facts) -> Iterator[tuple[str, ...]]:
    for group in facts["groups"]:
        yield (
            group["kind"],
            str(group["tensors"]),
            ", ".join(group["types"]),
            size(group["bytes"]),
            share(part(group["bytes"], facts["bytes"])),
        )


def _modes(facts: Facts) -> Iterator[tuple[str, ...]]:
    for mode in facts["modes"]:
        parts = [size(mode["parts"][name]) for name in ("ffn", "attention", "head", "other")]
        yield mode["mode"], *parts, size(mode["bytes"]), share(mode["bytes"] / most_read(facts))


def _neurons(facts: Facts) -> Iterator[tuple[str, ...]]:
    for i, (layer, curve) in enumerate(zip(facts["layers"], facts["curves"], strict=True)):
        shares = [layer["active"], layer["hot"], layer["rare"], *(curve[n * POINTS // 100] for n in _CARRY)]
        yield str(i), *map(share, shares)


def _experts(facts: Facts) -> Iterator[tuple[str, ...]]:
    for i, layer in enumerate(facts["layers"]):
        if use := layer.get("experts"):
            yield str(i), *(share(use[name]) for name in ("most", "least", "hot"))


def _predictors(facts: Facts) -> Iterator[tuple[str, ...]]:
    for i, layer in enumerate(facts["layers"]):
        kind = " ".join((*filter(None, [layer.get("type")]), f"rank {layer['rank']}")) if layer["rank"] else "none"
        shares = [share(layer.get(name)) for name in ("recall", "precision", "predicted_share", "active")]
        yield str(i), kind, *shares, share(layer.get("energy_kept"), 2)


def _layers(facts: Facts) -> Iterator[tuple[str, ...]]:
    """Of the placement that the slider begins with."""
    placement = facts["placement"]
    row = beginning(facts)
    sides = {"d": "device", "c": "CPU"}
    for i, hot in enumerate(row["hot"]):
        attention = "device" if i >= row["resident_from"] else "CPU"
        shares = share(part(hot, placement["neurons"][i])), share(row["activations"][i])
        yield str(i), attention, f"{hot:,}", *shares, number(row["us"][i]), sides[row["waits"][i]]


def _memory(facts: Facts) -> Iterator[tuple[str, ...]]:
    for plan in facts["memory"]["plans"]:
        yield (
            memory(plan["ram_budget"]),
            share(plan["ram_budget"] / facts["bytes"]),
            share(plan["neurons"] / plan["rows"]),
            size(plan["read"]),
            f"{plan['reads']:,.0f}",
            number(plan["tokens_per_s"]),
            plan["limit"],
        )


def _budgets(facts: Facts) -> Iterator[tuple[str, ...]]:
    n = facts["structure"]["block_count"]
    for row in facts["placement"]["budgets"]:
        attention, head = f"{n - row['resident_from']} layers", "device" if row["head_on_device"] else "CPU"
        neurons = share(hot_share(facts, row))
        yield (
            memory(row["budget"]),
            memory(row["bytes"]),
            attention,
            neurons,
            head,
            number(row["tokens_per_s"]),
            row["limit"],
        )


def _bounds(facts: Facts) -> Iterator[tuple[str, ...]]:
    for bound in facts["bounds"]:
        rates = number(bound["cpu_tokens_per_s"]), number(bound["device_tokens_per_s"])
        yield bound["mode"], size(bound["bytes"]), *rates


def title(facts: Facts) -> str:
    """What the model is called: by itself, or its file."""
    return str(facts["general"].get("name") or facts["model"])


def subtitle(facts: Facts) -> list[str]:
    """File, origin, licence and size, in a few words each."""
    general = facts["general"]
    base = general.get("base_model.0.name") or general.get("base_model.0.repo_url")
    licence = general.get("license.name") or general.get("license")
    types: Counter[str] = Counter()
    for group in facts["groups"]:
        if group["kind"].startswith(("attention", "mamba", "ffn")):
            types.update(group["types"])
    return [
        *([facts["model"]] if facts["model"] != title(facts) else []),
        *([f"from {base}"] if base else []),
        f"licence {licence}" if licence else "no licence stated",
        f"{_counted(facts['parameters'])} parameters",
        types.most_common(1)[0][0],
        size(facts["bytes"]),
    ]


def overview(facts: Facts) -> list[tuple[str, str]]:
    """The structure in a few words: names and values."""
    s = facts["structure"]
    shared = f", {spread(s['head_count_kv'])} for KV" if s["head_count_kv"] != s["head_count"] else ""
    return [
        ("layers", str(s["block_count"])),
        ("hidden width", f"{s['embedding_length']:,}"),
        ("neurons per layer", spread(s["feed_forward_length"])),
        ("FFN", f"{'gated' if s['ffn_gate'] == 'gated' else 'ungated'}, {s['ffn_activation']}"),
        ("attention heads", f"{spread(s['head_count'])}{shared}"),
        ("width of a head", str(s["head_length"])),
        ("vocabulary", f"{s['vocab_size']:,} tokens"),
        ("context", f"{s['context_length']:,} tokens"),
        ("norms", f"{s['norm']}, {s['norm_placement']}"),
        ("positions", s["position"]),
        ("output head", "the token embeddings" if s["tied_output"] else "its own"),
        ("down projection", _DOWN[s["layout"]]),
        ("neurons stored", "hottest first" if s["neuron_order"] == "hot" else "as in the checkpoint"),
        ("predictors", s["predictor"]),
        ("checkpoint", s["source_architecture"]),
    ]


def machine(facts: Facts) -> list[tuple[str, str]]:
    """What is planned for: names and values, each with where it is from."""
    found, placement = facts["machine"], facts["placement"]
    return [
        ("device", f"{found['device']['bandwidth'] / 1e9:.4g} GB/s, {found['device']['source']}"),
        ("CPU", f"{found['cpu']['bandwidth'] / 1e9:.4g} GB/s, {found['cpu']['source']}"),
        ("there and back", f"{found['sync']['seconds'] * 1e6:.4g} µs, {found['sync']['source']}"),
        *([("name", found["name"])] if found["device"]["source"] != "assumed" and found["name"] else []),
        ("context", f"{placement['n_ctx']:,} tokens"),
        ("keys and values", placement["kv_type"]),
        ("its buffers", memory(placement["reserve"])),
    ]


def origin(facts: Facts) -> list[tuple[str, str]]:
    """How page and file were made: names and values."""
    calibration = [(f"calibration: {name}", _text(value)) for name, value in facts["calibration"].items()]
    general = [(name, _text(value)) for name, value in facts["general"].items() if name not in _SHOWN_ELSEWHERE]
    return [
        ("page", f"lazyneuron {facts['version']}, python -m runtime report"),
        ("options", facts["machine"]["arguments"]),
        *(calibration or [("calibration", "none")]),
        *general,
    ]


def verdict(facts: Facts) -> dict[str, Any]:
    """What there is to gain, as far as the file says it. ratio: bytes of a token that reads all, over those of the mode
    that reads fewest.
    """
    active, modes = facts["sparsity"]["share"], {mode["mode"]: mode["bytes"] for mode in facts["modes"]}
    return {
        "share": active,
        "little": active is not None and active >= LITTLE_TO_GAIN,
        "all": most_read(facts),
        "none": facts["bytes_per_token"]["exact_none"],
        "modes": {name: modes[name] for name in ("exact", "predicted") if name in modes},
        "ratio": most_read(facts) / min(modes.values(), default=most_read(facts)),
    }


def command(facts: Facts) -> tuple[str, str, list[str]]:
    """What shows the first placement in a terminal: the words before the budget, the budget, and the options after
    it.
    """
    budget = f"{beginning(facts)['budget'] / 2**20:.15g}MiB"
    options = re.split(" (?=--)", facts["machine"]["arguments"])
    return f"python -m runtime plan {shlex.quote(facts['model'])} --vram-budget", budget, options


def beginning(facts: Facts) -> Mapping[str, Any]:
    """The placement that the slider begins with."""
    placement = facts["placement"]
    found: Mapping[str, Any] = placement["budgets"][placement["begin"]]
    return found


def hot_share(facts: Facts, row: Mapping[str, Any]) -> float:
    """The share of all neurons that a placement has on the device."""
    return float(sum(row["hot"]) / sum(facts["placement"]["neurons"]))


def most_read(facts: Facts) -> float:
    """Bytes of weights that a token reads if it reads every neuron."""
    return float(facts["bytes_per_token"]["exact_all"])


def _counted(n: int) -> str:
    for unit, scale in (("billion", 1e9), ("million", 1e6)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n:,}"


def _text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(value)
