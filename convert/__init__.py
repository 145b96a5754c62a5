"""Checkpoint to GGUF: turns a Hugging Face ReLU checkpoint into one file that `runtime` can run.

from convert import convert
convert("SparseLLM/ReluLLaMA-7B", "relullama-7b.gguf", type="q8_0")
"""

from typing import TYPE_CHECKING

from runtime.base.lazy import lazy_names

if TYPE_CHECKING:
    from convert.job import Report, convert

__all__ = ["Report", "convert"]

__getattr__ = lazy_names(__name__, dict.fromkeys(__all__, "convert.job"))
