"""The text of a model card, from what a model file says of itself and what was measured.

A figure that is not there is left out, never estimated.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from convert.metadata import HUB
from runtime.analysis.firing import Frequencies, PredictorFigures, layer_firing, predictor_figures
from runtime.analysis.perplexity import Perplexity
from runtime.base.figures import share, spread
from runtime.hub.names import Reference, parse
from runtime.model_file.reader import GgufFile
from runtime.model_file.structure import ARCHITECTURE, Structure

LIBRARY = "lazyneuron"
MARK = (
    "<!-- Written by `python -m convert card`, and again by each `push`. "
    "Remove this line to keep changes of your own. -->"
)
PLOT = "sparsity.png"
_PER_LAYER = ("active", "carry 80 %", "predictor", "predicted", "recall", "precision", "output energy kept")


@dataclass(frozen=True)
class FileEntry:
    """A file as the card lists it."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class TextPerplexity:
    """Perplexities of one text, by FFN mode; the text's file name and sha256.

    limit: how many of its tokens were used, None for all.
    """

    text: str
    sha256: str
    limit: int | None
    modes: Mapping[str, Perplexity]

    def as_json(self) -> dict[str, Any]:
        """The modes as plain values."""
        return {mode: asdict(found) | {"limit": self.limit} for mode, found in self.modes.items()}


@dataclass(frozen=True)
class CardFacts:
    """What a card says. name: how commands call the model; frequencies: per layer, empty where the file has none."""

    name: str
    metadata: Mapping[str, Any]
    structure: Structure
    types: Mapping[str, int]  # bytes of matrices by type, most first
    files: Sequence[FileEntry]
    frequencies: Sequence[Frequencies] = field(repr=False)
    perplexity: TextPerplexity | None = None
    plot: bool = False

    @classmethod
    def of(
        cls, file: GgufFile, name: str, files: Sequence[FileEntry], frequencies: Sequence[Frequencies], **more: Any
    ) -> CardFacts:
        """Facts of an open file."""
        types: Counter[str] = Counter()
        for info in file.tensors.values():
            types.update({info.type: info.nbytes} if len(info.ne) > 1 else {})
        return cls(name, file.metadata, file.structure, dict(types.most_common()), files, frequencies, **more)

    def general(self, key: str) -> str:
        """A `general.*` text of the file, "" where it has none."""
        return " ".join(str(self.metadata.get(f"general.{key}", "")).split())

    @property
    def base(self) -> str:
        """The base model's id on the Hub, "" if unknown."""
        url = self.general("base_model.0.repo_url")
        repo = url.removeprefix(f"{HUB}/")
        return repo if url.startswith(HUB) and parse(repo) == Reference(repo) else ""


def write_card(facts: CardFacts) -> ModelCard:
    """The card; its metadata is well-formed by huggingface_hub's own parser."""
    parts = (_title, _run, _files, _sparsity, _predictors, _perplexity, _origin)
    body = "\n\n".join("\n".join(part(facts)) for part in parts if any(part(facts)))
    return ModelCard(f"---\n{_data(facts).to_yaml()}\n---\n\n{body}\n\n{MARK}\n")


def _data(facts: CardFacts) -> ModelCardData:
    licence, name = facts.general("license").lower(), facts.general("license.name")
    if licence and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        licence, name = "other", re.sub(r"[^a-z0-9.]+", "-", licence).strip("-")  # no word of the Hub's
    languages = facts.metadata.get("general.languages")
    more: dict[str, Any] = {"base_model_relation": "quantized"} if facts.base else {}
    return ModelCardData(
        language=list(languages) if languages else None,
        license=licence or None,
        license_name=name or None,
        license_link=facts.general("license.link") or None,
        library_name=LIBRARY,
        pipeline_tag="text-generation",
        base_model=facts.base or None,
        tags=["gguf", LIBRARY, "activation-sparsity", facts.structure.ffn_activation],
        **more,
    )


def _title(facts: CardFacts) -> Iterator[str]:
    name = facts.general("name") or facts.name
    base = f"[{facts.base}]({HUB}/{facts.base})" if facts.base else f"`{name}`"
    s = facts.structure
    neurons = spread([block.ffn.n_ff if block.ffn else 0 for block in s.blocks])
    yield f"# {name}\n"
    yield (
        f"{base} as a GGUF file for **lazyneuron**, which does not read the FFN neurons that are zero for a token. "
        f"{s.block_count} layers of {neurons} neurons, activation `{s.ffn_activation}`"
        f"{', gated' if s.ffn_gate == 'gated' else ''}; matrices in {', '.join(facts.types)}. "
        "llama.cpp does not load it: `general.architecture` is `lazyneuron`."
    )


def _run(facts: CardFacts) -> Iterator[str]:
    yield "## Run it\n"
    yield f"```\npython -m runtime chat {facts.name}"
    yield f'python -m runtime complete {facts.name} -p "Once upon a time" -n 64'
    yield f"python -m runtime inspect {facts.name}\n```\n"
    yield "```python\nimport runtime\n"
    yield f'with runtime.load("{facts.name}") as model:'
    yield '    for piece in model.generate("Once upon a time", max_tokens=64):'
    yield '        print(piece, end="", flush=True)\n```'


