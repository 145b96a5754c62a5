"""Checkpoint to GGUF: turns a Hugging Face ReLU checkpoint into one file that `runtime` can run.

    from convert import convert
    convert("SparseLLM/ReluLLaMA-7B", "relullama-7b.gguf", type="q8_0")

Knows nothing of graphs or kernels.
"""

from convert.job import Report, convert

__all__ = ["Report", "convert"]
