"""Rotary position embeddings as config.json describes them, old style (`rope_theta`, `rope_scaling`) and new
(`rope_parameters`).

Functions of the config for use in an architecture's `keys` and `tensors`. Knows no architecture.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from convert.config import Config
from runtime.errors import UserError

# config.json's type -> GGUF's scaling. Llama 3.1's and YaRN become divisors of single frequencies at conversion.
_SCALINGS = {"default": "none", "linear": "linear", "llama3": "none", "yarn": "none"}
DEFAULT_THETA = 10000.0


def _parameters(config: Config) -> Config:
    """The object that holds the variant, wherever this config keeps it."""
    style = "rope_parameters" if config.values.get("rope_parameters") else "rope_scaling"
    parameters = config.inside(style)
    kind = _kind(parameters)
    if kind not in _SCALINGS:
        raise UserError(f"{parameters.where}: rope type `{kind}`, expected {', '.join(_SCALINGS)}")
    return parameters


def _kind(parameters: Config) -> str:
    if any(isinstance(value, dict) for value in parameters.values.values()):
        return "one per layer type"
    return parameters.get("rope_type", str, parameters.get("type", str, "default"))


def freq_base(config: Config, default: float = DEFAULT_THETA) -> float:
    """theta."""
    return _parameters(config).get("rope_theta", float, config.get("rope_theta", float, default))


def head_length(config: Config) -> int:
    """Elements per attention head."""
    width, heads = config.get("hidden_size", int), config.get("num_attention_heads", int)
    if heads <= 0 or width % heads:
        raise UserError(f"{config.where}: hidden_size {width} is not a multiple of num_attention_heads {heads}")
    return config.get("head_dim", int, width // heads)


def dimension_count(config: Config, default: float = 1.0) -> int:
    """How many elements of a head are rotated; default: their share where the config names none."""
    everywhere = config.get("partial_rotary_factor", float, default)
    return int(head_length(config) * _parameters(config).get("partial_rotary_factor", float, everywhere))


def scaling(config: Config) -> str:
    """GGUF's name of the scaling."""
    return _SCALINGS[_kind(_parameters(config))]


def scaling_factor(config: Config) -> float:
    """By how much positions are divided; 1 unless the scaling is linear."""
    parameters = _parameters(config)
    return parameters.get("factor", float) if _kind(parameters) == "linear" else 1.0


def has_freq_factors(config: Config) -> bool:
    """Whether each frequency has its own divisor."""
    return _kind(_parameters(config)) in _DIVISORS


def freq_factors(config: Config) -> npt.NDArray[np.float32]:
    """What each frequency is divided by, float32 [dimension_count / 2]."""
    parameters = _parameters(config)
    context = parameters.get("original_max_position_embeddings", int, config.get("max_position_embeddings", int, 0))
    if context <= 0:
        raise UserError(f"{parameters.where}: expected a context length, `original_max_position_embeddings`")
    kept = _DIVISORS[_kind(parameters)](parameters, context, dimension_count(config), freq_base(config))
    return (1 / (kept + (1 - kept) / parameters.get("factor", float))).astype(np.float32)


def _kept_llama3(parameters: Config, context: int, n: int, base: float) -> npt.NDArray[np.float64]:
    """Share of each frequency that stays unscaled (Llama 3.1): long waves are divided by `factor`, short ones are left alone, those between are interpolated."""
    low, high = parameters.get("low_freq_factor", float), parameters.get("high_freq_factor", float)
    if not 0 < low < high:
        raise UserError(f"{parameters.where}: expected 0 < low_freq_factor < high_freq_factor")
    wavelength = 2 * math.pi * base ** (np.arange(0, n, 2) / n)
    return np.asarray(np.clip((context / wavelength - low) / (high - low), 0, 1))


def _kept_yarn(parameters: Config, context: int, n: int, base: float) -> npt.NDArray[np.float64]:
    """Share of each frequency that stays unscaled (YaRN, arXiv:2309.00071): a ramp between those that turn `beta_fast` and `beta_slow` times in the original context."""

    def dimension(turns: float) -> float:
        return n * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = (
        dimension(parameters.get(f"beta_{name}", float, turns)) for name, turns in (("fast", 32.0), ("slow", 1.0))
    )
    if parameters.get("truncate", bool, True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, n - 1)
    return np.asarray(1 - np.clip((np.arange(n // 2) - first) / max(last - first, 1e-3), 0, 1))


_DIVISORS = {"llama3": _kept_llama3, "yarn": _kept_yarn}


def attention_factor(config: Config) -> float:
    """What rotated queries and keys are multiplied with: 1, but for YaRN."""
    parameters = _parameters(config)
    if _kind(parameters) != "yarn":
        return 1.0
    scale = math.log(max(parameters.get("factor", float), 1.0))
    over, under = (parameters.get(name, float, 0.0) for name in ("mscale", "mscale_all_dim"))
    inferred = (0.1 * over * scale + 1) / (0.1 * under * scale + 1) if over and under else 0.1 * scale + 1
    return parameters.get("attention_factor", float, inferred)


def keys(theta: float = DEFAULT_THETA, rotated: float = 1.0) -> dict[str, object]:
    """The fields of a structure that describe its rotation; theta, rotated: the defaults of this architecture's configs."""
    return {
        "position": "rope_neox",  # Hugging Face rotates halves of a head, so q and k need no permutation
        "rope_dimension_count": lambda config: dimension_count(config, rotated),
        "rope_freq_base": lambda config: freq_base(config, theta),
        "rope_scaling": scaling,
        "rope_scaling_factor": scaling_factor,
        "rope_freq_factors": has_freq_factors,
        "rope_attention_factor": attention_factor,
    }
