"""PowerInfer's model files: imported with their rows as they are, they compute what the original checkpoint does; damaged ones are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoints import CHECKPOINTS, VOCAB_SIZE, make_llama
from in_process import command
from oracle import Logits, kl, max_difference, random_ids, same_argmax, transformers_logits
from plain import convert
from powerinfer_files import (
    F16,
    F32,
    Q4_0,
    RANK_Q4,
    THRESHOLD,
    Tensors,
    checkpoint_arrays,
    encoded,
    falcon_tensors,
    file_bytes,
    header_bytes,
    make_falcon,
    parts,
    predictor_arrays,
    tokenizer_keys,
    with_types,
)
from test_convert_write import MB, peak_memory

import runtime
from runtime.model_file.reader import GgufFile
from runtime.text.tokenizer import Tokenizer

pytestmark = pytest.mark.numeric

Folder = Callable[[str], Path]
ROOT = Path(__file__).parent.parent
N = 256
TYPES = {"f32": F32, "f16": F16, "q4_0": Q4_0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("powerinfer")


@pytest.fixture(scope="module")
def original(folder: Path) -> Callable[[str], Path]:
    """Checkpoints with embeddings narrower than half a block, and what this file alone needs: theta and epsilon of their own."""
    made = {
        "llama": partial(make_llama, num_key_value_heads=2, rms_norm_eps=1e-4, intermediate_size=352),
        "wide": partial(make_llama, hidden_size=64, num_attention_heads=2, rope_parameters=_THETA),
        "opt": CHECKPOINTS["opt-pre-norm"],
    }

    @cache
    def get(name: str) -> Path:
        made[name](folder / name)
        return folder / name

    return get


_THETA = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}


@pytest.fixture(scope="module")
def source(folder: Path, original: Folder, tiny_gguf: Path) -> Callable[[str, str], tuple[Path, Tensors]]:
    """A PowerInfer file and the tensors in it."""

    @cache
    def get(name: str, type_name: str) -> tuple[Path, Tensors]:
        keys, tensors = parts(original(name), TYPES[type_name], tiny_gguf)
        path = folder / f"{name}-{type_name}.powerinfer.gguf"
        path.write_bytes(file_bytes(keys, tensors))
        return path, tensors

    return get


Source = Callable[[str, str], tuple[Path, Tensors]]


@pytest.fixture(scope="module")
def imported(folder: Path, source: Source) -> Callable[..., Path]:
    """The same file in our format, its neurons where they were."""

    @cache
    def get(name: str, type_name: str, layout: str | None = None) -> Path:
        out = folder / f"{name}-{type_name}-{layout}.gguf"
        convert(source(name, type_name)[0], out, layout=layout)
        return out

    return get


Imported = Callable[..., Path]


def logits(path: Path, **options: Any) -> Logits:
    with runtime.load(path, **({"kv_type": "f32"} | options)) as model:
        return model.logits(random_ids(N, 4000))


# --- what is imported ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "wide", "opt"])
def test_f32_equals_transformers(original: Folder, imported: Imported, name: str) -> None:
    expected = transformers_logits(original(name), random_ids(N, 4000))
    found = logits(imported(name, "f32"), ffn="exact")
    assert max_difference(expected, found) <= 2e-3
    assert same_argmax(expected, found) >= 0.995


def test_queries_and_keys_in_another_order_would_be_caught(
    original: Folder, tiny_gguf: Path, folder: Path, imported: Imported
) -> None:
    keys, tensors = parts(original("llama"), F32, tiny_gguf)
    w = checkpoint_arrays(original("llama"))
    tensors["blk.0.attn_k.weight"] = (w["model.layers.0.self_attn.k_proj.weight"], F32)
    (folder / "turned.powerinfer.gguf").write_bytes(file_bytes(keys, tensors))
    convert(folder / "turned.powerinfer.gguf", folder / "turned.gguf")
    expected, found = logits(imported("llama", "f32"), ffn="exact"), logits(folder / "turned.gguf", ffn="exact")
    assert max_difference(expected, found) > 10 * 2e-3


@pytest.mark.parametrize("type_name", ["f16", "q4_0"])
@pytest.mark.parametrize("name", ["llama", "wide", "opt"])
def test_logits_are_those_of_the_converted_original(
    original: Folder, imported: Imported, folder: Path, name: str, type_name: str
) -> None:
    own = folder / f"{name}-{type_name}-own.gguf"
    convert(original(name), own, type=type_name, output_type="f16", layout="sparse")
    expected, found = logits(own, ffn="exact"), logits(imported(name, type_name), ffn="exact")
    assert same_argmax(expected, found) >= 0.995
    # The same numbers; only queries' and keys' elements are added up in another order. A hundredth of what F16 may cost.
    assert abs(kl(expected, found)) <= 1e-6


def swapped(name: str) -> str:
    """The PowerInfer file's name of one of our tensors."""
    theirs = {"predictor_in": "fc1", "predictor_out": "fc2", "ffn_down.bias": "ffn_down_t.bias"}
    for ours, there in theirs.items():
        name = name.replace(ours, there)
    return name


