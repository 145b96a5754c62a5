"""The Mamba-2 mixer of --verify's oracle against transformers' NemotronHMamba2Mixer, with one to three groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from convert.verify.mamba2 import Mamba2Weights, mix

N, WIDTH = 40, 48


def mixer(groups: int, heads: int, head: int, state: int, kernel: int) -> Any:
    config = NemotronHConfig(
        hidden_size=WIDTH, layers_block_type=["linear_attention"], n_groups=groups, mamba_num_heads=heads,
        mamba_head_dim=head, ssm_state_size=state, conv_kernel=kernel, chunk_size=16,
    )  # fmt: skip
    made = NemotronHMamba2Mixer(config, layer_idx=0)
    made.time_step_limit = (0.0, float("inf"))  # else prompts are clamped, and single tokens are not
    generator = torch.Generator().manual_seed(groups)
    with torch.no_grad():
        for name, weights in made.named_parameters():
            around = 1 if name.startswith("norm") else 0
            weights.copy_(around + 0.3 * torch.randn(weights.shape, generator=generator))
    return made


def numbers(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    return tensor.detach().numpy()


def taken(made: Any) -> Mamba2Weights:
    return Mamba2Weights(
        numbers(made.conv1d.weight)[:, 0], numbers(made.conv1d.bias), numbers(made.dt_bias), numbers(made.A_log),
        numbers(made.D), numbers(made.norm.weight),
    )  # fmt: skip


@pytest.mark.parametrize(("groups", "heads", "kernel"), [(1, 4, 4), (2, 6, 4), (3, 6, 3)])
def test_it_is_transformers(groups: int, heads: int, kernel: int) -> None:
    made = mixer(groups, heads, 8, 16, kernel)
    x = torch.randn((1, N, WIDTH), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = numbers(made(x)[0])
        projected = numbers(made.in_proj(x)[0])
    mixed = mix(projected, taken(made), groups, 16, 1e-5)
    found = mixed @ numbers(made.out_proj.weight).T
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected).std() > 0.05
