"""GGUF to tokens: runs ReLU-family language models on unmodified ggml, skipping the neurons that are zero.

    import runtime
    with runtime.load("model.gguf") as model:
        for piece in model.generate("Once upon a time", max_tokens=64):
            print(piece, end="", flush=True)

Knows nothing of checkpoints, families or how a file was made: everything is read from the file's own description.
"""

from __future__ import annotations

from runtime.errors import UserError
from runtime.generation import Generation, LogitsProcessor, Stats, Token
from runtime.model import Model, ModelStats, load
from runtime.text.sampling import Sampling

__all__ = [
    "Generation",
    "LogitsProcessor",
    "Model",
    "ModelStats",
    "Sampling",
    "Stats",
    "Token",
    "UserError",
    "load",
]
