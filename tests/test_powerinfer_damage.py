"""PowerInfer's model files that are damaged, incomplete or of another kind, and options that say nothing to them: one clear line each, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import VOCAB_SIZE
from plain import convert
from powerinfer_files import F16, Q4_0, file_bytes, parts

from runtime.errors import UserError

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def whole(checkpoint: Folder, tiny_gguf: Path) -> bytes:
    """A file without fault."""
    return file_bytes(*parts(checkpoint("llama-gqa"), Q4_0, tiny_gguf))


def refused(data: bytes, complaint: str, tmp_path: Path, **options: Any) -> None:
    source = tmp_path / "old.powerinfer.gguf"
    source.write_bytes(data)
    with pytest.raises(UserError) as error:
        convert(source, tmp_path / "new.gguf", **options)
    assert complaint in error.value.message
    assert "\n" not in error.value.message
    assert sorted(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    "name", ["blk.1.fc1.weight", "blk.0.fc2.weight", "blk.1.ffn_down_t.weight", "output.weight", "token_embd.weight"]
)
def test_a_missing_tensor(checkpoint: Folder, tiny_gguf: Path, tmp_path: Path, name: str) -> None:
    keys, tensors = parts(checkpoint("llama-gqa"), Q4_0, tiny_gguf)
    del tensors[name]
    complaint = f"`{name}` missing" if name == "token_embd.weight" else f"1 tensors missing ({name})"
    refused(file_bytes(keys, tensors), complaint, tmp_path)


WRONG_KEYS: list[tuple[dict[str, Any], str]] = [
    ({"general.architecture": "generic.gpu_index"}, "general.architecture is `generic.gpu_index`, expected one of"),
    ({"general.architecture": "falcon"}, "no `context_length`"),
    ({"general.quantization_version": 1}, "quantization version 1, expected 2"),
    ({"llama.block_count": 3}, "tensors missing (blk.2.fc1.weight)"),
    ({"llama.block_count": 1}, "tensors unknown (blk.1.attn_k.weight"),
    ({"llama.feed_forward_length": 320}, "has shape [32, 256], expected [32, 320]"),
    ({"llama.attention.head_count_kv": 4}, "has shape [32, 16], expected [32, 32]"),
    ({"llama.attention.head_count": 5}, "embedding_length 32 is not a multiple of the 5 heads"),
    ({"llama.rope.scaling.type": "yarn"}, "rope scaling `yarn`, expected none or linear"),
    ({"llama.context_length": "many"}, '`context_length` is "many", expected an integer'),
    ({"tokenizer.ggml.tokens": ["a"] * (VOCAB_SIZE + 1)}, f"{VOCAB_SIZE + 1} tokens, expected 1 to {VOCAB_SIZE}"),
]


@pytest.mark.parametrize(("changes", "complaint"), WRONG_KEYS)
def test_wrong_keys(
    checkpoint: Folder, tiny_gguf: Path, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    keys, tensors = parts(checkpoint("llama-gqa"), F16, tiny_gguf)
    refused(file_bytes(keys | changes, tensors), complaint, tmp_path)


def test_a_missing_key_and_an_unknown_tensor(checkpoint: Folder, tiny_gguf: Path, tmp_path: Path) -> None:
    keys, tensors = parts(checkpoint("llama-gqa"), F16, tiny_gguf)
    refused(
        file_bytes(keys, tensors | {"blk.0.fc3.weight": (np.zeros((2, 2)), F16)}),
        "tensors unknown (blk.0.fc3",
        tmp_path,
    )
    norm = {"blk.1.ffn_norm.weight": (np.ones(32), F16)}
    refused(file_bytes(keys, tensors | norm), "`blk.1.ffn_norm.weight` has type f16, expected f32", tmp_path)
    del keys["llama.attention.layer_norm_rms_epsilon"]
    refused(file_bytes(keys, tensors), "no `attention.layer_norm_rms_epsilon`", tmp_path)


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.99999])
def test_a_file_that_is_cut_off(whole: bytes, tmp_path: Path, share: float) -> None:
    data = whole
    refused(data[: int(share * len(data))], "old.powerinfer.gguf`: ", tmp_path)


def test_other_magics_and_versions(whole: bytes, tmp_path: Path) -> None:
    data = whole
    refused(b"GGML" + data[4:], "starts with b'GGML', expected a PWRI file", tmp_path)
    refused(b"GGUF" + data[4:], "a GGUF file, expected a checkpoint folder", tmp_path)
    refused(data[:4] + b"\x63\0\0\0" + data[8:], "damaged", tmp_path)
    refused(b"", "starts with b''", tmp_path)


@pytest.mark.parametrize(
    "option", [{"type": "q8_0"}, {"output_type": "f16"}, {"predictor": "lowrank"}, {"energy": 0.9}]
)
def test_options_that_do_not_apply(whole: bytes, tmp_path: Path, option: dict[str, Any]) -> None:
    name = next(iter(option)).replace("_", "-")
    refused(whole, f"--{name}: does not apply to a PowerInfer file", tmp_path, **option)


@pytest.mark.parametrize("ffn_type", ["silu", "fatrelu", "fatrelu:much"])
def test_other_activations(whole: bytes, tmp_path: Path, ffn_type: str) -> None:
    refused(whole, "--ffn-type", tmp_path, ffn_type=ffn_type)
