"""What an architecture family is to the converter: one frozen `Arch` per file in `convert/archs/`, found by listing it.

Turns a checkpoint's config.json into the `Structure` that the file will describe. Knows no family's name and reads no
weights.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from convert import archs
from convert.config import REQUIRED, Config
from runtime.errors import UserError
from runtime.structure import ARCHITECTURE, Structure


@dataclass(frozen=True)
class Field:
    """A value of config.json: its key, and what stands for a missing or null one (a constant, another `Field`, or a
    function of the config)."""

    name: str
    default: Any = REQUIRED


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor (`{i}` stands for the block's number) and the name of its rewrite in `convert.rewrites`."""

    name: str
    rewrite: str = "identity"


@dataclass(frozen=True)
class Generated:
    """A tensor made from the config alone, in F32."""

    make: Callable[[Config], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Arch:
    """An architecture family: how its config.json and its tensors map to a GGUF file.

    keys: field of `Structure` -> a constant, a `Field`, or a function of the config.
    tensors: GGUF name (`blk.{i}.` for those of a block) -> where it comes from. Those that a checkpoint's structure
    does not require are not looked for.
    """

    family: str
    architectures: tuple[str, ...]  # as in config.json
    activation_key: str
    activations: Mapping[str, str]  # config.json's value -> GGUF's
    keys: Mapping[str, Any]
    tensors: Mapping[str, Source | Generated]
    base_prefix: str = ""  # of checkpoints with a head; those saved without one lack it in every name
    skip: tuple[str, ...] = ()  # checkpoint tensors that carry no weights
    expect: Mapping[str, Any] = field(default_factory=dict)  # config values that must be so, where present


def families() -> dict[str, Arch]:
    """Every architecture family by name."""
    modules = [importlib.import_module(f"{archs.__name__}.{m.name}") for m in pkgutil.iter_modules(archs.__path__)]
    return {module.ARCH.family: module.ARCH for module in modules}


def find_arch(config: Config) -> Arch:
    """The family of a checkpoint. Raises UserError when none has the architecture that config.json names."""
    wanted = config.get("architectures", list)
    known = {name: arch for arch in families().values() for name in arch.architectures}
    for name in wanted:
        if name in known:
            return known[name]
    raise UserError(
        f"{config.where}: architecture {', '.join(map(str, wanted)) or 'unnamed'}, expected {', '.join(sorted(known))}",
        "a new architecture is one file: see CONTRIBUTING.md",
    )


def describe(arch: Arch, config: Config, layout: str = "both", ffn_type: str | None = None) -> Structure:
    """The structure of a checkpoint with this config.

    ffn_type: GGUF's name of the activation, to be used instead of what config.json says.
    Raises UserError for a missing, ill-typed or unsupported value.
    """
    for key, value in arch.expect.items():
        if config.values.get(key, value) != value:
            raise UserError(f"{config.where}: `{key}` is {config.values[key]!r}, expected {value!r}")
    kinds = {
        f.name: {"int": int, "float": float, "bool": bool, "str": str}.get(str(f.type), tuple)
        for f in fields(Structure)
    }
    values = {name: _resolve(value, config, kinds[name]) for name, value in arch.keys.items()}
    structure = Structure(
        source_architecture=_source_architecture(arch, config),
        ffn_activation=_activation(arch, config, ffn_type),
        layout=layout,
        **values,
    )
    # Reading it back applies the reader's own checks before anything is written.
    return Structure.from_metadata({"general.architecture": ARCHITECTURE, **structure.to_metadata()}, config.where)


def _source_architecture(arch: Arch, config: Config) -> str:
    return next(str(name) for name in config.get("architectures", list) if name in arch.architectures)


def _resolve(value: Any, config: Config, kind: type) -> Any:
    if isinstance(value, Field):
        found: Any = config.get(value.name, kind, None if value.default is not REQUIRED else REQUIRED)
        return _resolve(value.default, config, kind) if found is None else found
    return value(config) if callable(value) else value


def _activation(arch: Arch, config: Config, ffn_type: str | None) -> str:
    if ffn_type is not None:
        if ffn_type not in arch.activations.values():
            expected = ", ".join(sorted(set(arch.activations.values())))
            raise UserError(f"--ffn-type: `{ffn_type}`, expected one of {expected} for this architecture")
        return ffn_type
    found = config.get(arch.activation_key, str)
    if found not in arch.activations:
        supported = ", ".join(f"`{name}`" for name in arch.activations)
        raise UserError(
            f"{config.where}: `{arch.activation_key}` is `{found}`, expected {supported}: "
            "other activations leave no neurons at zero",
            "look for a ReLU version of the model (models.toml lists some), or use llama.cpp for this one",
        )
    return arch.activations[found]
