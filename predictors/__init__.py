"""Which neurons will fire: calibration of converted models, hot order, and small predictors made from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.base.lazy import lazy_names

if TYPE_CHECKING:
    from predictors.fit import BlockFit, Figures, ModelFit, fit_model

__all__ = ["BlockFit", "Figures", "ModelFit", "fit_model"]

__getattr__ = lazy_names(__name__, dict.fromkeys(__all__, "predictors.fit"))
