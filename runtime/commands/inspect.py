"""`python -m runtime inspect`: what a model file holds, without running it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from runtime.analysis.bytes_read import Sparsity
from runtime.analysis.contents import LITTLE_TO_GAIN, Contents, Group, SpecialToken, contents_of
from runtime.base.figures import share, size
from runtime.cli.options import add_json, add_model
from runtime.cli.output import console, print_json
from runtime.cli.parser import Parser
from runtime.errors import printable
from runtime.model_file.reader import GgufFile, TensorInfo

_LISTED = 8  # end tokens in the table
_MODES = {
    "dense": "every neuron",
    "exact_all": "exact, if every neuron fired",
    "exact_none": "exact, if none fired",
    "exact_calibrated": "exact, firing as on the calibration text",
    "predicted_calibrated": "predicted, as measured on calibration text that the fit did not see",
}


def configure_parser(parser: Parser) -> None:
    """Options of `inspect`."""
    add_model(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    add_json(parser)


def inspect(model: Path, tensors: bool = False, as_json: bool = False) -> None:
    """Print a model file's structure, tensors, tokenizer, and the bytes that a token reads."""
    with GgufFile(model) as file:
        found, listed = contents_of(file), list(file.tensors.values()) if tensors else []
    if as_json:
        print_json(found.as_json() | ({"tensors": [_tensor(t) for t in listed]} if tensors else {}))
        return
    out = console()
    for table in [*_tables(found), *([_tensor_table(listed)] if tensors else [])]:
        out.print(table)
        out.print()


def _tables(found: Contents) -> Iterator[Table | Text]:
    general = {name: value for name, value in found.general.items() if isinstance(value, str | int | float)}
    yield _facts("file", {"file": found.path, "size": size(found.bytes), **general})
    yield _facts("structure", asdict(found.structure))
    yield _group_table(found.groups)
    yield _facts("tokenizer", {name: _token(value) for name, value in vars(found.tokenizer).items()})
    yield _traffic_table(found.bytes_per_token)
    yield _sparsity_table(found.sparsity)
    active = found.sparsity.share
    if active is not None and active >= LITTLE_TO_GAIN:
        yield Text(f"little to gain: {share(active, 0)} of the neurons fire on average, so few can be skipped")


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


def _group_table(groups: Sequence[Group]) -> Table:
    table = _table("tensors", "group", "tensors", "size", "types")
    for group in groups:
        types = ", ".join(f"{n} {name}" for name, n in group.types.items())
        table.add_row(group.kind, str(group.tensors), size(group.bytes), types)
    table.add_row("all", str(sum(g.tensors for g in groups)), size(sum(g.bytes for g in groups)), "")
    return table


def _token(value: Any) -> Any:
    if isinstance(value, list):
        more = f" and {len(value) - _LISTED} more" if len(value) > _LISTED else ""
        return ", ".join(map(_token, value[:_LISTED])) + more
    return f"{value.id} {value.text!r}" if isinstance(value, SpecialToken) else value


def _traffic_table(traffic: Mapping[str, float | None]) -> Table:
    table = _table("weights read per token, without keys and values", "mode", "size", "")
    for name, n in traffic.items():
        if n is not None:
            table.add_row(name.partition("_")[0], size(n), _MODES[name])
    return table


def _sparsity_table(sparsity: Sparsity) -> Table | Text:
    if sparsity.layer_shares is None:
        return Text("sparsity: not calibrated (no neuron frequencies in the file)")
    table = _table("neurons that fired on the calibration text", "layer", "share")
    for i, value in enumerate(sparsity.layer_shares):
        table.add_row(str(i), share(value))
    table.add_row("all", share(sparsity.share))
    return table


def _tensor(t: TensorInfo) -> dict[str, Any]:
    return {"name": t.name, "type": t.type, "ne": list(t.ne), "offset": t.offset, "bytes": t.nbytes}


def _tensor_table(tensors: Iterable[TensorInfo]) -> Table:
    table = _table("all tensors", "name", "type", "ne", "size", "offset")
    for t in tensors:
        ne = " x ".join(map(str, t.ne))
        table.add_row(Text(printable(t.name)), t.type, ne, size(t.nbytes), str(t.offset))
    return table
