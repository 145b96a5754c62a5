"""Makes the synthetic models that benchmarks run on: random weights at true scale, with neurons that fire at a wanted
rate.

    python -m bench.make_model --shape mistral-7b --active 0.10 --type q4_0 [--layers N] [--out FILE] [--stock FILE]

Goes through the project's own writer, needs little memory, gives the same bytes for the same options, and ends with
what was measured by running the
file: a table, and one JSON object in the last line. Nothing these models write means anything.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import runtime
from bench import stock
from bench.shapes import SHAPES, shape
from bench.synthetic import Synthetic
from bench.tables import console, table
from convert.formats import TYPES, check_type
from convert.metadata import general_metadata
from runtime.base.cache_folder import cache_folder
from runtime.base.processors import default_threads
from runtime.cli.help import HelpParser
from runtime.cli.program import run_command
from runtime.errors import UserError
from runtime.model_file.writer import write_gguf

REVISION = 3  # of what is planted; part of the cached files' names
ACTIVE_KEY = "lazyneuron.synthetic.active"  # the wanted share; a file that has it is synthetic
_MEASURED_TOKENS = 48
_BYTE_TOKEN, _CONTROL, _UNKNOWN, _NORMAL = 6, 3, 2, 1  # GGUF's token types


@dataclass(frozen=True)
class Recipe:
    """What determines a bench model, byte for byte.

    active: share of neurons that fire; layers, experts: None for the shape's own number.
    """

    shape: str
    active: float = 0.10
    type: str = "q4_0"
    layers: int | None = None
    seed: int = 0
    experts: int | None = None

    @property
    def name(self) -> str:
        """Its file's name, without suffix."""
        layers = f"-{self.layers}layers" if self.layers else ""
        experts = f"-{self.experts}experts" if self.experts else ""
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"SYNTHETIC-{self.shape}{layers}{experts}-{self.type}-active{self.active:g}{seed}-r{REVISION}"


def write_model(recipe: Recipe, out: Path) -> None:
    """Write the model. Raises UserError for options out of range."""
    model = Synthetic(shape(recipe.shape, recipe.layers, recipe.experts), recipe.active, recipe.type, recipe.seed)
    metadata = {
        **general_metadata(Path(recipe.name), "", recipe.type),
        "general.description": "SYNTHETIC random weights for benchmarks: its text means nothing",
        ACTIVE_KEY: float(recipe.active),
        **model.structure.to_metadata(),
        **tokenizer(model.structure.vocab_size),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(out, metadata, model.streams())


def tokenizer(vocab_size: int) -> dict[str, Any]:
    """A SentencePiece vocabulary of that size with bytes and nothing that merges."""
    special, numbered = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    fillers = [f"\u2581synthetic{i}" for i in range(vocab_size - len(special) - len(numbered))]
    types = [_UNKNOWN, _CONTROL, _CONTROL] + [_BYTE_TOKEN] * 256 + [_NORMAL] * len(fillers)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*special, *numbered, *fillers],
        "tokenizer.ggml.scores": [0.0] * 259 + [-1000.0 - i for i in range(len(fillers))],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
    }


def cached(recipe: Recipe) -> tuple[Path, Path]:
    """The model and its twin for llama.cpp in $LAZYNEURON_CACHE (default ~/.cache/lazyneuron), made where they are not
    there yet.
    """
    cache = cache_folder()
    if cache is None:
        raise UserError("no home folder to keep models in", "set LAZYNEURON_CACHE to a folder")
    folder = cache / "bench"
    out, twin = folder / f"{recipe.name}.gguf", folder / f"{recipe.name}.stock.gguf"
    if not out.exists():
        print(f"making {out}", file=sys.stderr)
        write_model(recipe, out)
    if not twin.exists():
        print(f"making {twin}", file=sys.stderr)
        stock.write(out, twin)
    return out, twin


def random_ids(vocab_size: int, n: int) -> list[int]:
    """Token ids of a text without meaning, always the same ones: with <s> first."""
    return [1, *np.random.default_rng(7).integers(3, vocab_size, n - 1).tolist()]


