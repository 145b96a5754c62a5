"""What a file says of its making: its calibration, and what was measured of its predictors. Checked when a file is
opened; commands, cards and pages show it.

Nothing here changes what a model computes, but for what the runtime expects of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from runtime.errors import UserError
from runtime.model_file.structure import ARCHITECTURE

_SHARES = ("active_share", "predicted_share", "recall", "precision", "energy_kept")


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_Test = tuple[Callable[[Any], bool], str]
_PER_BLOCK: dict[str, _Test] = {f"predictor.{name}": (_is_share, "numbers from 0 to 1") for name in _SHARES} | {
    "predictor.type": (_is_text, "names")
}
_SINGLE: dict[str, _Test] = {
    "predictor.energy": (_is_share, "a number from 0 to 1"),
    "predictor.source": (_is_text, "a text"),
    "predictor.threshold": (_is_number, "a number"),
    "calibration.corpus": (_is_text, "a text"),
    "calibration.sha256": (_is_text, "a text"),
    "calibration.method": (_is_text, "a text"),
    "calibration.counts": (_is_text, "a text"),
    "calibration.tokens": (_is_count, "a number of tokens"),
    "calibration.seed": (_is_count, "a whole number"),
}


def check_figures(metadata: Mapping[str, Any], block_count: int, where: str) -> None:
    """Raise UserError unless every such key that the file has is of its type, has one entry per block, and lies in its
    range.
    """
    for name, (test, wanted) in (_SINGLE | _PER_BLOCK).items():
        key = f"{ARCHITECTURE}.{name}"
        if key not in metadata:
            continue
        value = metadata[key]
        value = value.tolist() if isinstance(value, np.ndarray) else value
        if name in _SINGLE:
            if not test(value):
                raise _wrong(where, key, value, wanted)
        elif not isinstance(value, list) or len(value) != block_count or not all(map(test, value)):
            raise _wrong(where, key, value, f"{block_count} {wanted}, one per block")


def _wrong(where: str, key: str, value: Any, wanted: str) -> UserError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return UserError(
        f"{where}: `{key}` is {shown}, expected {wanted}", "the file is damaged: convert the checkpoint again"
    )
