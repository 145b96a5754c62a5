"""A stock GGUF with the shapes and weights of one of our files, so that llama.cpp can be measured on the same bytes.

llama.cpp computes SiLU where the model has ReLU: the text it writes means nothing, the work is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from runtime.errors import UserError
from runtime.gguf_file import GgufFile
from runtime.structure import Structure


def write(source: Path, target: Path) -> None:
    """Write the stock twin of a gated RMSNorm model; UserError for a shape that llama.cpp has no counterpart of."""
    with GgufFile(source) as file:
        s = file.structure
        if not (s.gated and s.norm == "rms" and s.position.startswith("rope") and s.layout == "both"):
            raise UserError(
                f"`{source}`: no stock counterpart in llama.cpp for this structure", "measure a gated RMSNorm model"
            )
        writer = gguf.GGUFWriter(target, "llama")
        for key, value in _keys(s).items():
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{key}", value)
        _copy_tokenizer(writer, file.metadata)
        for name, info in file.tensors.items():
            if _stock_tensor(name):
                writer.add_tensor(name, _rows(file, name), raw_dtype=gguf.GGMLQuantizationType(info.type_id))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _stock_tensor(name: str) -> bool:
    return not any(part in name for part in (".ffn_down_t.", ".ffn_neuron_", ".predictor_"))


def _keys(s: Structure) -> dict[str, int | float]:
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
        "attention.layer_norm_rms_epsilon": s.norm_epsilon,
        "rope.dimension_count": s.rope_dimension_count,
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


def _rows(file: GgufFile, name: str) -> np.ndarray[Any, Any]:
    info = file.tensors[name]
    shape = info.ne[::-1]
    return (
        file.read(name).view({"f32": np.float32, "f16": np.float16}.get(info.type, np.uint8)).reshape(*shape[:-1], -1)
    )
