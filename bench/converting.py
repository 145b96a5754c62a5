"""What converting costs: a random bf16 checkpoint of a Mistral's shape, converted by the real command in a process of
its own.

    python -m bench.converting [--layers N] [--type q4_0] [--tokens N] [--width N] [--neurons N]
        [--experts N] [--used N]

With --experts it is of a SmallThinker's shape, and --neurons counts those of one expert. The checkpoint is made in
$LAZYNEURON_CACHE and kept. Prints core-seconds (user and system time) and the peak of resident memory, with calibration
and without; what lies between is the calibration's, by layer. Then what each part of the calibration takes (see
`runtime.base.phases`). The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from bench.tables import console, table
from runtime.base.cache_folder import cache_folder
from runtime.cli.help import HelpParser
from runtime.cli.program import run_command
from runtime.errors import UserError

_TOKENIZER = Path(__file__).parent.parent / "examples/tiny-relu-llama"
_STD = 0.02
# The command in a process of its own, whose last line says where its time went.
_CHILD = """
import json, sys
from convert.__main__ import main
from runtime.base.phases import core_seconds
status = main(sys.argv[1:])
print(json.dumps(core_seconds()))
sys.exit(status)
"""
_LABELS = {
    "blocks": "running the blocks over the text",
    "frequencies": "counting how often neurons fire",
    "covariance": "covariance of the inputs",
    "directions": "the rows' main directions",
    "candidates": "candidates of each rank and type",
    "margins": "scores and margins of the candidates",
    "judging": "thresholds and prices",
    "keeping": "keeping the layer for a later run",
    "calibration": "the rest",
}


def shapes(width: int, neurons: int, layers: int, vocab: int, experts: int = 0) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors, as transformers has them. neurons: of each expert, where there are
    any.
    """
    ffn = {"mlp.gate_proj": (neurons, width), "mlp.up_proj": (neurons, width), "mlp.down_proj": (width, neurons)}
    if experts:
        parts = {"gate": (neurons, width), "up": (neurons, width), "down": (width, neurons)}
        each = ((f"experts.{e}.{part}", shape) for e in range(experts) for part, shape in parts.items())
        ffn = {"block_sparse_moe.primary_router": (experts, width)}
        ffn |= {f"block_sparse_moe.{name}": shape for name, shape in each}
    block = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width // 4, width),
        "self_attn.v_proj": (width // 4, width),
        "self_attn.o_proj": (width, width),
        **ffn,
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    blocks = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in block.items()}
    ends = {"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width)}
    return blocks | ends | {"model.norm.weight": (width,)}


def make_checkpoint(folder: Path, width: int, neurons: int, layers: int, experts: int = 0, used: int = 0) -> None:
    """Write it, a tensor at a time."""
    config = json.loads((_TOKENIZER / "config.json").read_text())
    heads = max(4, width // 128)
    config |= {"hidden_size": width, "intermediate_size": neurons, "num_hidden_layers": layers}
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads // 4, "head_dim": width // heads}
    config |= {"tie_word_embeddings": False} | (_mixture(neurons, layers, experts, used) if experts else {})
    folder.mkdir(parents=True)
    for path in _TOKENIZER.glob("tokenizer*"):
        shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(config))
    rng, weight_map = np.random.default_rng(0), {}
    for k, (name, shape) in enumerate(shapes(width, neurons, layers, config["vocab_size"], experts).items()):
        file = f"model-{k:05}.safetensors"
        save_bf16(folder / file, name, rng.standard_normal(shape, np.float32) * _STD + (len(shape) == 1))
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _mixture(neurons: int, layers: int, experts: int, used: int) -> dict[str, Any]:
    return {
        "architectures": ["SmallThinkerForCausalLM"], "model_type": "smallthinker", "moe_ffn_hidden_size": neurons,
        "moe_num_primary_experts": experts, "moe_num_active_primary_experts": used,
        "moe_primary_router_apply_softmax": False, "rope_layout": [1] * layers, "sliding_window_layout": [0] * layers,
        "moe_layer_layout": [1] * layers,
    }  # fmt: skip


def save_bf16(path: Path, name: str, values: Any) -> None:
    """One tensor, float32 in memory, bf16 in the file."""
    bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    save_file({name: bits}, path)
    stored = path.read_bytes().replace(b'"U16"', b'"BF16"', 1)  # numpy has no bf16: the header says it
    head = int.from_bytes(stored[:8], "little") + 1
    path.write_bytes(head.to_bytes(8, "little") + stored[8:])


def convert(source: Path, out: Path, *options: str) -> dict[str, Any]:
    """Core-seconds, in all and by phase, and peak bytes of one conversion."""
    command = [sys.executable, "-c", _CHILD, str(source), str(out), "--force", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        printed = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"the conversion ended with status {process.returncode}")
    phases = json.loads(printed.splitlines()[-1])
    return {"core_s": used.ru_utime + used.ru_stime, "peak_bytes": used.ru_maxrss * 1024, "phases_s": phases}


def measure(
    layers: int, type_name: str, tokens: int | None, width: int, neurons: int, experts: int = 0, used: int = 0
) -> dict[str, Any]:
    """Convert with calibration and without. Returns what is printed as JSON."""
    cache = cache_folder()
    if cache is None:
        raise UserError("no home folder to keep a checkpoint in", "set LAZYNEURON_CACHE to a folder")
    shape = f"{width}x{neurons}" + (f"x{experts}-{used}" if experts else "")
    source = cache / "bench" / f"SYNTHETIC-checkpoint-{shape}-{layers}layers"
    if not (source / "model.safetensors.index.json").exists():
        print(f"making {source}", file=sys.stderr)
        shutil.rmtree(source, ignore_errors=True)
        make_checkpoint(source, width, neurons, layers, experts, used)
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        out, kind = Path(folder) / "m.gguf", ("--type", type_name)
        plain = convert(source, out, *kind, "--calibration", "none")
        whole = convert(source, out, *kind, *(("--calibration-tokens", str(tokens)) if tokens else ()))
    per_layer = (whole["core_s"] - plain["core_s"]) / layers
    return {"checkpoint": str(source), "layers": layers, "plain": plain, "calibrated": whole, "per_layer_s": per_layer}


def main() -> None:
    parser = HelpParser(prog="python -m bench.converting", description="Measure what converting costs.")
    parser.add_argument("--layers", type=int, default=4, help="number of blocks (default: 4)")
    parser.add_argument("--type", dest="type_name", default="q4_0", help="format of the matrices (default: q4_0)")
    parser.add_argument("--tokens", type=int, help="of calibration (default: as `python -m convert`)")
    parser.add_argument("--width", type=int, default=4096, help="elements of a hidden state (default: 4096)")
    parser.add_argument("--neurons", type=int, default=14336, help="of an FFN, or of an expert (default: 14336)")
    parser.add_argument("--experts", type=int, default=0, help="experts of a mixture (default: 0, no mixture)")
    parser.add_argument("--used", type=int, default=4, help="how many of them a token uses (default: 4)")
    result = measure(**vars(parser.parse_args()))
    rows = [
        (name, f"{result[name]['core_s']:.1f}", f"{result[name]['peak_bytes'] / 2**30:.2f}")
        for name in ("plain", "calibrated")
    ]
    title = f"{result['layers']} layers: calibrating one takes {result['per_layer_s']:.1f} core-seconds"
    console().print(table(title, ("conversion", "core-seconds", "peak GiB"), rows))
    phases = [
        (label, f"{result['calibrated']['phases_s'].get(name, 0.0) / result['layers']:.1f}")
        for name, label in _LABELS.items()
    ]
    console().print(table("Where the calibration of a layer goes", ("part", "core-seconds"), phases))
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_command(main))
