"""PowerInfer's model files (`*.powerinfer.gguf`) as the plan of a conversion: the rows of every matrix are kept as they
are.

Such a file is GGUF with another magic, the down projection in the transposed layout only, and a predictor in each block
(docs/powerinfer.md).powerinfer.bodies`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION

from convert.arch import Arch, Source, describe
from convert.config import Config
from convert.file_tensors import DecodedMatrix, KeptRows, Readable
from convert.formats import fitting
from convert.plan import MadeTensor, Plan, PlannedTensor, Types, mixer_of
from convert.powerinfer.bodies import ACTIVATION, BODIES, INSTEAD, TIED, TOKENIZERS
from convert.rewrites import Mixer, Shape, named
from convert.tokenizer import spm
from convert.tokenizer.self_check import opened
from convert.tokenizer.vocabulary import filler
from convert.unmapped import disagreement, listed
from runtime.bindings import ggml
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile, TensorInfo
from runtime.model_file.structure import ARCHITECTURE, Attention, Structure
from runtime.model_file.tensor_shapes import required_tensors
from runtime.text.vocabulary import check_vocabulary

MAGIC = b"PWRI"
THRESHOLD = "powerinfer.sparse_threshold"
DOWN_TYPE = "q8_0"  # of the down projection's second layout
_DAMAGED = "download it again, or convert the original checkpoint: python -m convert REPO OUT.gguf"
_LARGEST = 3.4e38  # of a number: what an F32 holds
_UNSAID = -1000.0  # score of a token that no merge may produce


class PowerInferFile:
    """An open file: its `container`, the body's description and the container's keys as that wants them.

    Raises UserError when it is missing, damaged, no PowerInfer file, or one of an architecture that is not known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.container = GgufFile(path, MAGIC)
        found = self.container.metadata.get("general.architecture")
        if not isinstance(found, str) or found not in BODIES:
            raise UserError(
                f"`{path}`: general.architecture is `{found}`, expected one of {', '.join(BODIES)}",
                "a `*.generated.gpuidx` file is no model: give the file that it was generated for",
            )
        version = self.container.metadata.get("general.quantization_version", GGML_QUANT_VERSION)
        if type(version) is not int or version != GGML_QUANT_VERSION:
            raise UserError(
                f"`{path}`: quantization version {version}, expected {GGML_QUANT_VERSION}",
                "its blocks have another layout: quantise the F16 file again",
            )
        self.name, self.arch = found, BODIES[found]
        self.config = Config(f"`{path}`", self._values(self.arch))

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors by the file's own names."""
        return self.container.tensors

    @property
    def threshold(self) -> float:
        """From which score on the predictor means a neuron to fire."""
        value = Config(f"`{self.path}`", self.container.metadata).get(THRESHOLD, float, 0.0)
        if not abs(value) < _LARGEST:
            raise UserError(f"`{self.path}`: `{THRESHOLD}` is {value}, expected a finite number", _DAMAGED)
        return value

    def _values(self, arch: Arch) -> dict[str, Any]:
        values = {k.removeprefix(f"{self.name}."): v for k, v in self.container.metadata.items()}
        if "token_embd.weight" not in self.tensors:
            raise UserError(f"`{self.path}`: tensor `token_embd.weight` missing", _DAMAGED)
        return values | {
            "architectures": list(arch.architectures),
            "vocab_size": self.tensors["token_embd.weight"].ne[-1],
            ACTIVATION: next(iter(arch.activations)),
            TIED: "output.weight" not in self.tensors,
        }


def plan_import(file: PowerInferFile, layout: str = "sparse", ffn_type: str | None = None) -> Plan:
    """Plan the file's conversion. Raises UserError when its keys and tensors do not agree.

    layout: "both" adds the down projection's second layout, made from the first. ffn_type: the activation, which the
    file does not tell.
    """
    structure = _with_predictor(file, describe(file.arch, file.config, layout, ffn_type))
    required = required_tensors(structure)
    sources = {name: _source(file, name) for name in required if not name.endswith(".predictor_out.bias")}
    _check_names(file, structure, sources)
    tensors = tuple(_planned(file, name, shape, sources.get(name), structure) for name, shape in required.items())
    return Plan(None, structure, Types("", ""), tensors, tuple(_notes(file, layout, ffn_type)))