def _files(facts: CardFacts) -> Iterator[str]:
    yield "## Files\n"
    yield from _table(
        ("file", "bytes", "sha256"), ((f.name, f"{f.size:,}", f"`{f.sha256}`" if f.sha256 else "") for f in facts.files)
    )


def _sparsity(facts: CardFacts) -> Iterator[str]:
    if not facts.frequencies:
        return
    blocks = facts.structure.blocks
    layers = [layer_firing(f, block.ffn) for f, block in zip(facts.frequencies, blocks, strict=True) if len(f)]
    n = len(layers)
    active, hot = sum(layer.active for layer in layers) / n, sum(layer.hot for layer in layers) / n
    yield "## Sparsity\n"
    yield (
        f"On the calibration text {share(active)} of a layer's FFN neurons fire for a token; "
        f"{share(hot)} of them carry 80 % of the activations (means over the layers)."
    )
    if facts.plot:
        yield f"\n![Active neurons per layer, and how unevenly neurons fire]({PLOT})"


def _predictors(facts: CardFacts) -> Iterator[str]:
    s = facts.structure
    found = predictor_figures(facts.metadata, s.block_count)
    if not facts.frequencies and not found:
        return
    yield "## Layers and predictors\n"
    yield _predictor_line(facts)
    yield "\n<details><summary>Layer by layer</summary>\n"
    yield from _table(
        ("layer", *_PER_LAYER), [_layer_row(facts, i, found[i] if found else None) for i in range(s.block_count)]
    )
    yield "\n</details>"


def _layer_row(facts: CardFacts, i: int, found: PredictorFigures | None) -> tuple[str, ...]:
    shares, rank = ["", ""], facts.structure.rank(i)
    if facts.frequencies:
        layer = layer_firing(facts.frequencies[i], facts.structure.blocks[i].ffn)
        shares = [share(layer.active), share(layer.hot)]
    if not rank:
        return (str(i), *shares, "none", "", "", "", "")
    if not found:
        return (str(i), *shares, f"rank {rank}", "", "", "", "")
    kind = f"{found.type} rank {rank}" if found.type else f"rank {rank}"
    measured = [share(value) for value in (found.predicted_share, found.recall, found.precision)]
    return (str(i), *shares, kind, *measured, "" if found.energy_kept is None else share(found.energy_kept, 2))


def _predictor_line(facts: CardFacts) -> str:
    s, budget = facts.structure, facts.metadata.get(f"{ARCHITECTURE}.predictor.energy")
    n = sum(s.rank(i) > 0 for i in range(s.block_count))
    if not n:
        return "No predictors: the gates of all neurons are computed (`exact` mode)."
    asked = f", fitted to keep {budget:.2%} of the FFNs' output energy" if budget is not None else ""
    return (
        f"Predictors of kind `{s.predictor}` in {n} of {s.block_count} layers{asked}. "
        "Recall, precision and the predicted share of the neurons were measured on calibration text that the "
        "fit did not see."
    )


def _perplexity(facts: CardFacts) -> Iterator[str]:
    if facts.perplexity is None:
        return
    measured = facts.perplexity.modes
    one = next(iter(measured.values()))
    yield "## Perplexity\n"
    yield from _table(
        ("FFN mode", "perplexity"),
        ((mode, f"{found.perplexity:.4f} ± {found.perplexity_error:.4f}") for mode, found in measured.items()),
    )
    yield (
        f"\nOn `{facts.perplexity.text}` (sha256 `{facts.perplexity.sha256}`): {one.tokens:,} tokens, "
        f"windows of {one.window:,}, stride {one.stride:,}, KV {one.kv_type}. To repeat it:\n"
    )
    command = f"python -m runtime perplexity {facts.name} {facts.perplexity.text}"
    limit = f" --tokens {facts.perplexity.limit}" if facts.perplexity.limit else ""
    yield "```\n" + "\n".join(f"{command} --ffn {mode}{limit}" for mode in measured) + "\n```"


def _origin(facts: CardFacts) -> Iterator[str]:
    calibration = {
        key: facts.metadata.get(f"{ARCHITECTURE}.calibration.{key}")
        for key in ("corpus", "sha256", "tokens", "method", "seed")
    }
    url, licence = facts.general("source.url"), facts.general("license.name") or facts.general("license")
    yield "## Where it comes from\n"
    if url or facts.base:
        yield f"- checkpoint: {url or f'{HUB}/{facts.base}'}"
    stated = f"{licence}, the same as of the checkpoint" if licence else "the checkpoint does not state one"
    yield f"- licence: {stated}"
    if calibration["corpus"] is not None:
        yield (
            f"- calibration: `{calibration['corpus']}` (sha256 `{calibration['sha256']}`), "
            f"{calibration['tokens']:,} tokens, "
            f"method: {calibration['method']}, seed {calibration['seed']}"
        )


def _table(header: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'|'.join(['---'] * len(header))}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
