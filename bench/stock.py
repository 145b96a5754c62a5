"""A stock GGUF with the shapes and weights of one of our files, so that llama.cpp can be measured on the same bytes.

llama.cpp computes SiLU where a gated model has ReLU (arch `llama`), and ReLU squared in the arch that stands in for
ungated ones (`nemotron`: LayerNorm and biases as OPT has them, rotary positions instead of learned ones): the text it
writes means nothing, the work is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from runtime.errors import UserError
from runtime.model_file.reader import GgufFile
from runtime.model_file.structure import Structure
from runtime.model_file.writer import NewTensor, copied, copied_keys, write_gguf

_OURS = (".ffn_down_t.", ".ffn_neuron_", ".predictor_", "position_embd.")


def write(source: Path, target: Path) -> None:
    """Write the stock twin of a model; UserError for a structure that llama.cpp has no counterpart of."""
    with GgufFile(source) as file:
        s = file.structure
        arch = architecture(s, f"`{file.path}`")
        name = f"{file.metadata.get('general.name', '')} (twin for llama.cpp, its text means nothing)"
        tokenizer = {key: value for key, value in copied_keys(source).items() if key.startswith("tokenizer.")}
        keys = {f"{arch}.{key}": value for key, value in _keys(s).items()}
        write_gguf(target, {"general.name": name, **keys, **tokenizer}, list(_streams(file, s)), arch)


def architecture(s: Structure, where: str) -> str:
    """llama.cpp's architecture with the same matrices."""
    gated = s.ffn_gate == "gated"
    same = (
        len(set(s.blocks)) == 1
        and s.layout == "both"
        and s.norm_placement == "pre"
        and s.output_norm
        and not s.projected
    )
    if same and gated and s.norm == "rms" and s.position.startswith("rope"):
        return "llama"
    if same and not gated and s.norm == "layer":
        return "nemotron"
    raise UserError(
        f"{where}: no stock counterpart in llama.cpp for this structure",
        "measure a gated RMSNorm model or an ungated LayerNorm one, of layout `both`",
    )


def _streams(file: GgufFile, s: Structure) -> Iterator[NewTensor]:
    for name in file.tensors:
        if not any(part in name for part in _OURS):
            yield copied(file, name)
    if s.tied_output and s.ffn_gate == "none":  # nemotron has a head of its own
        yield copied(file, "token_embd.weight", "output.weight")


def _keys(s: Structure) -> dict[str, int | float]:
    a = s.attentions[0]
    epsilon = "rms_epsilon" if s.norm == "rms" else "epsilon"
    return {
        "vocab_size": s.vocab_size,
        "context_length": s.context_length,
        "embedding_length": s.embedding_length,
        "block_count": s.block_count,
        "feed_forward_length": s.ffns[0].n_ff,
        "attention.head_count": a.head_count,
        "attention.head_count_kv": a.head_count_kv,
        "attention.key_length": a.head_length,
        "attention.value_length": a.head_length,
        f"attention.layer_norm_{epsilon}": s.norm_epsilon,
        "rope.dimension_count": a.rope or a.head_length,
        "rope.freq_base": s.rope_freq_base,
    }