def threshold_bias(threshold: float, n_ff: int) -> MadeTensor:
    """`predictor_out.bias` for which score + bias > 0 says exactly what score >= threshold says."""
    below = np.nextafter(np.float32(threshold), np.float32(-math.inf))
    return MadeTensor(np.full(n_ff, -below, np.float32).view(np.uint8))


def _with_predictor(file: PowerInferFile, s: Structure) -> Structure:
    missing = [f"blk.{i}.fc1.weight" for i in range(s.block_count) if f"blk.{i}.fc1.weight" not in file.tensors]
    if missing:
        raise UserError(f"`{file.path}`: {len(missing)} tensors missing ({listed(missing)})", _DAMAGED)
    ranks = tuple(file.tensors[f"blk.{i}.fc1.weight"].ne[-1] for i in range(s.block_count))
    return with_mlp(s, ranks)


def with_mlp(s: Structure, ranks: tuple[int, ...]) -> Structure:
    """The structure with PowerInfer's predictors: they see the stream before the FFN's norm.

    Their errors are not known yet: 1.
    """
    return replace(
        s, predictor="mlp", predictor_tap="residual", predictor_rank=ranks, predictor_error=(1.0,) * len(ranks)
    )


def _source(file: PowerInferFile, name: str) -> Source:
    """Where a tensor of ours is in the file, `{i}` filled in."""
    block = name.split(".")[1] if name.startswith("blk.") else ""
    template = name.replace(f"blk.{block}.", "blk.{i}.", 1) if block else name
    source = file.arch.tensors.get(template)
    if not isinstance(source, Source):
        raise UserError(f"`{file.path}`: has no place for `{name}`, which the model needs")
    found = source.name.format(i=block)
    for absent, instead in INSTEAD.items():
        if found not in file.tensors:
            found = found.replace(f".{absent}.", f".{instead}.")
    return Source(found, source.rewrite)


def _check_names(file: PowerInferFile, s: Structure, sources: Mapping[str, Source]) -> None:
    used = {source.name for source in sources.values()}
    skipped = {name.format(i=i) for name in file.arch.skip for i in range(s.block_count)}
    missing = sorted(used - set(file.tensors))
    unknown = sorted(set(file.tensors) - used - skipped)
    if found := disagreement(missing, unknown):
        raise UserError(f"`{file.path}`: {found}", _DAMAGED)


def _planned(file: PowerInferFile, name: str, shape: Shape, source: Source | None, s: Structure) -> PlannedTensor:
    if source is None:
        return PlannedTensor(name, threshold_bias(file.threshold, *shape), shape, "f32", "f32")
    info = file.tensors[source.name]
    mixer = mixer_of(s, name)
    first, expected = _rows(source.rewrite, shape, mixer)
    if info.ne != expected:
        raise UserError(
            f"`{file.path}`: tensor `{info.name}` has shape {list(info.ne)}, expected {list(expected)} from the "
            "file's own keys",
            _DAMAGED,
        )
    vector = len(shape) == 1
    if not (info.type == "f32" if vector else _multiplies(info)):
        wanted = "f32" if vector else "a float or quantised type"
        raise UserError(f"`{file.path}`: tensor `{info.name}` has type {info.type}, expected {wanted}", _DAMAGED)
    if first is not None:
        kind = info.type.lower()
        return PlannedTensor(name, KeptRows(file.path, info, first), shape, kind, kind)
    made: Readable = DecodedMatrix(file.path, info, source.rewrite)
    wanted = DOWN_TYPE if source.rewrite == "transpose" else "f32"
    rewrite = named(source.rewrite, mixer)
    return PlannedTensor(name, made, shape, fitting(wanted, shape[0]), wanted, rewrite=rewrite)


def _multiplies(info: TensorInfo) -> bool:
    """Whether rows of the tensor's type can be multiplied with, and read."""
    return info.type in ggml.TYPES and bool(ggml.ggml_get_type_traits_cpu(info.type_id).contents.vec_dot)


