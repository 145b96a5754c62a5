"""Models in several files: written as llama.cpp splits them, read as one, and every mix-up named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

import runtime
from convert import convert
from convert.__main__ import main as convert_main
from predictors.replace_predictors import replace_predictors
from runtime.__main__ import main as runtime_main
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile
from runtime.model_file.shard_writer import shard_size, split_model
from runtime.model_file.writer import copied, copied_keys, write_files
from runtime.text.tokenizer import Tokenizer

Converted = Callable[..., Path]
IDS = [int(i) for i in np.random.default_rng(5).integers(3, 4000, 40)]


@pytest.fixture(scope="module")
def shards(fitted_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The bundled model with predictors, in five files."""
    folder = tmp_path_factory.mktemp("shards")
    return split(fitted_gguf, folder / "tiny.gguf", 5)


def split(source: Path, out: Path, n: int) -> list[Path]:
    with GgufFile(source) as file:
        streams = [copied(file, name) for name in file.tensors]
        total = sum(stream.nbytes for stream in streams)
        largest = max(stream.nbytes for stream in streams)
        sizes = range(max(largest, total // n), total, max(1, total // 500))
        files = next(f for size in sizes if len(f := split_model(out, copied_keys(source), streams, size)) == n)
        write_files(files)
    return [file.path for file in files]


def logits(path: Path, ffn: str) -> np.ndarray:
    with runtime.load(path, ffn=ffn, threads=2) as model:
        return model.logits(IDS)


@pytest.mark.parametrize("ffn", ["dense", "exact", "predicted"])
def test_five_shards_give_the_logits_of_the_whole(fitted_gguf: Path, shards: list[Path], ffn: str) -> None:
    assert [path.name for path in shards] == [f"tiny-{i:05}-of-00005.gguf" for i in range(1, 6)]
    assert np.array_equal(logits(fitted_gguf, ffn), logits(shards[0], ffn))


def test_keys_are_llama_cpps(fitted_gguf: Path, shards: list[Path]) -> None:
    """Read by the gguf package, and by libllama's own loader of split files."""
    whole = GGUFReader(fitted_gguf)
    for i, path in enumerate(shards):
        fields = GGUFReader(path).fields
        found = [
            (fields[f"split.{key}"].contents(), fields[f"split.{key}"].types)
            for key in ("no", "count", "tensors.count")
        ]
        u16, i32 = [GGUFValueType.UINT16], [GGUFValueType.INT32]
        assert found == [(i, u16), (5, u16), (len(whole.tensors), i32)]
    first = GGUFReader(shards[0]).fields
    assert {key for key in whole.fields if not key.startswith("GGUF.")} <= set(first)
    with Tokenizer(shards[0]) as tokenizer, Tokenizer(fitted_gguf) as other:
        assert tokenizer.encode("The people of the Union") == other.encode("The people of the Union")


def test_files_split_by_the_gguf_package_are_read(converted: Converted, tmp_path: Path) -> None:
    source = converted("llama-gqa", "f32")
    reader = GGUFReader(source)
    writer = GGUFWriter(tmp_path / "m.gguf", "lazyneuron", split_max_tensors=7)
    for key, value in copied_keys(source).items():
        writer.add_key_value(key, value.value, value.type, value.items)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = min(tmp_path.iterdir())
    assert first.name == f"m-00001-of-{len(list(tmp_path.iterdir())):05}.gguf"
    assert np.array_equal(logits(source, "exact"), logits(first, "exact"))


def test_conversion_writes_shards(
    checkpoint: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = str(checkpoint("llama-gqa")), tmp_path / "m.gguf"
    command = [source, str(out), "--type", "f32", "--calibration", "none", "--split-max-size", "600K", "--json"]
    assert convert_main(command) == 0
    printed = capfd.readouterr()
    report = json.loads(printed.out)
    files = sorted(tmp_path.iterdir())
    assert report["files"] == [str(file) for file in files]
    assert report["bytes"] == sum(file.stat().st_size for file in files)
    assert f"{len(files)} shards" in printed.err
    assert len(files) > 2
    convert(source, tmp_path / "whole.gguf", type="f32", calibration="none")
    assert np.array_equal(logits(tmp_path / "whole.gguf", "exact"), logits(files[0], "exact"))
    for file in files:
        assert sum(t.n_bytes for t in GGUFReader(file).tensors) <= 600_000

    assert convert_main(command) == 1
    assert "exists already" in capfd.readouterr().err
    assert convert_main([*command, "--force"]) == 0
    assert sorted(tmp_path.glob("m*")) == files


def test_a_model_that_fits_is_one_file(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    report = convert(checkpoint("llama-gqa"), tmp_path / "m.gguf", calibration="none", split_max_size="1G")
    assert report.files == [str(tmp_path / "m.gguf")]
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert "split.count" not in GGUFReader(tmp_path / "m.gguf").fields


def test_a_tensor_larger_than_a_shard(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--split-max-size 1,000 bytes, expected at least the [\d,]+ of `\w+"):
        convert(checkpoint("llama-gqa"), tmp_path / "m.gguf", calibration="none", split_max_size="1K")
    assert not any(tmp_path.iterdir())


def test_sizes() -> None:
    assert [shard_size(text) for text in (None, "45G", "500m", "2KB")] == [0, 45 * 10**9, 5 * 10**8, 2000]
    for text in ("", "G", "-1"):
        with pytest.raises(UserError, match="expected a size such as 45G"):
            shard_size(text)


def test_every_command_takes_the_first_shard(
    shards: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, text = str(shards[0]), tmp_path / "text.txt"
    text.write_text("We the people of the United States. " * 40)
    for command in (
        ["complete", first, "-p", "We", "-n", "2"],
        ["inspect", first],
        ["perplexity", first, str(text), "--tokens", "64"],
        ["sparsity", first],
        ["plan", first, "--vram-budget", "1", "--device-bandwidth", "500", "--cpu-bandwidth", "50"],
    ):
        assert runtime_main([*command, "--json"]) == 0, capfd.readouterr().err
    report = json.loads(capfd.readouterr().out.splitlines()[1])
    assert report["bytes"] == sum(shard.stat().st_size for shard in shards)


def test_other_predictors_are_written_from_shards(shards: list[Path], fitted_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.gguf"
    with GgufFile(shards[0]) as file:
        replace_predictors(shards[0], out, [() for _ in range(file.structure.block_count)], {})
    written, whole = GGUFReader(out), GGUFReader(fitted_gguf)
    assert not any(key.startswith(("split.", "lazyneuron.split")) for key in written.fields)
    expected = {t.name: t.data.tobytes() for t in whole.tensors if ".predictor_" not in t.name}
    assert {t.name: t.data.tobytes() for t in written.tensors} == expected


# --- mix-ups ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def copies(shards: list[Path], tmp_path: Path) -> list[Path]:
    return [Path(shutil.copy(path, tmp_path)) for path in shards]


def complaint(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        GgufFile(path)
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_missing_shard(copies: list[Path]) -> None:
    copies[2].unlink()
    assert complaint(copies[0]) == f"`{copies[0]}`: shard 3 of 5 is missing: no `tiny-00003-of-00005.gguf` beside it"


def test_swapped_shards(copies: list[Path]) -> None:
    aside = copies[1].with_suffix(".aside")
    copies[1].rename(aside)
    copies[3].rename(copies[1])
    aside.rename(copies[3])
    assert complaint(copies[0]) == f"`{copies[1]}`: holds shard 4 of 5, expected shard 2 of 5"


def test_a_shard_of_another_model(copies: list[Path], converted: Converted, tmp_path: Path) -> None:
    other = split(converted("bundled", "f16"), tmp_path / "other.gguf", 5)
    shutil.copy(other[1], copies[1])
    assert complaint(copies[0]) == f"`{copies[1]}`: a shard of another model"
    shutil.copy(converted("llama-gqa"), copies[1])
    assert complaint(copies[0]) == f"`{copies[1]}`: a model of its own, expected shard 2 of 5"
    shutil.copy(split(converted("bundled", "f16"), tmp_path / "three.gguf", 3)[1], copies[1])
    assert complaint(copies[0]) == f"`{copies[1]}`: holds shard 2 of 3, expected shard 2 of 5"


def test_a_truncated_shard(copies: list[Path]) -> None:
    copies[4].write_bytes(copies[4].read_bytes()[:-100])
    assert f"`{copies[4]}`: tensor " in complaint(copies[0])
    copies[4].write_bytes(b"")
    assert f"`{copies[4]}`: starts with b''" in complaint(copies[0])


def test_not_the_first_shard(copies: list[Path]) -> None:
    with pytest.raises(UserError) as caught:
        GgufFile(copies[3])
    assert caught.value.message == f"`{copies[3]}`: shard 4 of 5"
    assert caught.value.hint == "give the first one: tiny-00001-of-00005.gguf"
    renamed = copies[0].rename(copies[0].with_name("renamed.gguf"))
    assert "the first of 5 shards, expected a name such as NAME-00001-of-00005.gguf" in complaint(renamed)


def test_a_verified_conversion_in_shards(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    report = convert(
        checkpoint("llama-gqa"), tmp_path / "m.gguf", type="f32", calibration="none", split_max_size="600K", verify=True
    )
    assert report.verified
    assert [str(path) for path in sorted(tmp_path.iterdir())] == report.files
    assert np.isfinite(logits(Path(report.files[0]), "exact")).all()
