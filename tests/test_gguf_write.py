"""The one writer of GGUF files: whole or not at all, and keys and tensors of another file byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from runtime.bindings import ggml
from runtime.model_file.reader import GgufFile
from runtime.model_file.writer import ALIGNMENT, Key, NewTensor, copied, copied_keys, write_gguf

DATA = np.arange(12, dtype=np.float32)


def stream(name: str = "a", error: BaseException | None = None) -> NewTensor:
    def pieces() -> Iterator[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
        yield DATA[:5].view(np.uint8)
        if error is not None:
            raise error
        yield DATA[5:].view(np.uint8)

    return NewTensor(name, (4, 3), ggml.F32, DATA.nbytes, pieces())


def test_values_and_bytes(tmp_path: Path) -> None:
    values = {"t.bool": True, "t.int": 7, "t.float": 0.5, "t.text": "häß", "t.ints": [1, -2], "t.texts": ["a", ""]}
    size = write_gguf(tmp_path / "x.gguf", values | {"t.empty": []}, [stream("a"), stream("b")], "other")
    assert size == (tmp_path / "x.gguf").stat().st_size
    with GgufFile(tmp_path / "x.gguf") as file:
        assert file.metadata["general.architecture"] == "other"
        assert {key: list(v) if key.endswith("s") else v for key, v in file.metadata.items() if key in values} == values
        assert "t.empty" not in file.metadata
        for info in file.tensors.values():
            assert (info.ne, info.offset % ALIGNMENT) == ((4, 3), 0)
            assert file.read(info.name).tobytes() == DATA.tobytes()


@pytest.mark.parametrize(
    "value",
    [
        0,
        (1 << 32) - 1,
        -1,
        1 << 32,
        (1 << 64) - 1,
        [-(1 << 31), 1],
        [1 << 31],
        [-1, 1 << 40],
        [1 << 63],
        1e300,
        [0.5, -1e39],
    ],
)
def test_numbers_of_any_size(tmp_path: Path, value: float | list[float]) -> None:
    write_gguf(tmp_path / "x.gguf", {"t.value": value}, [stream()])
    with GgufFile(tmp_path / "x.gguf") as file:
        assert np.array_equal(file.metadata["t.value"], value)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), ValueError("no"), OSError(28, "No space")])
@pytest.mark.parametrize("existing", [None, b"an older file"])
def test_what_fails_leaves_nothing(tmp_path: Path, error: BaseException, existing: bytes | None) -> None:
    out = tmp_path / "x.gguf"
    if existing:
        out.write_bytes(existing)
    with pytest.raises(type(error)) as caught:
        write_gguf(out, {}, [stream(), stream("b", error)])
    if isinstance(caught.value, OSError):
        assert caught.value.filename == str(out)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([existing] if existing else [])


def test_a_wrong_number_of_bytes_is_noticed(tmp_path: Path) -> None:
    short = NewTensor("a", (4, 3), ggml.F32, DATA.nbytes, (DATA[:5].view(np.uint8),))
    with pytest.raises(AssertionError, match="a: 20 bytes written, 48 announced"):
        write_gguf(tmp_path / "x.gguf", {}, [short])
    assert not any(tmp_path.iterdir())


def test_copies_are_exact(tmp_path: Path) -> None:
    """Types of numbers and strings that are no UTF-8 included."""
    source, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    writer = GGUFWriter(source, "first")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"):
        getattr(writer, f"add_{kind}")(f"t.{kind}", 3)
    writer.add_bool("t.bool", False)
    writer.add_key_value("t.raw", b"\xff\xfe", GGUFValueType.STRING)
    writer.add_key_value("t.raws", [b"\x80", b"a", b""], GGUFValueType.ARRAY, GGUFValueType.STRING)
    writer.add_key_value("t.bytes", [1, 2], GGUFValueType.ARRAY, GGUFValueType.UINT8)
    writer.add_key_value("t.floats", [0.1, 1e30], GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
    writer.add_tensor("a", DATA.reshape(3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile(source) as file:
        write_gguf(out, copied_keys(source) | {"t.bool": True}, [copied(file, "a"), copied(file, "a", "b")])
    before, after = (GGUFReader(path).fields for path in (source, out))
    for name in (name for name in before if name.startswith("t.") and name != "t.bool"):
        assert b"".join(map(bytes, before[name].parts)) == b"".join(map(bytes, after[name].parts)), name
    assert copied_keys(out)["t.bool"] == Key(True, GGUFValueType.BOOL)
    with GgufFile(out) as file:
        assert file.metadata["general.architecture"] == "lazyneuron"
        assert [file.read(name).tobytes() for name in ("a", "b")] == [DATA.tobytes()] * 2
