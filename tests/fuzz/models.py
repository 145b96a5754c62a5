"""Targets that open model files: damaged GGUF up to the first token, shards, and what the commands say of a file."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import runtime
from fuzz import mutate, mutate_gguf
from fuzz.bases import any_structure, model_bytes, write_models
from fuzz.gguf_parts import build, header, parse
from fuzz.worker import Failed, Files, Target
from runtime.commands.inspect import inspect
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile
from runtime.text.sampling import Sampling

_PROMPT = "the in\u00e9 <|user|>\n"
_ALLOWED = (
    "logits are not numbers",
    "expected fewer than the context of 1",
)  # weights, and a context for the prompt alone
_MODES = (None, "exact", "dense")
GREEDY = Sampling(temperature=0)


def first_token(path: Path) -> bool:
    """Load a model and generate a token. The mode, and whether the prompt has one token or several, follow from the file's bytes."""
    data = path.read_bytes()
    choice = zlib.crc32(data)
    mode = _MODES[choice % len(_MODES)]
    if mode == "dense" and b"sparse" in data:
        mode = None
    with runtime.load(path, ffn=mode, threads=1, device="none") as model:
        prompt = _PROMPT if choice & 8 else [model.structure.vocab_size - 1]
        with model.generate(prompt, max_tokens=1, sampling=GREEDY) as generation:
            "".join(generation)
        model.detokenize([0, model.structure.vocab_size - 1])
    return True


def _described_by_header(folder: Path) -> bool:
    """What a file's keys and tensors say is read and checked, and nothing is computed."""
    with GgufFile(folder / "model.gguf") as file:
        return file.structure.block_count > 0


def runs(path: Path) -> bool:
    """Whether a file that was just converted computes: it has to, but for numbers that were damaged in its source."""
    try:
        return first_token(path)
    except UserError as error:
        if not any(reason in error.message for reason in _ALLOWED):
            raise Failed(f"converted, and does not run: {error.message}") from error
        path.unlink()
        return False


def _shards(folder: Path) -> bool:
    return first_token(folder / "shards-00001-of-00002.gguf")


def _described(folder: Path) -> bool:
    inspect(folder / "model.gguf", tensors=True, as_json=True)
    inspect(folder / "model.gguf", tensors=True)
    return True


def model_targets(folder: Path, rng_of: Callable[[str, int], Random]) -> list[Target]:
    """All of them; the whole files are written to `folder`."""
    paths = write_models(folder)
    shards = [path.read_bytes() for path in sorted(folder.glob("shards-*.gguf"))]
    whole = {name: parse(path.read_bytes()) for name, path in paths.items() if name != "shards"}
    names, parts = sorted(whole), [parse(data) for data in shards]

    def model(target: str) -> Callable[[int], Files]:
        def make(index: int) -> Files:
            rng = rng_of(target, index)
            return {"model.gguf": mutate_gguf.damaged(rng, whole[rng.choice(names)])}

        return make

    def shard(index: int) -> Files:
        rng, made = rng_of("shards", index), list(shards)
        i = rng.randrange(len(made))
        made[i] = mutate_gguf.damaged(rng, parts[i])
        if rng.randrange(10) == 0:
            made[i] = mutate.damaged(rng, shards[i], len(header(parts[i])))
        return {f"shards-{i + 1:05}-of-{len(made):05}.gguf": data for i, data in enumerate(made)}

    def headed(index: int) -> Files:
        rng = rng_of("header", index)
        p = whole[rng.choice(names)]
        if rng.randrange(2):
            return {"model.gguf": mutate_gguf.damaged(rng, p, keys=18)}
        return {"model.gguf": mutate.damaged(rng, build(p), len(header(p)))}

    def consistent(index: int) -> Files:
        return {"model.gguf": model_bytes(folder, *any_structure(rng_of("structure", index)))}

    def use(folder: Path) -> bool:
        return first_token(folder / "model.gguf")

    return [
        Target("first-token", model("first-token"), use, 8),
        Target("header", headed, _described_by_header, 2),
        Target("structure", consistent, use, 0.5),
        Target("shards", shard, _shards),
        Target("inspect", model("inspect"), _described, 0.3),
    ]
