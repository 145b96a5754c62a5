"""What an architecture family is to the converter: one frozen `Arch` per file in `convert/archs/`, found by listing it.

Turns a checkpoint's config.json into the `Structure` that the file will describe. Knows no family's name and reads no
weights.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from convert import archs
from convert.already_quantized import refuse_quantised
from convert.config import REQUIRED, Config, shown
from runtime.bindings.ffn_shape import ACTIVATIONS
from runtime.errors import UserError
from runtime.model_file.structure import ARCHITECTURE, Structure, item_type
from runtime.model_file.structure_reading import read_structure

THRESHOLDED = "fatrelu"  # the activation that has a threshold
_EXPECTED = {"per_layer_config": {}, "transformers_weights": "model.safetensors"}  # as `Arch.expect`, in every family


@dataclass(frozen=True)
class Field:
    """A value of config.json: its key, and what stands for a missing or null one (a constant, another `Field`, or a
    function of the config)."""

    name: str
    default: Any = REQUIRED


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor and the name of its rewrite in `convert.rewrites`. In its name `{i}` stands for the block's
    number, and `{e}` for the expert's: of one that has it there is one for each expert, and the file has all in one.

    ternary: its weights are rounded as its model does when it runs. columns: the tensor that its columns are multiplied
    with, such as the weights of a norm whose result it multiplies. Both happen before the rewrite.
    """

    name: str
    rewrite: str = "identity"
    ternary: bool = False
    columns: str = ""

    def numbered(self, i: int | str = "{i}", e: int | str = "{e}", prefix: str = "") -> Source:
        """The source with numbers filled in, and without a prefix."""
        name, columns = (text.format(i=i, e=e).removeprefix(prefix) for text in (self.name, self.columns))
        return replace(self, name=name, columns=columns)


@dataclass(frozen=True)
class Generated:
    """A tensor made from the config alone, in F32."""

    make: Callable[[Config], npt.NDArray[np.float32]]


Sources = Source | Generated | tuple[Source, ...]
Tensors = Mapping[str, Sources | Callable[[Config], Sources]]


@dataclass(frozen=True)
class BlockKind:
    """What is different in blocks of one kind, in a family that mixes several: `keys` and `tensors` as in `Arch`.

    Keys that say how large a half is may be 0 there: `feed_forward_length` (no FFN), `head_count_kv` (no attention).
    """

    keys: Mapping[str, Any] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Arch:
    """An architecture family: how its config.json and its tensors map to a GGUF file.

    keys: field of `Structure` -> a constant, a `Field`, or a function of the config.
    tensors: GGUF name (`blk.{i}.` for those of a block) -> where it comes from, or a function of the config that says
    so.
    Of several sources, the first that the checkpoint has in the expected shape. Those that a checkpoint's structure
    does not require are not looked for.
    kinds: of a family that mixes kinds of blocks, what is different in each; kind_of: the kind of each block, where
    config.json has a list of them (a `Field`, such as `Field("layer_types")`), or a function of the config that gives
    one.
    """

    family: str
    architectures: tuple[str, ...]  # as in config.json
    activation: Field  # where config.json names the activation
    activations: Mapping[str, str]  # config.json's value -> GGUF's
    keys: Mapping[str, Any]
    tensors: Tensors
    kinds: Mapping[str, BlockKind] = field(default_factory=dict)
    kind_of: Field | Callable[[Config], Sequence[str]] = Field("layer_types")
    # In config.json beside the first architecture; "" where nothing says what it must be. It decides between two
    # families of one architecture.
    model_type: str = ""
    threshold: Field = Field("hidden_act_param")  # of `fatrelu`
    renamed: Mapping[str, str] = field(default_factory=dict)  # config keys of older checkpoints -> today's
    base_prefix: str = ""  # of checkpoints with a head; those saved without one lack it in every name
    skip: tuple[str, ...] = ()  # checkpoint tensors that carry no weights; `*` stands for anything
    # Config values that must be so, where present: one that is a list, each of its elements.
    expect: Mapping[str, Any] = field(default_factory=dict)
    # Methods of quantisation (`quant_method` of `quantization_config`) that its weights do not have when they are
    # stored as floats.
    quantization: tuple[str, ...] = ()


