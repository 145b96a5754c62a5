"""Which neurons will fire: calibration of converted models, hot order, and small predictors made from it."""

from __future__ import annotations

from predictors.fit import BlockFit, Figures, ModelFit, fit_model

__all__ = ["BlockFit", "Figures", "ModelFit", "fit_model"]
