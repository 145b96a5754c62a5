"""How often each neuron of a synthetic FFN fires, and what follows from it for the sizes of weights.

A neuron's pre-activation is a normal variable of variance 1 around a mean of its own; the means are themselves normally
spread, which gives a hot/cold skew of the kind measured in trained models (the hottest 40 % of the neurons carry 80 %
of the activations at 10 % activity). Pure functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from runtime.errors import UserError

SKEW = 0.7  # spread of the neurons' means, in standard deviations of a pre-activation
_ALWAYS = 5.0  # the mean of a neuron that always fires
_NORMAL = NormalDist()

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Firing:
    """Per neuron, hottest first, float64 [n_ff]: the mean of its pre-activation, and how often that is positive."""

    means: Floats
    frequencies: Floats

    @property
    def outputs(self) -> Floats:
        """Expected relu(pre-activation) of each neuron."""
        return self.means * self.frequencies + _densities(self.means)

    @property
    def energies(self) -> Floats:
        """Expected square of relu(pre-activation) of each neuron."""
        return (self.means**2 + 1) * self.frequencies + self.means * _densities(self.means)

    @property
    def square_energies(self) -> Floats:
        """Expected square of relu(pre-activation)^2 of each neuron."""
        m = self.means
        return (m**4 + 6 * m**2 + 3) * self.frequencies + (m**3 + 5 * m) * _densities(m)


def plan_firing(n_ff: int, active: float) -> Firing:
    """Neurons of which the share `active` (0 to 1, exclusive of 0) fires on average.

    Raises UserError out of that range.
    """
    if not 0 < active <= 1:
        raise UserError(f"--active: {active}, expected more than 0 and at most 1")
    if active == 1:
        means = np.full(n_ff, _ALWAYS)
    else:
        # The share of positive values of a normal variable whose mean is normal too has this closed form.
        centre = _NORMAL.inv_cdf(active) * math.sqrt(1 + SKEW**2)
        means = np.array([centre + SKEW * _NORMAL.inv_cdf(1 - (i + 0.5) / n_ff) for i in range(n_ff)])
    return Firing(means, np.array([_NORMAL.cdf(mean) for mean in means]))


def _densities(values: Floats) -> Floats:
    """Density of the standard normal distribution."""
    return np.asarray(np.exp(-(values**2) / 2) / math.sqrt(2 * math.pi))