def families() -> dict[str, Arch]:
    """Every architecture family by name."""
    modules = [importlib.import_module(f"{archs.__name__}.{m.name}") for m in pkgutil.iter_modules(archs.__path__)]
    return {module.ARCH.family: module.ARCH for module in modules}


def find_arch(config: Config) -> Arch:
    """The family of a checkpoint.

    Raises UserError when none has the architecture that config.json names, or its weights are quantised.
    """
    known = _known_names(config.values.get("model_type"))
    named = config.get("architectures", list, [])
    name = next((name for name in named if isinstance(name, str) and name in known), "")
    refuse_quantised(config, known[name].quantization if name else ())
    if name:
        _check_model_type(config, name, known[name])
        return known[name]
    wanted = ", ".join(config.list_of("architectures", str)) or "unnamed"
    raise UserError(
        f"{config.where}: architecture {wanted}, expected {', '.join(sorted(known))}",
        "a new architecture is one file: see CONTRIBUTING.md",
    )


def _known_names(model_type: Any) -> dict[str, Arch]:
    """Architecture -> its family. Of several, the one of this model_type, else one that does not ask for another."""
    known: dict[str, list[Arch]] = {}
    for arch in families().values():
        for name in arch.architectures:
            known.setdefault(name, []).append(arch)

    def fit(arch: Arch, name: str) -> tuple[bool, bool]:
        return arch.model_type == model_type, arch.architectures[0] != name

    return {name: max(archs, key=partial(fit, name=name)) for name, archs in known.items()}


def _check_model_type(config: Config, architecture: str, arch: Arch) -> None:
    """Refuse a config that names two models.

    transformers goes by `model_type`, unless the checkpoint brings code of its own.
    """
    told = config.values.get("model_type")
    checked = arch.model_type and architecture == arch.architectures[0] and not config.values.get("auto_map")
    if checked and told not in (None, arch.model_type):
        raise UserError(
            f"{config.where}: `model_type` is {shown(told)}, expected {shown(arch.model_type)}, as architecture "
            f"{architecture} has it",
            "the two name different models: correct the one that is wrong",
        )


def describe(
    arch: Arch, config: Config, layout: str = "both", ffn_type: str | None = None, known: str | None = None
) -> Structure:
    """The structure of a checkpoint with this config.

    ffn_type: the activation in GGUF's words, to be used instead of what config.json says, with its threshold where it
    has one ("fatrelu:0.01"). known: what the catalogue has; it counts where config.json says something else.
    Raises UserError for a missing, ill-typed or unsupported value.
    """
    config = adapted(arch, config)
    _check_expected(arch, config)
    values = _values(arch, config)
    activation, threshold = _activation(arch, config, ffn_type, known)
    structure = Structure(
        source_architecture=_source_architecture(arch, config),
        ffn_activation=activation,
        activation_threshold=threshold,
        layout=layout,
        **values,
    )
    # Reading it back applies the reader's own checks before anything is written.
    return read_structure({"general.architecture": ARCHITECTURE, **structure.to_metadata()}, config.where)


def _values(arch: Arch, config: Config) -> dict[str, Any]:
    """The fields of the structure that a family's keys say, those that its kinds of blocks change with one value per
    block.
    """
    types = {f.name: item_type(f) for f in fields(Structure)}
    values = {name: _resolve(value, config, types[name]) for name, value in arch.keys.items()}
    kinds = [arch.kinds[kind] for kind in block_kinds(arch, config, values["block_count"])]
    for name in {name: None for kind in arch.kinds.values() for name in kind.keys}:
        common = values.get(name, types[name]())
        each = common if isinstance(common, tuple) else (common,) * len(kinds)
        values[name] = tuple(
            _resolve(kind.keys[name], config, types[name]) if name in kind.keys else value
            for kind, value in zip(kinds, each, strict=True)
        )
    return values


