"""Blocks run one by one give what the whole model gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import random_ids, relative
from transformers import AutoModelForCausalLM

from runtime.block_runner import BlockRunner
from runtime.model_file.reader import GgufFile

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("name", ["bundled", "llama-gqa", "opt-pre-norm", "opt-post-norm"])
def test_hidden_states_equal_transformers(
    checkpoint: Callable[[str], Path], converted: Callable[..., Path], name: str
) -> None:
    ids = random_ids(70, 4000)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32)
    with torch.no_grad():
        states = [h[0].numpy() for h in model(torch.tensor([ids]), output_hidden_states=True).hidden_states]
    with BlockRunner(GgufFile(converted(name)), threads=2, max_tokens=128) as runner:
        hidden = runner.embed(np.array(ids, np.int32))
        assert relative(states[0], hidden) < 1e-5
        for i in range(runner.structure.block_count - 1):  # transformers puts the last one through the output norm
            hidden = runner.block(i, hidden).output
            assert relative(states[i + 1], hidden) < 1e-4


def test_taps_and_rows(converted: Callable[..., Path]) -> None:
    """The FFN's input, put through the dequantised rows in numpy, gives the block's output."""
    with BlockRunner(GgufFile(converted("bundled")), threads=2, max_tokens=64) as runner:
        hidden = runner.embed(np.array(random_ids(40, 4000), np.int32))
        result = runner.block(0, hidden)
        gate, up, down = (runner.rows(f"blk.0.ffn_{n}.weight", 0, 1024) for n in ("gate", "up", "down_t"))
        h = np.maximum(result.ffn_input @ gate.T, 0) * (result.ffn_input @ up.T)
        assert relative(result.output - result.residual, h @ down) < 1e-4
        assert runner.vector("blk.0.ffn_up.bias") is None
        norm = runner.vector("blk.0.ffn_norm.weight")
        assert norm is not None
        scaled = result.residual / np.sqrt((result.residual**2).mean(-1, keepdims=True) + 1e-5) * norm
        assert relative(result.ffn_input, scaled) < 1e-5
