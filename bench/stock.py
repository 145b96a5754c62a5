"""A stock GGUF with the shapes and weights of one of our files, so that llama.cpp can be measured on the same bytes.

llama.cpp computes SiLU where a gated model has ReLU (arch `llama`), and ReLU squared in the arch that stands in for ungated ones (`nemotron`: LayerNorm and
biases as OPT has them, rotary positions instead of learned ones): the text it writes means nothing, the work is the same. Copied in pieces.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from convert.write import Stream
from runtime.errors import UserError
from runtime.gguf_file import GgufFile, TensorInfo
from runtime.structure import Structure

_PIECE = 1 << 24  # bytes copied at a time
_OURS = (".ffn_down_t.", ".ffn_neuron_", ".predictor_", "position_embd.")


def write(source: Path, target: Path) -> None:
    """Write the stock twin of a model; UserError for a structure that llama.cpp has no counterpart of."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with GgufFile(source) as file:
            _write(file, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def architecture(s: Structure, where: str) -> str:
    """llama.cpp's architecture with the same matrices."""
    same = s.layout == "both" and s.norm_placement == "pre" and s.output_norm and not s.projected
    if same and s.gated and s.norm == "rms" and s.position.startswith("rope"):
        return "llama"
    if same and not s.gated and s.norm == "layer":
        return "nemotron"
    raise UserError(
        f"{where}: no stock counterpart in llama.cpp for this structure",
        "measure a gated RMSNorm model or an ungated LayerNorm one, of layout `both`",
    )


def _write(file: GgufFile, target: Path) -> None:
    s = file.structure
    arch = architecture(s, f"`{file.path}`")
    writer = gguf.GGUFWriter(target, arch)
    writer.add_name(f"{file.metadata.get('general.name', '')} (twin for llama.cpp, its text means nothing)")
    for key, value in _keys(s).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{arch}.{key}", value)
    _copy_tokenizer(writer, file.metadata)
    streams = list(_streams(file, s))
    for stream in streams:
        kind = gguf.GGMLQuantizationType(stream.type)
        writer.add_tensor_info(stream.name, stream.shape[::-1], np.dtype(np.float32), stream.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for stream in streams:
        writer.write_tensor_data(stream)
    writer.close()


def _streams(file: GgufFile, s: Structure) -> Iterator[Stream]:
    for name, info in file.tensors.items():
        if not any(part in name for part in _OURS):
            yield Stream(name, info.ne, info.type_id, info.nbytes, _copied(file, info))
    if s.tied_output and not s.gated:  # nemotron has a head of its own
        info = file.tensors["token_embd.weight"]
        yield Stream("output.weight", info.ne, info.type_id, info.nbytes, _copied(file, info))


def _copied(file: GgufFile, info: TensorInfo) -> Iterator[npt.NDArray[np.uint8]]:
    with file.path.open("rb") as source:
        source.seek(info.offset)
        for at in range(0, info.nbytes, _PIECE):
            yield np.frombuffer(source.read(min(_PIECE, info.nbytes - at)), np.uint8)


def _keys(s: Structure) -> dict[str, int | float]:
    epsilon = "rms_epsilon" if s.norm == "rms" else "epsilon"
    return {
        "vocab_size": s.vocab_size,
        "context_length": s.context_length,
        "embedding_length": s.embedding_length,
        "block_count": s.block_count,
        "feed_forward_length": s.feed_forward_length,
        "attention.head_count": s.head_count,
        "attention.head_count_kv": s.head_count_kv,
        "attention.key_length": s.head_length,
        "attention.value_length": s.head_length,
        f"attention.layer_norm_{epsilon}": s.norm_epsilon,
        "rope.dimension_count": s.rope_dimension_count or s.head_length,
        "rope.freq_base": s.rope_freq_base,
    }


def _copy_tokenizer(writer: gguf.GGUFWriter, metadata: dict[str, Any]) -> None:
    for key, value in metadata.items():
        if not key.startswith("tokenizer."):
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value if isinstance(value, list) else value.tolist())
