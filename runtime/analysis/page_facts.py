"""What a page shows of a model file: what the other analyses say of it, gathered in one object that JSON can hold."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from runtime.analysis.contents import Contents, contents_of, kind_of
from runtime.analysis.firing import (
    Frequencies,
    carried_shares,
    expert_use,
    layer_firing,
    predictor_figures,
    read_frequencies,
)
from runtime.model_file.reader import GgufFile
from runtime.model_file.structure import ARCHITECTURE

POINTS = 100  # of a curve, beside its origin
MODES = {"dense": "dense", "exact_calibrated": "exact", "predicted_calibrated": "predicted"}
_LONGEST = 300  # characters of a text that the file brings along
_LISTED = 100  # of a list of such texts
_CALIBRATION = ("corpus", "sha256", "tokens", "method", "seed", "counts")
_PREDICTOR = ("energy", "source", "threshold")
_EXACT = 1 << 53  # whole numbers up to here are the same as floats
_NO_PARAMETERS = ("neurons", "predictor")


def facts_of(file: GgufFile) -> dict[str, Any]:
    """All that a page shows of an open file, but for the placement and for what needs a machine."""
    found = contents_of(file)
    described = found.as_json()
    frequencies = read_frequencies(file) if file.structure.neuron_order == "hot" else []
    return {
        "version": _version(),
        "model": file.path.name,
        "parameters": _parameters(file),
        **{key: described[key] for key in ("bytes", "structure", "groups", "tokenizer", "sparsity")},
        "general": {key: value[:_LISTED] if isinstance(value, list) else value for key, value in found.general.items()},
        "calibration": _texts(file, "calibration", _CALIBRATION),
        "predictor": _texts(file, "predictor", _PREDICTOR),
        "layers": _layers(file, frequencies),
        "curves": [curve(freq) for freq in frequencies],
        "bytes_per_token": found.bytes_per_token,
        "modes": _modes(found),
    }


def bounds(facts: Mapping[str, Any], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """For each mode, the tokens/s that each memory (bytes/s, by name) allows at most: its bandwidth over the bytes that
    a token reads.
    """
    return [
        {"mode": mode["mode"], "bytes": mode["bytes"], **{name: rate / mode["bytes"] for name, rate in rates.items()}}
        for mode in facts["modes"]
    ]


def curve(freq: Frequencies) -> list[float]:
    """The share of the activations that the hottest 0, 1, 2 .. 100 % of the neurons carry; all 0 where none ever
    fires.
    """
    carried = np.append(0.0, carried_shares(freq))
    at = np.rint(np.linspace(0, len(freq), POINTS + 1)).astype(int)
    return [round(float(share), 3) for share in carried[at]]


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numpy's numbers and arrays as Python's, no NaN or infinity (None), long texts cut,
    floats with nine digits, whole ones as integers.
    """
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, str):
        return value if len(value) <= _LONGEST else value[: _LONGEST - 1] + "…"
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain(item) for item in value]
    if isinstance(value, float):
        short = float(f"{value:.9g}") if math.isfinite(value) else None
        return int(value) if short and value.is_integer() and abs(value) < _EXACT else short
    return value if isinstance(value, int) or value is None else plain(str(value))


def _version() -> str:
    try:
        return importlib.metadata.version("lazyneuron")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _parameters(file: GgufFile) -> int:
    """Elements of the model's own tensors: the down projection is counted once."""
    down = {name.replace("ffn_down", "ffn_down_t") for name in file.tensors if "ffn_down_t" not in name}
    own = (t for name, t in file.tensors.items() if kind_of(name) not in _NO_PARAMETERS)
    return sum(math.prod(t.ne) for t in own if "ffn_down_t" not in t.name or t.name not in down)


def _texts(file: GgufFile, group: str, names: Sequence[str]) -> dict[str, Any]:
    found = {name: file.metadata.get(f"{ARCHITECTURE}.{group}.{name}") for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _layers(file: GgufFile, frequencies: Sequence[Frequencies]) -> list[dict[str, Any]]:
    """Per layer: what fires (without calibration nothing), how its experts are chosen, if there are any, and the
    predictor (rank 0: none) with what was measured of it.
    """
    s, n = file.structure, file.structure.block_count
    ffns = [block.ffn for block in s.blocks]
    firing = [asdict(layer_firing(*both)) for both in zip(frequencies, ffns, strict=False)] or [{} for _ in range(n)]
    measured = [found.as_json() for found in predictor_figures(file.metadata, n) or ()] or [{} for _ in range(n)]
    uses = [{"experts": asdict(use)} if (use := expert_use(file, i)) else {} for i in range(n)]
    return [{**firing[i], **uses[i], **(measured[i] if s.rank(i) else {}), "rank": s.rank(i)} for i in range(n)]


def _modes(found: Contents) -> list[dict[str, Any]]:
    """For each FFN mode that the file says enough about, the bytes of weights that a token reads, by part."""
    modes = []
    for key, mode in MODES.items():
        if (traffic := found.traffic[key]) is not None:
            parts = {name: getattr(traffic, name) for name in ("ffn", "attention", "head", "other")}
            modes.append({"mode": mode, "bytes": traffic.total, "parts": parts})
    return modes
