"""Rotary position embeddings as config.json describes them: `rope_parameters`, or before that `rope_theta` and
`rope_scaling`.

What counts where these disagree, and what each kind computes, is as in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from convert.arch import Generated
from convert.config import REQUIRED, Config, shown
from runtime.errors import UserError

Floats = npt.NDArray[np.float64]
_NULLS = ("rope_type", "type", "factor")  # of which a null says something else than nothing
_MOST = 1 << 16  # elements of a head, as the structure has it: what is more is refused before it takes memory


def head_length(config: Config) -> int:
    """Elements per attention head: `head_dim`, else what the heads share `hidden_size` in."""
    heads = config.positive("num_attention_heads", int)
    return config.positive("head_dim", int, max(config.get("hidden_size", int) // heads, 1))


def equal_parts(config: Config) -> int:
    """Elements per attention head where all heads together are as wide as the model, and no `head_dim` changes that."""
    width, heads = config.get("hidden_size", int), config.positive("num_attention_heads", int)
    if width % heads:
        raise UserError(f"{config.where}: hidden_size {width} is not a multiple of num_attention_heads {heads}")
    return width // heads


@dataclass(frozen=True)
class Rotation:
    """How heads of one model are rotated.

    dimensions: elements of a head that are; base: theta; factor: what positions are divided by. divisors: of each
    frequency, float64 [dimensions / 2], or None; attention_factor: of rotated queries and keys.
    """

    dimensions: int
    base: float
    factor: float = 1.0
    divisors: Floats | None = None
    attention_factor: float = 1.0


@dataclass(frozen=True)
class Rope:
    """The rotation of an architecture, and the defaults of its configs: theta, the context, elements of a head.

    rotated: the share of a head that is rotated where a config does not say; None where it is all of it, whatever a
    config says.
    backwards: heads are rotated the other way round.
    """

    theta: float = 10000.0
    context: int = 2048
    rotated: float | None = None
    backwards: bool = False
    head_length: Callable[[Config], int] = head_length

    def keys(self) -> dict[str, object]:
        """The fields of a structure that describe it."""
        return {
            "position": "rope_neox",  # Hugging Face rotates halves of a head, so q and k need no permutation
            "head_length": self.head_length,
            "context_length": self.context_length,
            "rope_dimension_count": lambda config: self.of(config).dimensions,
            "rope_freq_base": lambda config: self.of(config).base,
            "rope_scaling": lambda config: "none" if self.of(config).factor == 1 else "linear",
            "rope_scaling_factor": lambda config: self.of(config).factor,
            "rope_freq_factors": lambda config: self.backwards or self.of(config).divisors is not None,
            "rope_attention_factor": lambda config: self.of(config).attention_factor,
        }

    def tensors(self) -> dict[str, Generated]:
        """What the frequencies are divided by, where the structure asks for it: float32 [dimensions / 2]."""
        return {"rope_freqs.weight": Generated(self._divisors)}

    def of(self, config: Config) -> Rotation:
        """The rotation of a checkpoint.

        Raises UserError for a kind that is not known, and for values out of their range.
        """
        parameters = _in_force(config, self)
        kind = _kind(parameters)
        theta = _number(parameters, "rope_theta")
        if theta <= 1:
            raise UserError(f"{parameters.where}: rope_theta is {theta}, expected more than 1")
        dimensions = self._dimensions(parameters, kind, self.head_length(config))
        if dimensions > _MOST:
            raise UserError(f"{parameters.where}: {dimensions} elements of a head to rotate, expected at most {_MOST}")
        return _KINDS[kind](parameters, _Plain(dimensions, theta, self.context_length(config)))

    def context_length(self, config: Config) -> int:
        """Positions that the model was made for."""
        return config.positive("max_position_embeddings", int, self.context)

    def _divisors(self, config: Config) -> npt.NDArray[np.float32]:
        rotation = self.of(config)
        found = np.ones(rotation.dimensions // 2) if rotation.divisors is None else rotation.divisors
        return (-found if self.backwards else found).astype(np.float32)

    def _dimensions(self, parameters: Config, kind: str, head: int) -> int:
        share = _number(parameters, "partial_rotary_factor", 1.0 if self.rotated is None else self.rotated)
        if share > 1:
            raise UserError(f"{parameters.where}: partial_rotary_factor is {share}, expected at most 1")
        if self.rotated is not None:
            return int(head * share)
        if kind != "default" and int(head * share) != head:
            raise UserError(
                f"{parameters.where}: partial_rotary_factor {share} with rope type `{kind}`, expected 1: "
                "this architecture rotates whole heads"
            )
        return head


# --- where a config says it -------------------------------------------------------------------------------------------


def _in_force(config: Config, rope: Rope) -> Config:
    """The object that counts, completed with the values from beside it.

    `rope_scaling` counts alone where it is there.
    """
    older, newer = config.inside("rope_scaling"), config.inside("rope_parameters")
    chosen = older if older.values else newer
    beside = {"rope_theta": config.get("rope_theta", float, rope.theta)}
    for name in ("partial_rotary_factor", "original_max_position_embeddings"):
        beside |= {name: config.values[name]} if config.values.get(name) is not None else {}
    given = {key: value for key, value in chosen.values.items() if value is not None or key in _NULLS}
    values = {**beside, **given}
    if "original_max_position_embeddings" in beside:  # this one wins beside the object, not within
        values["original_max_position_embeddings"] = beside["original_max_position_embeddings"]
    if older.values:
        _check_lost(config.where, newer.values, {"partial_rotary_factor": rope.rotated, **values})
    return Config(chosen.where if chosen.values else config.where, values)


def _check_lost(where: str, lost: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
    """Refuse a config in which `rope_scaling` puts another value out of force than its own; counts: the values left,
    None for those of no use.
    """
    for name in ("rope_theta", "partial_rotary_factor"):
        if lost.get(name) is not None and counts[name] is not None and lost[name] != counts[name]:
            raise UserError(
                f"{where}: `rope_parameters` says {name} {shown(lost[name])}, but `rope_scaling` beside it counts, "
                f"with {shown(counts[name])}",
                "put what rope_scaling says into rope_parameters, and take rope_scaling out",
            )


def _kind(parameters: Config) -> str:
    if any(isinstance(value, dict) for value in parameters.values.values()):
        found = "one per layer type"
    else:
        found = parameters.values.get("rope_type", parameters.values.get("type", "default"))
    if not isinstance(found, str) or found not in _KINDS:
        said = found if isinstance(found, str) else shown(found)
        raise UserError(
            f"{parameters.where}: rope type `{said}`, expected {', '.join(_KINDS)}",
            "computing another rotation would give other text without a word",
        )
    return found


def _number(parameters: Config, name: str, default: Any = REQUIRED) -> float:
    """A positive number of a size that arithmetic stands."""
    found = parameters.positive(name, float, default)
    if not 1e-9 < found < 1e15:
        raise UserError(f"{parameters.where}: `{name}` is {found:g}, expected 1e-9 to 1e15")
    return found


# --- what each kind computes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plain:
    """A rotation before it is scaled. context: positions that the model was made for."""

    dimensions: int
    base: float
    context: int

    def rotation(self, **changes: Any) -> Rotation:
        return Rotation(self.dimensions, self.base, **changes)

    @property
    def frequencies(self) -> Floats:
        """float64 [dimensions / 2], in radians per position."""
        return np.asarray(self.base ** (-np.arange(0, self.dimensions, 2) / self.dimensions))

    def original(self, parameters: Config) -> int:
        """The context before it was extended."""
        return parameters.positive("original_max_position_embeddings", int, self.context)


def _default(_parameters: Config, plain: _Plain) -> Rotation:
    return plain.rotation()


def _linear(parameters: Config, plain: _Plain) -> Rotation:
    return plain.rotation(factor=_number(parameters, "factor"))


def _dynamic(parameters: Config, plain: _Plain) -> Rotation:
    """Up to the model's own context nothing is scaled. Beyond it frequencies would change with a text's length."""
    _number(parameters, "factor")
    return plain.rotation()


def _llama3(parameters: Config, plain: _Plain) -> Rotation:
    """Llama 3.1: long waves are divided by `factor`, short ones are left alone, those between are interpolated."""
    low, high = _number(parameters, "low_freq_factor"), _number(parameters, "high_freq_factor")
    if low >= high:
        raise UserError(f"{parameters.where}: expected low_freq_factor below high_freq_factor")
    turns = plain.original(parameters) * plain.frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain.rotation(divisors=_interpolated(kept, _number(parameters, "factor")))


def _yarn(parameters: Config, plain: _Plain) -> Rotation:
    """YaRN (arXiv:2309.00071): a ramp between the frequencies that turn `beta_fast` and `beta_slow` times in the
    original context.
    """
    original = plain.original(parameters)
    implied = "factor" in parameters.values and parameters.values["factor"] is None
    factor = plain.context / original if implied else _number(parameters, "factor")

    def dimension(name: str, usual: float) -> float:
        turns = _unless_zero(parameters, name, usual)
        return plain.dimensions * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(plain.base))

    first, last = dimension("beta_fast", 32.0), dimension("beta_slow", 1.0)
    if parameters.get("truncate", bool, True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, plain.dimensions - 1)
    ramp = (np.arange(plain.dimensions // 2) - first) / ((last - first) or 1e-3)
    divisors = _interpolated(1 - np.clip(ramp, 0, 1), factor)
    return plain.rotation(divisors=divisors, attention_factor=_yarn_attention(parameters, factor))


def _yarn_attention(parameters: Config, factor: float) -> float:
    over, under = (_unless_zero(parameters, name, 0.0) for name in ("mscale", "mscale_all_dim"))

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(max(factor, 1.0)) + 1

    inferred = scale(over) / scale(under) if over and under else scale(1.0)
    return _number(parameters, "attention_factor", inferred)


def _unless_zero(parameters: Config, name: str, usual: float) -> float:
    """A positive number, or the usual one for a zero, a null or none."""
    return _number(parameters, name) if parameters.values.get(name) else usual


def _interpolated(kept: Floats, factor: float) -> Floats:
    """Divisors of frequencies of which a share is kept, and the rest divided by `factor`."""
    return np.asarray(1 / (kept + (1 - kept) / factor))


_KINDS: dict[str, Callable[[Config, _Plain], Rotation]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