def _rows(rewrite: str, shape: Shape, mixer: Mixer | None) -> tuple[int | None, Shape]:
    """From which row on a tensor is kept (None: it is decoded), and the shape of the one that it is taken from."""
    q, kv = (mixer.query_length, mixer.kv_length) if isinstance(mixer, Attention) else (0, 0)
    parts = {"identity": 0, "query_rows": 0, "key_rows": q, "value_rows": q + kv}
    if rewrite == "identity":
        return 0, shape
    if rewrite in parts:
        return parts[rewrite], (shape[0], q + 2 * kv)
    return None, shape[::-1] if rewrite == "transpose" else (shape[0], shape[1] + 2)


def _notes(file: PowerInferFile, layout: str, ffn_type: str | None) -> list[str]:
    notes = []
    if len(set(file.arch.activations.values())) > 1 and ffn_type is None:
        taken = next(iter(file.arch.activations))
        notes.append(
            f"the file does not say which ReLU its FFNs have: `{taken}`, as PowerInfer computes; --ffn-type for another"
        )
    if layout == "both":
        notes.append(f"ffn_down is {DOWN_TYPE}, made from ffn_down_t: the file has only that layout")
    return notes


def import_metadata(file: PowerInferFile, s: Structure) -> dict[str, Any]:
    """All keys of the new file: what it is, its structure, its tokenizer, and where its predictors are from."""
    texts = ("general.license", "general.author", "general.url", "general.source.url")
    kinds = dict.fromkeys(texts, str) | {"general.file_type": int}
    found = file.container.metadata
    return {
        "general.architecture": ARCHITECTURE,
        "general.name": file.path.name.removesuffix(".gguf").removesuffix(".powerinfer"),
        "general.type": "model",
        **{key: found[key] for key, kind in kinds.items() if type(found.get(key)) is kind},
        "general.quantization_version": GGML_QUANT_VERSION,
        **s.to_metadata(),
        **_tokenizer(file, s.vocab_size),
        **provenance(file.path.name, file.threshold),
    }


def provenance(source: str, threshold: float) -> dict[str, Any]:
    """The keys that say where imported predictors are from."""
    return {f"{ARCHITECTURE}.predictor.source": source, f"{ARCHITECTURE}.predictor.threshold": float(threshold)}


def _tokenizer(file: PowerInferFile, vocab_size: int) -> dict[str, Any]:
    """The tokenizer's keys, with those added that its time did not know; unused tokens where the embeddings have more
    rows.
    """
    keys = {k: _plain(v) for k, v in file.container.metadata.items() if k.startswith("tokenizer.")}
    tokens = keys.get("tokenizer.ggml.tokens", [])
    tokens = tokens if isinstance(tokens, list) else []
    if not 0 < len(tokens) <= vocab_size:
        raise UserError(
            f"`{file.path}`: {len(tokens)} tokens, expected 1 to {vocab_size}, a row of embeddings for each"
        )
    check_vocabulary(file.container.metadata, f"`{file.path}`")
    taken = set(tokens)
    fill = {
        "tokens": [filler(i, taken) for i in range(len(tokens), vocab_size)],
        "scores": _UNSAID,
        "token_type": spm.UNUSED,
    }
    for part, value in fill.items():
        if f"tokenizer.ggml.{part}" in keys:
            more = value if isinstance(value, list) else [value] * (vocab_size - len(tokens))
            keys[f"tokenizer.ggml.{part}"] = keys[f"tokenizer.ggml.{part}"] + more
    sentencepiece = keys.get("tokenizer.ggml.model") == "llama"
    pre, add_bos = ("default", True) if sentencepiece else TOKENIZERS[file.name]
    unsaid = {"pre": pre, "add_space_prefix": sentencepiece, "add_bos_token": add_bos, "add_eos_token": False}
    keys = {f"tokenizer.ggml.{key}": value for key, value in unsaid.items()} | keys
    with opened(keys, f"`{file.path}`"):
        return keys


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
