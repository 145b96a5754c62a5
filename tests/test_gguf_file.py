"""Reading files that cannot be trusted: every damage is one clear error, never a crash or a wrong answer."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import runtime
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile
from runtime.model_file.structure import Structure
from runtime.model_file.tensor_shapes import required_tensors

SMALL = Structure(
    source_architecture="test", vocab_size=64, context_length=32, embedding_length=32, block_count=2, feed_forward_length=64, head_count=2, head_count_kv=1, head_length=16,
    norm="rms", norm_epsilon=2.0**-17, position="rope_neox", ffn_gate="gated", ffn_activation="relu", rope_dimension_count=16,
)  # fmt: skip


def write(
    path: Path,
    metadata: dict[str, Any] | None = None,
    drop: str = "",
    reshape: str = "",
    retype: str = "",
    architecture: str = "lazyneuron",
) -> Path:
    """A whole small model without a tokenizer; `drop` leaves a tensor out, `reshape` makes one a row shorter, `retype` makes one of integers."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_custom_alignment(64)
    adders = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }
    for key, value in (SMALL.to_metadata() | (metadata or {})).items():
        if value is not None:
            adders[type(value)](key, value)
    for name, ne in required_tensors(SMALL).items():
        if name != drop:
            shape = (*ne[::-1],) if name != reshape else (ne[-1] - 1, *ne[:-1][::-1])
            writer.add_tensor(name, rng.normal(0, 0.1, shape).astype(np.int32 if name == retype else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def error_of(path: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        runtime.load(path)
    assert "\n" not in caught.value.message
    assert path.name in caught.value.message
    return caught.value


def test_what_was_written_is_read(tmp_path: Path) -> None:
    with GgufFile(write(tmp_path / "m.gguf")) as file:
        assert file.structure == SMALL
        rng = np.random.default_rng(0)
        expected = rng.normal(0, 0.1, (64, 32)).astype(np.float32)
        assert np.array_equal(file.read("token_embd.weight").view(np.float32).reshape(64, 32), expected)
        info = file.tensors["blk.1.ffn_down.weight"]
        assert (info.type, info.ne, info.offset % 64) == ("f32", (64, 32), 0)


def test_another_magic(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    path.write_bytes(b"ABCD" + path.read_bytes()[4:])
    with GgufFile(path, b"ABCD") as file:
        assert file.structure == SMALL
        expected = np.random.default_rng(0).normal(0, 0.1, (64, 32)).astype(np.float32)
        assert np.array_equal(file.read("token_embd.weight").view(np.float32).reshape(64, 32), expected)
    with pytest.raises(UserError, match="expected a GGUF file"):
        GgufFile(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "expected a GGUF file"), (b"GGUF", "damaged"), (b"PWRI" + bytes(64), "PowerInfer"), (b"\x80\x02}q\x00" * 9, "expected a GGUF file"), (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1), "damaged"), (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "damaged")],
)  # fmt: skip
def test_not_a_gguf_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert message in error_of(path).message


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    assert "is a folder" in error_of(tmp_path).message
    with pytest.raises(OSError, match="No such file"):
        runtime.load(tmp_path / "none.gguf")


def test_truncation_anywhere(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "m.gguf"
    for cut in [*range(4, 3000, 97), *np.linspace(3000, len(whole) - 1, 30).astype(int)]:
        path.write_bytes(whole[:cut])
        assert error_of(path).hint


BAD_METADATA: list[tuple[dict[str, Any], str]] = [
    ({"lazyneuron.schema_version": 4}, "schema version 4, expected 1 to 3"),
    (
        {"lazyneuron.predictor.kind": "lowrank", "lazyneuron.predictor.rank": [8.0, math.inf]},
        "`lazyneuron.predictor.rank` is array([ 8., inf], dtype=float32), expected one int per block",
    ),
    ({"lazyneuron.schema_version": [1, 2]}, "schema version [1 2], expected 1 to 3"),
    ({"lazyneuron.rope.freq_base": math.inf}, "`lazyneuron.rope.freq_base` is inf, expected finite numbers"),
    ({"lazyneuron.embedding_scale": math.nan}, "`lazyneuron.embedding_scale` is nan, expected finite numbers"),
    (
        {"lazyneuron.norm": "a\x1b]0;b\x07\n c\u202e"},
        "`lazyneuron.norm` is `a\ufffd]0;b\ufffd c\ufffd`, expected one of rms, layer",
    ),
    ({"lazyneuron.norm": "batch"}, "`lazyneuron.norm` is `batch`, expected one of rms, layer"),
    ({"lazyneuron.ffn.activation": "silu"}, "expected one of relu"),
    ({"lazyneuron.block_count": 0}, "block_count is 0"),
    ({"lazyneuron.block_count": 3}, "10 tensors missing, the first is `blk.2.attn_norm.weight`"),
    ({"lazyneuron.block_count": 1 << 31}, "expected 1 to"),
    ({"lazyneuron.embedding_length": 33}, "shape"),
    ({"lazyneuron.vocab_size": "many"}, "expected int"),
    ({"lazyneuron.attention.head_count": 3, "lazyneuron.attention.head_count_kv": 2}, "3 heads"),
    ({"lazyneuron.rope.dimension_count": 18}, "rope.dimension_count is 18"),
    ({"lazyneuron.norm_epsilon": 0.0}, "norm_epsilon"),
    ({"lazyneuron.position": None}, "no key `lazyneuron.position`"),
    (
        {"lazyneuron.predictor.recall": 5},
        "`lazyneuron.predictor.recall` is 5, expected 2 numbers from 0 to 1, one per block",
    ),
    ({"lazyneuron.predictor.precision": [0.5]}, "is [0.5], expected 2 numbers"),
    ({"lazyneuron.predictor.predicted_share": [0.5, 1e30]}, "expected 2 numbers from 0 to 1"),
    ({"lazyneuron.predictor.energy_kept": [0.5, math.nan]}, "expected 2 numbers from 0 to 1"),
    ({"lazyneuron.predictor.type": ["q8_0", "x" * 200, "f16"]}, "x..., expected 2 names, one per block"),
    ({"lazyneuron.predictor.energy": "all"}, "`lazyneuron.predictor.energy` is 'all', expected a number from 0 to 1"),
    (
        {"lazyneuron.calibration.tokens": "many"},
        "`lazyneuron.calibration.tokens` is 'many', expected a number of tokens",
    ),
    ({"lazyneuron.calibration.corpus": 3}, "`lazyneuron.calibration.corpus` is 3, expected a text"),
]


@pytest.mark.parametrize(("metadata", "message"), BAD_METADATA)
def test_inconsistent_descriptions(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    assert message in error_of(write(tmp_path / "m.gguf", metadata)).message


def test_a_message_is_short_whatever_it_quotes(tmp_path: Path) -> None:
    error = error_of(write(tmp_path / "m.gguf", {"lazyneuron.norm": "x" * 100_000}))
    assert len(error.message) < 1100
    assert error.message.endswith("expected one of rms, layer")


def test_another_architecture(tmp_path: Path) -> None:
    error = error_of(write(tmp_path / "m.gguf", architecture="llama"))
    assert "general.architecture is `llama`, expected `lazyneuron`" in error.message
    assert "python -m convert" in error.hint


def test_missing_and_misshapen_tensors(tmp_path: Path) -> None:
    assert (
        "1 tensors missing, the first is `blk.1.attn_k.weight`"
        in error_of(write(tmp_path / "a.gguf", drop="blk.1.attn_k.weight")).message
    )
    assert (
        "`blk.0.ffn_gate.weight` has type i32, expected a float"
        in error_of(write(tmp_path / "c.gguf", retype="blk.0.ffn_gate.weight")).message
    )
    assert (
        "`output_norm.weight` has type i32, expected f32"
        in error_of(write(tmp_path / "d.gguf", retype="output_norm.weight")).message
    )
    assert (
        "`blk.0.ffn_up.weight` has shape [32, 63], expected [32, 64]"
        in error_of(write(tmp_path / "b.gguf", reshape="blk.0.ffn_up.weight")).message
    )


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    assert "tokenizer" in error_of(write(tmp_path / "m.gguf")).message


FUZZ = """
import random, sys
from pathlib import Path
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile
whole, path, rng = bytearray(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]), random.Random(int(sys.argv[3]))
opened = 0
for _ in range(400):
    damaged = bytearray(whole)
    for _ in range(rng.choice([1, 1, 2, 8])):
        damaged[rng.randrange(4, 4000)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    path.write_bytes(damaged)
    try:
        with GgufFile(path) as file:
            file.structure
            opened += 1
    except UserError as error:
        assert error.message.count(chr(10)) == 0
print(opened)
"""


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_in_the_header_never_crash(tmp_path: Path, seed: int) -> None:
    whole = write(tmp_path / "whole.gguf")
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, whole, tmp_path / "m.gguf", str(seed)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 400  # some damage was noticed