@pytest.mark.parametrize("type_name", ["f16", "q4_0"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_rows_are_kept_byte_for_byte(source: Source, imported: Imported, name: str, type_name: str) -> None:
    _, tensors = source(name, type_name)
    with GgufFile(imported(name, type_name)) as file:
        _ = file.structure
        made = {name for name in file.tensors if name.endswith("predictor_out.bias") or name == "position_embd.weight"}
        assert {swapped(name) for name in set(file.tensors) - made} == set(tensors) - {"position_embd.weight"}
        for ours in set(file.tensors) - made:
            assert file.read(ours).tobytes() == encoded(*tensors[swapped(ours)]), ours
        if name == "opt":
            positions = file.read("position_embd.weight").view(np.float32)
            assert np.array_equal(positions, tensors["position_embd.weight"][0][2:].astype(np.float16).ravel())


def test_quantised_rows_are_those_that_ggml_makes(original: Folder, imported: Imported, folder: Path) -> None:
    """The bytes that this test writes are real Q4_0, and the transposed layout is ours."""
    own = folder / "own-q4_0.gguf"
    convert(original("llama"), own, type="q4_0")
    with GgufFile(own) as expected, GgufFile(imported("llama", "q4_0")) as found:
        for part in ("ffn_gate", "ffn_up", "ffn_down_t", "attn_v", "attn_output"):
            name = f"blk.1.{part}.weight"
            assert np.array_equal(expected.read(name), found.read(name)), name


def test_the_description(original: Folder, imported: Imported, folder: Path, source: Source) -> None:
    with GgufFile(imported("wide", "f16")) as file:
        s, keys = file.structure, file.metadata
    assert (s.layout, s.position, s.rope_freq_base, s.rope_scaling_factor) == ("sparse", "rope_norm", 5000.0, 2.0)
    assert (s.predictor, s.predictor_tap, s.predictor_rank) == ("mlp", "residual", (RANK_Q4, RANK_Q4))
    assert (s.source_architecture, s.vocab_size) == ("LlamaForCausalLM", VOCAB_SIZE)
    assert keys["lazyneuron.predictor.source"] == source("wide", "f16")[0].name
    assert keys["lazyneuron.predictor.threshold"] == THRESHOLD
    assert keys["general.name"] == "wide-f16"


def test_the_tokenizer_is_the_originals(imported: Imported, tiny_gguf: Path) -> None:
    text = "My fellow citizens,\n\n  the  state — naïve 語 <s> of\tthe union!"
    with Tokenizer(tiny_gguf) as expected, Tokenizer(imported("llama", "f16")) as found:
        # PowerInfer's files do not say that no space is put behind a special token (`"legacy": false`): here none is one.
        ids = expected.encode(text, parse_special=False)
        assert found.encode(text, parse_special=False) == ids
        assert found.decode(ids) == expected.decode(ids)
    with GgufFile(tiny_gguf) as expected_file, GgufFile(imported("llama", "f16")) as found_file:
        keys = [
            {k: v for k, v in f.metadata.items() if k.startswith("tokenizer.")} for f in (expected_file, found_file)
        ]
    assert keys[0].keys() - keys[1].keys() <= {"tokenizer.chat_template", "tokenizer.ggml.padding_token_id"}
    del keys[1]["tokenizer.ggml.add_space_prefix"]  # see above
    for key, value in keys[1].items():
        assert np.array_equal(value, keys[0][key]), key


def test_a_smaller_vocabulary_than_embeddings(original: Folder, tiny_gguf: Path, tmp_path: Path) -> None:
    keys, tensors = parts(original("llama"), F16, tiny_gguf)
    for key in ("tokens", "scores", "token_type"):
        keys[f"tokenizer.ggml.{key}"] = keys[f"tokenizer.ggml.{key}"][:-3]
    (tmp_path / "x.powerinfer.gguf").write_bytes(file_bytes(keys, tensors))
    convert(tmp_path / "x.powerinfer.gguf", tmp_path / "x.gguf")
    with Tokenizer(tmp_path / "x.gguf") as tokenizer:
        assert tokenizer.n_tokens == VOCAB_SIZE
        assert tokenizer.token_text(VOCAB_SIZE - 1) == f"[PAD{VOCAB_SIZE - 1}]"


def test_predicted_equals_transformers_with_powerinfers_decisions(original: Folder, imported: Imported) -> None:
    """Neurons whose score, from the stream before the FFN's norm, is below the threshold are left out of transformers' FFNs."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(original("llama"), dtype=torch.float32, attn_implementation="eager")
    streams: dict[int, torch.Tensor] = {}

    def masked(mlp: Any, i: int, predictor: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
        fc1, fc2 = predictor
        chosen = torch.relu(streams[i] @ fc1.T) @ fc2.T >= THRESHOLD
        assert 0.1 < chosen.float().mean() < 0.9
        result: torch.Tensor = mlp.down_proj(torch.relu(mlp.gate_proj(x)) * mlp.up_proj(x) * chosen)
        return result

    for i, (layer, arrays) in enumerate(zip(model.model.layers, predictor_arrays(2, 32, 352, RANK_Q4), strict=True)):
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, given, i=i: streams.update({i: given[0]}))
        layer.mlp.forward = partial(masked, layer.mlp, i, tuple(map(torch.from_numpy, arrays)))
    with torch.no_grad():
        expected = model(torch.tensor([random_ids(N, 4000)])).logits[0].numpy()
    found = logits(imported("llama", "f32"), ffn="predicted")
    assert max_difference(expected, found) <= 2e-3
    assert same_argmax(expected, found) >= 0.995
    assert max_difference(expected, logits(imported("llama", "f32"), ffn="exact")) > 10 * 2e-3


@pytest.mark.parametrize("type_name", ["f32", "f16", "q4_0"])
def test_predicted_with_every_candidate_is_exact(imported: Imported, type_name: str) -> None:
    path = imported("llama", type_name)
    expected = logits(path, ffn="exact")
    assert max_difference(expected, logits(path, ffn="predicted", predictor_bias=np.inf)) <= 1e-4
    assert max_difference(expected, logits(path, ffn="predicted")) > 1e-2  # random predictors leave neurons out


@pytest.mark.parametrize("type_name", ["f32", "q4_0"])
def test_both_layouts(source: Source, imported: Imported, type_name: str) -> None:
    path = imported("wide", type_name, "both")
    down = gguf.quants.dequantize(
        np.frombuffer(encoded(*source("wide", type_name)[1]["blk.0.ffn_down_t.weight"]), np.uint8).reshape(256, -1)
        if type_name == "q4_0"
        else source("wide", type_name)[1]["blk.0.ffn_down_t.weight"][0],
        gguf.GGMLQuantizationType.Q4_0 if type_name == "q4_0" else gguf.GGMLQuantizationType.F32,
    )
    with GgufFile(path) as file:
        assert file.tensors["blk.0.ffn_down.weight"].type == "q8_0"
        expected = gguf.quants.quantize(np.ascontiguousarray(down.T), gguf.GGMLQuantizationType.Q8_0)
        assert file.read("blk.0.ffn_down.weight").tobytes() == expected.tobytes()
    assert 0 < kl(logits(path, ffn="exact"), logits(path, ffn="dense")) <= 2e-3


@pytest.mark.parametrize("layout", ["sparse", "both"])
def test_hot_order_permutes_whole_rows(source: Source, imported: Imported, folder: Path, layout: str) -> None:
    path, tensors = source("llama", "q4_0")
    out = folder / f"hot-{layout}.gguf"
    report = convert(path, out, layout=layout, calibration=None, calibration_tokens=512, force=True)
    assert any("the imported predictors find" in note for note in report.notes)
    with GgufFile(out) as file:
        assert file.structure.neuron_order == "hot"
        order = file.read("blk.1.ffn_neuron_index").view(np.int32)
        assert not np.array_equal(order, np.arange(len(order)))
        for part in ("ffn_gate", "ffn_up", "ffn_down_t", "predictor_out"):
            name = f"blk.1.{part}.weight"
            rows = np.frombuffer(encoded(*tensors[swapped(name)]), np.uint8).reshape(len(order), -1)
            assert np.array_equal(file.read(name).reshape(rows.shape), rows[order]), name
        assert 0 < file.metadata["lazyneuron.predictor.recall"][1] < 1
    # Sums of the same terms in another order. That may turn the rounding of an activation to 8 bits, and with it the choice of a neuron, at a few positions.
    for mode in ("exact", "predicted"):
        difference = np.abs(logits(imported("llama", "q4_0"), ffn=mode) - logits(out, ffn=mode)).max(-1)
        assert (difference <= 2e-3).mean() >= 0.98
    if layout == "both":
        assert kl(logits(out, ffn="exact"), logits(out, ffn="dense")) <= 2e-3


@pytest.mark.parametrize("mode", ["exact", "predicted"])
def test_hot_order_changes_only_the_order_of_sums(source: Source, imported: Imported, folder: Path, mode: str) -> None:
    out = folder / f"hot-f32-{mode}.gguf"
    convert(source("llama", "f32")[0], out, calibration=None, calibration_tokens=512, force=True)
    with GgufFile(out) as file:
        assert file.structure.neuron_order == "hot"
    plain, hot = (logits(path, ffn=mode, kv_type="f32") for path in (imported("llama", "f32"), out))
    assert max_difference(plain, hot) <= 1e-4


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_model(original: Folder, tiny_gguf: Path, tmp_path: Path) -> None:
    keys, tensors = parts(original("wide"), F16, tiny_gguf)
    layers = 10
    keys["llama.block_count"] = layers
    keys["llama.feed_forward_length"] = n_ff = 64 * 1024  # 8.4 MB per matrix, 25 per layer
    shapes = {n: (a.shape, kind, len(encoded(a, kind))) for n, (a, kind) in tensors.items() if not n.startswith("blk.")}
    for i in range(layers):
        for name, (array, kind) in tensors.items():
            if name.startswith("blk.0."):
                rows = n_ff if (".ffn_" in name and array.ndim > 1) or "fc2" in name else array.shape[0]
                shape = (rows, *array.shape[1:])
                shapes[name.replace("blk.0.", f"blk.{i}.")] = (shape, kind, math.prod(shape) * (2 if kind else 4))
    source = tmp_path / "old.powerinfer.gguf"
    source.write_bytes(header_bytes(keys, shapes))
    with source.open("r+b") as file:
        file.truncate(source.stat().st_size + sum(nbytes + 32 for *_, nbytes in shapes.values()))
    imports = peak_memory("import convert; convert.convert")
    code = f"import convert; convert.convert({str(source)!r}, {str(tmp_path / 'new.gguf')!r}, calibration='none', threads=2)"
    assert peak_memory(code) < imports + 60 * MB
    assert (tmp_path / "new.gguf").stat().st_size > 250 * MB


@pytest.mark.parametrize("two_norms", [True, False])
def test_falcon(tiny_gguf: Path, tmp_path: Path, two_norms: bool) -> None:
    checkpoint = tmp_path / "falcon"
    n_kv = 2 if two_norms else 1
    make_falcon(checkpoint, new_decoder_architecture=two_norms, num_kv_heads=n_kv)
    config = json.loads((checkpoint / "config.json").read_text())
    arrays = falcon_tensors(checkpoint, config, n_kv)
    keys = {
        "general.architecture": "falcon",
        "falcon.context_length": 1024,
        "falcon.embedding_length": config["hidden_size"],
        "falcon.block_count": config["num_hidden_layers"],
        "falcon.feed_forward_length": 4 * config["hidden_size"],
        "falcon.attention.head_count": config["num_attention_heads"],
        "falcon.attention.head_count_kv": n_kv,
        "falcon.attention.layer_norm_epsilon": config["layer_norm_epsilon"],
    } | tokenizer_keys(tiny_gguf)
    width, n_layers = config["hidden_size"], config["num_hidden_layers"]
    for i, (fc1, fc2) in enumerate(predictor_arrays(n_layers, width, 4 * width, RANK_Q4)):
        arrays |= {f"blk.{i}.fc1.weight": fc1, f"blk.{i}.fc2.weight": fc2}
    (tmp_path / "x.powerinfer.gguf").write_bytes(file_bytes(keys, with_types(arrays, F32)))
    convert(tmp_path / "x.powerinfer.gguf", tmp_path / "x.gguf")
    expected, found = transformers_logits(checkpoint, random_ids(N, 4000)), logits(tmp_path / "x.gguf", ffn="exact")
    assert max_difference(expected, found) <= 2e-3
    assert same_argmax(expected, found) >= 0.995


# --- the activation --------------------------------------------------------------------------------------------------


def structure_of(keys: Mapping[str, Any], tensors: Tensors, tmp_path: Path, **options: Any) -> Any:
    (tmp_path / "x.powerinfer.gguf").write_bytes(file_bytes(keys, tensors))
    report = convert(tmp_path / "x.powerinfer.gguf", tmp_path / "x.gguf", **options)
    with GgufFile(tmp_path / "x.gguf") as file:
        return file.structure, report.notes


def renamed(keys: Mapping[str, Any], arch: str) -> dict[str, Any]:
    return {key.replace("llama.", f"{arch}."): value for key, value in keys.items()} | {"general.architecture": arch}


def test_activations(original: Folder, tiny_gguf: Path, tmp_path: Path) -> None:
    keys, tensors = parts(original("llama"), F16, tiny_gguf)
    s, notes = structure_of(keys, tensors, tmp_path)
    assert (s.ffn_activation, s.activation_threshold) == ("relu", 0.0)
    assert "does not say which ReLU" in notes[0]
    s, notes = structure_of(keys, tensors, tmp_path, ffn_type="fatrelu:0.01", force=True)
    assert (s.ffn_activation, s.activation_threshold) == ("fatrelu", pytest.approx(0.01))
    assert notes == ()
    bamboo = renamed(keys, "bamboo")
    bamboo["tokenizer.ggml.model"] = keys["tokenizer.ggml.model"]
    s, _ = structure_of(bamboo, tensors, tmp_path, force=True)
    assert (s.ffn_activation, s.source_architecture) == ("drelu", "BambooForCausalLM")


def test_drelu_computes_drelu(original: Folder, tiny_gguf: Path, tmp_path: Path) -> None:
    """relu(gate) * relu(up), with transformers' FFN replaced by just that."""
    import torch
    from transformers import AutoModelForCausalLM

    keys, tensors = parts(original("llama"), F32, tiny_gguf)
    keys = renamed(keys, "bamboo") | {"tokenizer.ggml.model": "llama"}
    structure_of(keys, tensors, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(original("llama"), dtype=torch.float32, attn_implementation="eager")

    def drelu(mlp: Any, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = mlp.down_proj(torch.relu(mlp.gate_proj(x)) * torch.relu(mlp.up_proj(x)))
        return result

    for layer in model.model.layers:
        layer.mlp.forward = partial(drelu, layer.mlp)
    with torch.no_grad():
        expected = model(torch.tensor([random_ids(N, 4000)])).logits[0].numpy()
    assert max_difference(expected, logits(tmp_path / "x.gguf", ffn="exact")) <= 2e-3


# --- the command line --------------------------------------------------------------------------------------------------


def test_the_command_line(source: Source, tmp_path: Path) -> None:
    path, _ = source("wide", "q4_0")
    options = ("--layout", "both", "--json")
    done = command("convert", path, tmp_path / "x.gguf", *options, "--calibration-tokens", 512)
    assert done.returncode == 0, done.stderr
    assert "note: ffn_down is q8_0, made from ffn_down_t: the file has only that layout" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["structure"]["layout"] == "both"
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]
    broken = tmp_path / "broken.powerinfer.gguf"
    broken.write_bytes(path.read_bytes()[:-1000])
    done = command("convert", broken, tmp_path / "y.gguf", *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "y.gguf").exists()


def test_a_dry_run(source: Source, capfd: pytest.CaptureFixture[str]) -> None:
    from convert.__main__ import main

    assert main([str(source("opt", "q4_0")[0]), "--dry-run"]) == 0
    shown = capfd.readouterr().out
    assert "blk.0.fc1.weight" in shown
    assert "skip_rows_2" in shown
    assert "made here" in shown