def measure(path: Path, threads: int, tokens: int = _MEASURED_TOKENS) -> dict[str, Any]:
    """Run the file in `exact` and `predicted` mode: shares of neurons per block that has any, and the predictor's
    recall.
    """
    shares = {}
    for mode in ("exact", "predicted"):
        with runtime.load(path, ffn=mode, threads=threads, n_ctx=max(256, tokens), device="none") as model:
            model.logits(random_ids(model.structure.vocab_size, tokens))
            blocks = model.structure.ffns
            shares[mode] = tuple([each[i] for i in blocks] for each in (model.layer_shares(), model.gate_shares()))
    active, (found, predicted) = shares["exact"][0], shares["predicted"]
    recall = [f / a if a else 1.0 for f, a in zip(found, active, strict=True)]
    return {
        "active": statistics.mean(active),
        "predicted_share": statistics.mean(predicted),
        "recall": sum(found) / sum(active),
        "layers": {"block": list(blocks), "active": active, "predicted_share": predicted, "recall": recall},
    }


def show(recipe: Recipe, result: Mapping[str, Any], out: Console) -> None:
    """Print the table for people."""
    keys = ("active", "predicted_share", "recall")
    blocks = zip(*(result["layers"][key] for key in ("block", *keys)), strict=True)
    rows = [(str(i), *(f"{share:.2%}" for share in block)) for i, *block in blocks]
    mean = ("mean", *(f"{result[key]:.2%}" for key in keys))
    title = f"{recipe.name}: measured over {_MEASURED_TOKENS} tokens, {recipe.active:.1%} wanted"
    out.print(table(title, ("block", "active", "predicted", "recall"), [*rows, mean]))


def add_recipe(parser: argparse.ArgumentParser, required: bool, several: bool = False) -> None:
    """The options that say which model; several: of several types."""
    parser.add_argument("--shape", choices=SHAPES, required=required, help="shape of the synthetic model")
    parser.add_argument("--active", type=float, default=0.10, help="share of neurons that fire (default: 0.10)")
    parser.add_argument(
        "--type",
        nargs="+" if several else None,
        default=["q4_0"] if several else "q4_0",
        help=f"format of the matrices{', or several' if several else ''}: {', '.join(TYPES)} (default: q4_0)",
    )
    parser.add_argument("--layers", type=int, help="number of blocks (default: the shape's own)")
    parser.add_argument(
        "--experts", type=int, metavar="N",
        help="experts of a block: fewer make a smaller file, and a token reads as many bytes of them as before",
    )  # fmt: skip


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe behind parsed options. Raises UserError for an unknown type."""
    return Recipe(args.shape, args.active, check_type(args.type, "--type"), args.layers, experts=args.experts)


def recipes_of(args: argparse.Namespace) -> list[Recipe]:
    """The recipes of all types behind parsed options. Raises UserError for an unknown type."""
    return [recipe_of(argparse.Namespace(**vars(args) | {"type": kind})) for kind in args.type]


def main() -> None:
    parser = HelpParser(prog="python -m bench.make_model", description="Make a synthetic model.")
    add_recipe(parser, required=True)
    parser.add_argument("--out", type=Path, help="where to (default: $LAZYNEURON_CACHE/bench)")
    parser.add_argument("--stock", type=Path, help="where the twin for llama.cpp goes (default: none with --out)")
    parser.add_argument("--threads", type=int, default=default_threads(), help="threads of the measurement")
    args = parser.parse_args()
    recipe, start = recipe_of(args), time.perf_counter()
    if args.out is None and args.stock is not None:
        raise UserError("--stock needs --out", "without both, the files go to the cache")
    if args.out is None:
        out, twin = cached(recipe)
    else:
        out, twin = args.out, args.stock
        write_model(recipe, out)
        if twin:
            stock.write(out, twin)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {"model": str(out), "stock": twin and str(twin), "seconds": seconds, "peak_bytes": peak}
    result |= {"bytes": out.stat().st_size, "active_wanted": recipe.active, **measure(out, args.threads)}
    show(recipe, result, console())
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_command(main))
