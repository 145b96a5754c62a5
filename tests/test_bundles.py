"""The layout `paged`: what lies where in the file, by the gguf package alone; and files that are copied or damaged."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from in_process import command

import runtime
from bench.make_model import Recipe, write_model
from convert import convert
from predictors.refit import refit
from runtime.errors import UserError
from runtime.model_file.bundles import PAGE, best_stride, pages_touched
from runtime.model_file.reader import GgufFile
from runtime.model_file.writer import NewTensor, copied_keys, write_gguf

Rows = np.ndarray[Any, np.dtype[np.uint8]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module")
def made(fitted_gguf: Path, folder: Path) -> Callable[[str], tuple[Path, Path]]:
    """A model in its usual layout and in bundles: the bundled one (F16), a mixture of experts (Q4_0)."""

    def get(name: str) -> tuple[Path, Path]:
        plain, paged = fitted_gguf, folder / f"{name}-paged.gguf"
        if name == "experts":
            plain = folder / "experts.gguf"
            if not plain.exists():
                write_model(Recipe("tiny-mixtral", 0.2, "q4_0"), plain)
        if not paged.exists():
            convert(plain, paged, layout="paged")
        return plain, paged

    return get


def stored(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(("name", "suffix"), [("bundled", ""), ("experts", "_exps")])
def test_rows_lie_side_by_side(made: Callable[[str], tuple[Path, Path]], name: str, suffix: str) -> None:
    plain, paged = map(stored, made(name))
    for i in range(2):
        matrices = [plain[f"blk.{i}.ffn_{stem}{suffix}.weight"] for stem in ("gate", "up", "down_t")]
        bundles = paged[f"blk.{i}.ffn_neurons{suffix}"]
        assert bundles.data_offset % PAGE == 0
        rows = [np.ascontiguousarray(m.data).view(np.uint8).reshape(math.prod(m.shape[1:]), -1) for m in matrices]
        found = np.ascontiguousarray(bundles.data).view(np.uint8).reshape(len(rows[0]), -1)
        assert list(bundles.shape) == [found.shape[1], *matrices[0].shape[1:]]
        at = 0
        for each in rows:
            assert np.array_equal(found[:, at : at + each.shape[1]], each)
            at += -(-each.shape[1] // 16) * 16
        assert not found[:, at:].any()
        assert not any(name.startswith(f"blk.{i}.ffn_{stem}") for stem in ("gate.", "up", "down") for name in paged)


def test_the_file_says_what_its_bundles_are(made: Callable[[str], tuple[Path, Path]]) -> None:
    keys = {key: field.contents() for key, field in gguf.GGUFReader(made("bundled")[1]).fields.items()}
    assert keys["lazyneuron.layout"] == "paged" and keys["lazyneuron.schema_version"] == 3
    assert set(keys["lazyneuron.bundle.types"]) == {"f16,f16,f16"} and keys["general.alignment"] == PAGE


@pytest.mark.parametrize("length", [64, 528, 1000, 3264, 4096, 6912, 13056, 24576])
def test_the_stride_is_the_best(length: int) -> None:
    found = best_stride(length)
    assert found >= length and found % 64 == 0

    def cost(stride: int) -> float:
        starts = stride * np.arange(4096)  # longer than any period
        return float(np.mean((starts + length - 1) // PAGE - starts // PAGE + 1)) * stride

    assert cost(found) == pytest.approx(min(cost(s) for s in range(-(-length // 64) * 64, length + 2 * PAGE, 64)))
    assert pages_touched(length, found) * found == pytest.approx(cost(found))


def test_a_q4_0_neuron_of_a_7b_model_is_one_read_of_two_pages() -> None:
    assert (best_stride(3 * 2304), pages_touched(3 * 2304, 8192)) == (8192, 2)


# --- files that are written again ----------------------------------------------------------------------------------------


def contents(path: Path) -> dict[str, bytes]:
    with GgufFile(path) as file:
        return {name: file.read(name).tobytes() for name in file.tensors}


def test_there_and_back(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    plain, paged = made("bundled")
    convert(plain, tmp_path / "a.gguf", layout="sparse")
    convert(paged, tmp_path / "b.gguf", layout="sparse")
    assert contents(tmp_path / "a.gguf") == contents(tmp_path / "b.gguf") == contents(paged)
    keys = [{key: value.value for key, value in copied_keys(tmp_path / f"{x}.gguf").items()} for x in "ab"]
    assert keys[0] == keys[1]


def test_what_the_file_lacks_is_not_made_up(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    paged = made("bundled")[1]
    with pytest.raises(UserError, match=r"no ffn_down tensors \(layout `paged`\), which layout `both` has"):
        convert(paged, tmp_path / "x.gguf", layout="both")
    with pytest.raises(UserError, match=r"no ffn_down tensors \(layout `paged`\), which `dense` mode needs"):
        runtime.load(paged, ffn="dense")


def test_a_copy_is_not_calibrated(fitted_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--predictor: does not apply to a file that is converted already"):
        convert(fitted_gguf, tmp_path / "x.gguf", layout="paged", predictor="signbit")


def test_predictors_are_fitted_to_bundles_as_to_matrices(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """From either layout into bundles: the same numbers are calibrated on."""
    plain, paged = made("bundled")
    convert(plain, tmp_path / "sparse.gguf", layout="sparse")
    options: dict[str, Any] = {"layout": "paged", "kind": "signbit", "tokens": 512, "threads": 2}
    for source, name in ((tmp_path / "sparse.gguf", "a"), (paged, "b")):
        refit(source, tmp_path / f"{name}.gguf", **options)
    assert contents(tmp_path / "a.gguf") == contents(tmp_path / "b.gguf")
    assert "blk.0.ffn_neurons" in stored(tmp_path / "a.gguf")


def test_a_conversion_writes_bundles(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    for layout in ("sparse", "paged"):
        convert(checkpoint("llama-mha"), tmp_path / f"{layout}.gguf", layout=layout, calibration="none")
    assert contents(tmp_path / "sparse.gguf") == contents(tmp_path / "paged.gguf")
    assert "blk.0.ffn_neurons" in stored(tmp_path / "paged.gguf")


def test_on_a_device_neurons_stay_on_the_cpu(made: Callable[[str], tuple[Path, Path]]) -> None:
    """As in any file without ffn_down."""
    ids, found = list(range(5, 25)), []
    for path in made("bundled"):
        options: dict[str, Any] = {"device": "CPU", "ffn": "exact", "threads": 2}
        with runtime.load(path, **options, **({"hot": 0} if path == made("bundled")[0] else {})) as model:
            found.append(model.logits(ids))
    assert np.allclose(found[0], found[1], atol=1e-4)


# --- damage --------------------------------------------------------------------------------------------------------------


def rewritten(path: Path, out: Path, keys: dict[str, Any], change: Callable[[Any], NewTensor | None]) -> Path:
    """The file with other keys, and its tensors as `change` makes them of those that the gguf package reads."""
    tensors = [made for tensor in gguf.GGUFReader(path).tensors if (made := change(tensor))]
    write_gguf(out, copied_keys(path) | keys, tensors)
    return out


def as_it_is(tensor: Any) -> NewTensor:
    data = np.ascontiguousarray(tensor.data).view(np.uint8)
    return NewTensor(tensor.name, tuple(map(int, tensor.shape)), int(tensor.tensor_type), data.nbytes, (data,))


def narrower(tensor: Any) -> NewTensor:
    """Bundles that are too short for their rows."""
    if not tensor.name.endswith("ffn_neurons"):
        return as_it_is(tensor)
    data = np.ascontiguousarray(np.ascontiguousarray(tensor.data).view(np.uint8)[:, :64])
    return NewTensor(tensor.name, (64, len(data)), int(tensor.tensor_type), data.nbytes, (data,))


def without(tensor: Any) -> NewTensor | None:
    return None if tensor.name == "blk.0.ffn_neurons" else as_it_is(tensor)


TYPES = "lazyneuron.bundle.types"


@pytest.mark.parametrize(
    ("keys", "change", "why"),
    [
        ({}, narrower, r"`blk\.0\.ffn_neurons` is i8 \[64, \d+\], expected i8, at least"),
        ({}, without, "`blk.0.ffn_neurons` is missing, which layout `paged` has"),
        ({TYPES: ["f16,f16,f16"]}, as_it_is, f"`{TYPES}` is .*, expected a text for each block"),
        ({TYPES: 5}, as_it_is, f"`{TYPES}` is 5, expected a text for each block"),
        ({TYPES: ["f16,f16"] * 99}, as_it_is, "types of block 0's bundles are 'f16,f16'"),
        ({TYPES: ["f16,q9_9,f16"] * 99}, as_it_is, "types of block 0's bundles are 'f16,q9_9,f16'"),
        ({TYPES: ["f32,f32,f32"] * 99}, as_it_is, r"`blk\.0\.ffn_neurons` is i8 \[\d+, \d+\], expected i8, at least"),
        ({"lazyneuron.feed_forward_length": 64}, as_it_is, r"`blk\.0\.ffn_neurons` is i8"),
    ],
)
def test_damage_is_told(
    made: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
    keys: dict[str, Any],
    change: Callable[[Any], NewTensor | None],
    why: str,
) -> None:
    paged = made("bundled")[1]
    with GgufFile(paged) as file:
        n = file.structure.block_count
    keys = {key: value[:n] if isinstance(value, list) else value for key, value in keys.items()}
    with pytest.raises(UserError, match=why), GgufFile(rewritten(paged, tmp_path / "x.gguf", keys, change)) as file:
        _ = file.structure


def test_inspect_names_the_matrices(made: Callable[[str], tuple[Path, Path]]) -> None:
    done = command("runtime", "inspect", made("bundled")[1])
    assert done.returncode == 0 and "ffn_down_t" in done.stdout and "paged" in done.stdout
