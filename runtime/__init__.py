"""GGUF to tokens: runs ReLU-family language models on unmodified ggml, skipping the neurons that are zero.

    import runtime
    with runtime.load("model.gguf") as model:
        for piece in model.generate("Once upon a time", max_tokens=64):
            print(piece, end="", flush=True)

Knows nothing of checkpoints, families or how a file was made: everything is read from the file's own description.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.base.lazy import lazy_names

if TYPE_CHECKING:
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

__getattr__ = lazy_names(
    __name__,
    {
        "UserError": "runtime.errors",
        **dict.fromkeys(("Generation", "LogitsProcessor", "Stats", "Token"), "runtime.generation"),
        **dict.fromkeys(("Model", "ModelStats", "load"), "runtime.model"),
        "Sampling": "runtime.text.sampling",
    },
)
