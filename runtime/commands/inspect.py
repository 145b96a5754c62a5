"""`python -m runtime inspect`: what a model file holds, without running it."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from runtime.cli.options import add_json, add_model, print_json
from runtime.compute.traffic import Activity, bytes_per_token
from runtime.errors import printable
from runtime.model_file.reader import GgufFile, TensorInfo
from runtime.model_file.structure import Structure
from runtime.text.tokenizer import Tokenizer

HELP = "show what a model file holds"
_KINDS = (
    "embeddings",
    "attention",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
    "ffn_down_t",
    "neurons",
    "predictor",
    "output",
    "norms",
    "other",
)
_LISTED = 8  # end tokens in the table
_FREQUENCIES = "blk.{}.ffn_neuron_freq"
LITTLE_TO_GAIN = 0.5  # share of the neurons that fire, from which on skipping the others saves less than predicting them and jumping costs


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Options of `inspect`."""
    add_model(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    add_json(parser)


def inspect(model: Path, tensors: bool = False, as_json: bool = False) -> None:
    """Print a model file's structure, tensors, tokenizer, and the bytes that a token reads."""
    with GgufFile(model) as file:
        report = describe(file, tensors)
    if as_json:
        print_json(report)
        return
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for table in _tables(report):
        console.print(table)
        console.print()


def kind_of(name: str) -> str:
    """The group a tensor belongs to, by its name: one of embeddings, attention, ffn_*, output, norms, other."""
    stem = name.split(".")[2 if name.startswith("blk.") else 0]
    if stem.endswith("_norm"):
        return "norms"
    if stem.startswith("attn_"):
        return "attention"
    if stem in _KINDS:
        return stem
    if stem.startswith("ffn_neuron_"):
        return "neurons"
    if stem.startswith("predictor_"):
        return "predictor"
    fixed = {"token_embd": "embeddings", "position_embd": "embeddings", "token_embd_proj": "embeddings"}
    return fixed.get(stem, "output" if stem.startswith("output") else "other")


def describe(file: GgufFile, all_tensors: bool = False) -> dict[str, Any]:
    """What `inspect --json` prints of an open file."""
    structure = file.structure
    sparsity = _sparsity(file, structure)
    report: dict[str, Any] = {
        "path": str(file.path),
        "bytes": file.size,
        "general": {k.removeprefix("general."): v for k, v in file.metadata.items() if k.startswith("general.")},
        "structure": asdict(structure),
        "groups": list(_groups(file.tensors)),
        "tokenizer": _tokenizer(file),
        "sparsity": sparsity,
        "bytes_per_token": _traffic(file, sparsity["layer_shares"]),
    }
    if all_tensors:
        report["tensors"] = [
            {"name": t.name, "type": t.type, "ne": list(t.ne), "offset": t.offset, "bytes": t.nbytes}
            for t in file.tensors.values()
        ]
    return report


def _groups(tensors: Mapping[str, TensorInfo]) -> Iterator[dict[str, Any]]:
    for kind in _KINDS:
        members = [t for name, t in tensors.items() if kind_of(name) == kind]
        if members:
            types = Counter(t.type for t in members)
            yield {"kind": kind, "tensors": len(members), "types": dict(types), "bytes": sum(t.nbytes for t in members)}


def _tokenizer(file: GgufFile) -> dict[str, Any]:
    with Tokenizer(file.path, file.metadata) as tokenizer:
        special = {
            name: None if token is None else {"id": token, "text": tokenizer.token_text(token)}
            for name, token in (("bos", tokenizer.bos), ("eos", tokenizer.eos))
        }
        return {
            "model": file.metadata.get("tokenizer.ggml.model"),
            "pre": file.metadata.get("tokenizer.ggml.pre"),
            "tokens": tokenizer.n_tokens,
            **special,
            "ends": [{"id": token, "text": tokenizer.token_text(token)} for token in tokenizer.end_ids],
            "add_bos": tokenizer.add_bos,
            "chat_template": "tokenizer.chat_template" in file.metadata,
        }


def _sparsity(file: GgufFile, s: Structure) -> dict[str, Any]:
    """Share of the neurons that fired in each layer on the calibration text, if the file says so."""
    names = [_FREQUENCIES.format(i) for i in range(s.block_count)]
    if not all(name in file.tensors and file.tensors[name].type == "f32" for name in names):
        return {"calibrated": False, "layer_shares": None, "share": None}
    shares = [float(np.clip(file.read(name).view(np.float32).mean(), 0, 1)) for name in names]
    return {"calibrated": True, "layer_shares": shares, "share": float(np.mean(shares))}


def activities(file: GgufFile, shares: list[float] | None) -> dict[str, Activity | None]:
    """Which neurons a token reads: `dense`; `exact` when all, none, or the usual ones fire; `predicted` as measured. None where the file does not say.

    shares: of each layer's neurons, those that fired on the calibration text.
    """
    s, n = file.structure, file.structure.block_count
    predicted, recalls = (_shares(file, f"lazyneuron.predictor.{name}") for name in ("predicted_share", "recall"))
    computed = [share * recall for share, recall in zip(shares or [], recalls, strict=False)]
    return {
        "dense": None if s.layout == "sparse" else Activity.uniform("dense", n, 1.0),
        "exact_all": Activity.uniform("exact", n, 1.0),
        "exact_none": Activity.uniform("exact", n, 0.0),
        "exact_calibrated": Activity("exact", shares, [1.0] * n) if shares else None,
        "predicted_calibrated": Activity("predicted", computed, predicted)
        if len(computed) == len(predicted) == n
        else None,
    }


def _traffic(file: GgufFile, shares: list[float] | None) -> dict[str, float | None]:
    """Bytes of weights that one token reads, by what it reads of the neurons."""
    return {
        name: None if activity is None else bytes_per_token(file.structure, file.tensors, activity).total
        for name, activity in activities(file, shares).items()
    }


def _shares(file: GgufFile, key: str) -> list[float]:
    """An array of shares in the file's metadata, empty where it has none."""
    return [float(value) for value in file.metadata.get(key, ())]


def _tables(report: dict[str, Any]) -> Iterator[Table | Text]:
    general = {name: value for name, value in report["general"].items() if isinstance(value, str | int | float)}
    facts = {"file": report["path"], "size": size_text(report["bytes"]), **general}
    yield _facts("file", facts)
    yield _facts("structure", report["structure"])
    yield _group_table(report["groups"])
    yield _facts("tokenizer", {name: _token(value) for name, value in report["tokenizer"].items()})
    yield _traffic_table(report["bytes_per_token"])
    yield _sparsity_table(report["sparsity"]["layer_shares"])
    share = report["sparsity"]["share"]
    if share is not None and share >= LITTLE_TO_GAIN:
        yield Text(f"little to gain: {share:.0%} of the neurons fire on average, so few can be skipped")
    if "tensors" in report:
        yield _tensor_table(report["tensors"])


def _facts(title: str, facts: Mapping[str, Any]) -> Table:
    table = _table(title, "", "")
    for name, value in facts.items():
        table.add_row(Text(printable(name)), Text(printable(str(value))))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.show_header = any(columns)
    for name in columns:
        table.add_column(name, justify="right" if name in ("tensors", "size", "offset") else "left")
    return table


def _group_table(groups: list[dict[str, Any]]) -> Table:
    table = _table("tensors", "group", "tensors", "size", "types")
    for group in groups:
        types = ", ".join(f"{n} {name}" for name, n in group["types"].items())
        table.add_row(group["kind"], str(group["tensors"]), size_text(group["bytes"]), types)
    table.add_row("all", str(sum(g["tensors"] for g in groups)), size_text(sum(g["bytes"] for g in groups)), "")
    return table


def _token(value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(map(_token, value[:_LISTED])) + (
            f" and {len(value) - _LISTED} more" if len(value) > _LISTED else ""
        )
    return f"{value['id']} {value['text']!r}" if isinstance(value, dict) else value


def _traffic_table(traffic: dict[str, float | None]) -> Table:
    table = _table("weights read per token, without keys and values", "mode", "size", "")
    texts = {
        "dense": "every neuron",
        "exact_all": "exact, if every neuron fired",
        "exact_none": "exact, if none fired",
        "exact_calibrated": "exact, firing as on the calibration text",
        "predicted_calibrated": "predicted, as measured on calibration text that the fit did not see",
    }
    for name, size in traffic.items():
        if size is not None:
            table.add_row(name.partition("_")[0], size_text(size), texts[name])
    return table


def _sparsity_table(shares: list[float] | None) -> Table | Text:
    if shares is None:
        return Text("sparsity: not calibrated (no neuron frequencies in the file)")
    table = _table("neurons that fired on the calibration text", "layer", "share")
    for i, share in enumerate(shares):
        table.add_row(str(i), f"{share:.1%}")
    table.add_row("all", f"{np.mean(shares):.1%}")
    return table


def _tensor_table(tensors: list[dict[str, Any]]) -> Table:
    table = _table("all tensors", "name", "type", "ne", "size", "offset")
    for t in tensors:
        ne = " x ".join(map(str, t["ne"]))
        table.add_row(Text(printable(t["name"])), t["type"], ne, size_text(t["bytes"]), str(t["offset"]))
    return table


def size_text(n: float) -> str:
    """Bytes for people, e.g. 17.62 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n:.0f} B"