def block_kinds(arch: Arch, config: Config, block_count: int) -> tuple[str, ...]:
    """The kind of each block, one of `arch.kinds`; none of a family whose blocks are all the same.

    Raises UserError for a kind that the family does not have, and for another number of them than of blocks.
    """
    if not arch.kinds:
        return ()
    of = arch.kind_of
    if isinstance(of, Field):
        named = config.list_of(of.name, str, [] if of.default is REQUIRED else of.default)
    else:
        named = list(of(config))
    if len(named) != block_count:
        raise UserError(f"{config.where}: kinds of {len(named)} blocks, expected {block_count}")
    for i, kind in enumerate(named):
        if kind not in arch.kinds:
            raise UserError(f"{config.where}: block {i} is {shown(kind)}, expected one of {', '.join(arch.kinds)}")
    return tuple(named)


def _check_expected(arch: Arch, config: Config) -> None:
    for key, value in {**arch.expect, **_EXPECTED}.items():
        found = config.values.get(key)
        if found is None or found == value or (isinstance(found, list) and all(one == value for one in found)):
            continue
        raise UserError(f"{config.where}: `{key}` is {shown(found)}, expected {shown(value)}")


def adapted(arch: Arch, config: Config) -> Config:
    """The config with today's names of its keys. Raises UserError where both names are there with different values."""
    values = dict(config.values)
    for old, new in arch.renamed.items():
        found, known = values.get(old), values.get(new)
        if found is not None and known is not None and found != known:
            raise UserError(
                f"{config.where}: `{old}` is {shown(found)}, but `{new}`, which means the same, {shown(known)}"
            )
        if found is not None:
            values[new] = found
    return Config(config.where, values)


def _source_architecture(arch: Arch, config: Config) -> str:
    return next(name for name in config.list_of("architectures", str) if name in arch.architectures)


def _resolve(value: Any, config: Config, kind: type) -> Any:
    if isinstance(value, Field):
        found: Any = config.get(value.name, kind, None if value.default is not REQUIRED else REQUIRED)
        return _resolve(value.default, config, kind) if found is None else found
    return value(config) if callable(value) else value


def config_activation(arch: Arch, config: Config) -> str | None:
    """GGUF's name of the activation that config.json names, None where it is none that can be run, or missing."""
    named = config.values.get(arch.activation.name)
    default = None if arch.activation.default is REQUIRED else arch.activation.default
    return arch.activations.get(str(default if named is None else named))


def parse_ffn_type(text: str, where: str) -> tuple[str, float]:
    """An activation and its threshold from words such as "relu" or "fatrelu:0.01". Raises UserError for any others."""
    name, colon, number = text.partition(":")
    try:
        threshold = float(number) if colon else 0.0
    except ValueError:
        threshold = math.nan
    if name in ACTIVATIONS and math.isfinite(threshold) and threshold >= 0 and bool(colon) == (name == THRESHOLDED):
        return name, threshold
    expected = ", ".join(f"{kind}:THRESHOLD" if kind == THRESHOLDED else kind for kind in ACTIVATIONS)
    raise UserError(f"{where}: `{text}`, expected one of {expected}")


def _activation(arch: Arch, config: Config, ffn_type: str | None, known: str | None) -> tuple[str, float]:
    if ffn_type is not None:
        return parse_ffn_type(ffn_type, "--ffn-type")
    if known is not None and config_activation(arch, config) != parse_ffn_type(known, "models.toml")[0]:
        return parse_ffn_type(known, "models.toml")
    found = _resolve(arch.activation, config, str)
    if found not in arch.activations:
        supported = ", ".join(f"`{name}`" for name in arch.activations)
        raise UserError(
            f"{config.where}: `{arch.activation.name}` is `{found}`, expected {supported}: "
            "other activations leave no neurons at zero",
            "use a ReLU version of the model (python -m convert --list), or llama.cpp for this one; "
            "--ffn-type, if config.json is known to be wrong",
        )
    activation = arch.activations[found]
    return activation, _resolve(arch.threshold, config, float) if activation == THRESHOLDED else 0.0
