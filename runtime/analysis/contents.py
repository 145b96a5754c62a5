"""What a model file holds, without running it: structure, tensors by group, tokenizer, and the bytes that a token
reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from runtime.analysis.bytes_read import Sparsity, sparsity_of, traffic_by_mode
from runtime.compute.traffic import Traffic
from runtime.model_file.reader import GgufFile, TensorInfo
from runtime.model_file.structure import Structure
from runtime.model_file.tensor_names import EXPERT_FREQ
from runtime.text.tokenizer import Tokenizer

# Share of the neurons that fire, from which on skipping the others saves less than predicting them and jumping costs.
LITTLE_TO_GAIN = 0.5
_KINDS = (
    "embeddings",
    "attention",
    "mamba",
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
_STARTS = {
    "attn_": "attention",
    "ssm_": "mamba",
    "ffn_neuron_": "neurons",
    "predictor_": "predictor",
    "token_embd": "embeddings",
    "position_embd": "embeddings",
    "output": "output",
}


@dataclass(frozen=True)
class Group:
    """Tensors of one kind. types: how many are of each type."""

    kind: str
    tensors: int
    types: dict[str, int]
    bytes: int


@dataclass(frozen=True)
class SpecialToken:
    """A token with a meaning of its own."""

    id: int
    text: str


@dataclass(frozen=True)
class TokenizerFacts:
    """A file's tokenizer. model, pre: its kind and its pre-tokenizer; ends: tokens that end a reply."""

    model: Any
    pre: Any
    tokens: int
    bos: SpecialToken | None
    eos: SpecialToken | None
    ends: list[SpecialToken]
    add_bos: bool
    chat_template: bool


@dataclass(frozen=True)
class Contents:
    """What a file holds. general: its `general.*` keys; traffic: as `traffic_by_mode` returns it."""

    path: str
    bytes: int
    general: dict[str, Any]
    structure: Structure
    groups: list[Group]
    tokenizer: TokenizerFacts
    sparsity: Sparsity
    traffic: dict[str, Traffic | None]

    @property
    def bytes_per_token(self) -> dict[str, float | None]:
        """Bytes of weights that a token reads, by what it reads of the neurons."""
        return {name: None if traffic is None else traffic.total for name, traffic in self.traffic.items()}

    def as_json(self) -> dict[str, Any]:
        """The same in dicts and lists, but only the sums of what a token reads."""
        values = asdict(self)
        del values["traffic"]
        return values | {"bytes_per_token": self.bytes_per_token}


def contents_of(file: GgufFile) -> Contents:
    """What an open file holds. Raises UserError for a damaged vocabulary."""
    sparsity = sparsity_of(file)
    return Contents(
        path=str(file.path),
        bytes=file.size,
        general={k.removeprefix("general."): v for k, v in file.metadata.items() if k.startswith("general.")},
        structure=file.structure,
        groups=list(_groups(file.tensors)),
        tokenizer=_vocabulary(file),
        sparsity=sparsity,
        traffic=traffic_by_mode(file, sparsity.layer_shares),
    )


def kind_of(name: str) -> str:
    """The group a tensor belongs to, by its name: one of _KINDS."""
    stem = name.split(".")[2 if name.startswith("blk.") else 0].removesuffix("_exps").removesuffix("_shexp")
    if stem.endswith("_norm"):
        return "norms"
    if stem in _KINDS:
        return stem
    if stem == EXPERT_FREQ:
        return "neurons"
    return next((kind for start, kind in _STARTS.items() if stem.startswith(start)), "other")


def _groups(tensors: Mapping[str, TensorInfo]) -> Iterator[Group]:
    for kind in _KINDS:
        members = [t for name, t in tensors.items() if kind_of(name) == kind]
        if members:
            types = Counter(t.type for t in members)
            yield Group(kind, len(members), dict(types), sum(t.nbytes for t in members))


def _vocabulary(file: GgufFile) -> TokenizerFacts:
    with Tokenizer(file.path, file.metadata) as tokenizer:

        def token(number: int | None) -> SpecialToken | None:
            return None if number is None else SpecialToken(number, tokenizer.token_text(number))

        return TokenizerFacts(
            model=file.metadata.get("tokenizer.ggml.model"),
            pre=file.metadata.get("tokenizer.ggml.pre"),
            tokens=tokenizer.n_tokens,
            bos=token(tokenizer.bos),
            eos=token(tokenizer.eos),
            ends=[SpecialToken(number, tokenizer.token_text(number)) for number in tokenizer.end_ids],
            add_bos=tokenizer.add_bos,
            chat_template="tokenizer.chat_template" in file.metadata,
        )
