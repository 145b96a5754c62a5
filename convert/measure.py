"""How sparse a checkpoint's FFNs are, without converting it: its blocks run one after the other on calibration text.

One block at a time lies in a temporary file, as a conversion would write it; the place of all others in that file is
left empty. Memory holds the hidden states of the text, and what one block needs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import Checkpoint
from convert.encode import Encoder
from convert.formats import NUMBERS
from convert.plan import Plan, PlannedTensor
from convert.planned_job import ConvertOptions, Job, open_job
from convert.tokenizer.self_check import opened
from convert.verify.reference import NumpyModel
from predictors import calibration_text
from predictors.calibrate import all_test, calibrate, default_tokens
from predictors.matrices import Floats
from runtime.analysis.firing import ExpertUse, Frequencies, LayerFiring, layer_firing, use_of
from runtime.base.atomic import check_space
from runtime.base.processors import default_threads
from runtime.base.progress import Progress, silent
from runtime.block_runner import BlockRunner
from runtime.errors import UserError
from runtime.model_file import tensor_names as names
from runtime.model_file.reader import GgufFile
from runtime.model_file.structure import Structure
from runtime.model_file.writer import Hole, NewFile, NewTensor, write_parts

DEFAULT_TOKENS = 8192  # enough for shares of a percent; a conversion takes more, for its predictors


@dataclass(frozen=True)
class Measured:
    """What a checkpoint's neurons do on a text.

    name: of the checkpoint. type: format of the matrices that computed it. tokens: how many of the text called `corpus`
    (with `sha256`), chosen by `seed`. seconds: of the whole measurement, without fetching. active: the share of the
    neurons that fire for a token, of those that it may use, in all layers together. layers, experts, frequencies: by
    block; frequencies as of `layer_firing`, hottest first, empty where a block has no FFN. ffn_blocks: those with one.
    """

    name: str
    type: str
    activation: str
    corpus: str
    sha256: str
    tokens: int
    seed: int
    seconds: float
    active: float
    layers: tuple[LayerFiring, ...]
    experts: tuple[ExpertUse | None, ...]
    ffn_blocks: tuple[int, ...]
    notes: tuple[str, ...]
    frequencies: tuple[Frequencies, ...] = field(repr=False, compare=False, default=())

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the frequencies."""
        values = {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("frequencies", "layers", "experts", "ffn_blocks")
        }
        rows = [
            {"block": i, **asdict(self.layers[i])} | ({"experts": asdict(use)} if (use := self.experts[i]) else {})
            for i in self.ffn_blocks
        ]
        return values | {"layers": rows}


def measure_sparsity(
    source: str | Path,
    type: str | None = None,  # noqa: A002 - the option's name
    ffn_type: str | None = None,
    calibration: str | Path | None = None,
    tokens: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = silent,
) -> Measured:
    """Run the checkpoint `source` (a folder, a Hub id or a short name) on calibration text, block by block.

    type, ffn_type, calibration, seed, threads: as in `convert.convert`. tokens: how many of the text (default: 8,192,
    fewer for very wide models). progress: told layers.
    Raises UserError for a source that is no checkpoint, and for whatever a conversion would refuse.
    """
    corpus = calibration_text.read_corpus(None if calibration is None else Path(calibration))
    job = open_job(str(source), ConvertOptions(type=type, ffn_type=ffn_type))
    if job.checkpoint is None:
        raise UserError(
            f"`{source}`: no checkpoint, expected a folder, a Hub id or a known name",
            "of a converted file, python -m runtime sparsity tells",
        )
    started = time.monotonic()
    s = job.plan.structure
    wanted = min(DEFAULT_TOKENS, default_tokens(s)) if tokens is None else tokens
    with opened(job.metadata, f"`{job.checkpoint.folder}`") as tokenizer:
        windows = calibration_text.windows(corpus, tokenizer, wanted, s.context_length, seed)
    counted = [*_counted(job, job.checkpoint, windows, threads or default_threads(), progress)]
    layers = tuple(
        layer_firing(freq, block.ffn, block.shared) for (freq, _), block in zip(counted, s.blocks, strict=True)
    )
    return Measured(
        name=str(job.metadata["general.name"]),
        type=job.plan.types.main,
        activation=s.ffn_activation,
        corpus=corpus.name,
        sha256=corpus.sha256,
        tokens=int(windows.size),
        seed=seed,
        seconds=round(time.monotonic() - started, 3),
        active=_active(s, layers),
        layers=layers,
        experts=tuple(use for _, use in counted),
        ffn_blocks=tuple(s.ffns),
        notes=job.plan.notes,
        frequencies=tuple(freq for freq, _ in counted),
    )


def _active(s: Structure, layers: Sequence[LayerFiring]) -> float:
    reached = {i: s.blocks[i].n_reached for i in s.ffns}
    return sum(layers[i].active * n for i, n in reached.items()) / sum(reached.values())


def _counted(
    job: Job, checkpoint: Checkpoint, windows: calibration_text.Ids, threads: int, progress: Progress
) -> Iterator[tuple[Frequencies, ExpertUse | None]]:
    """How often the neurons of each block fire, and how its experts are chosen."""
    s, model = job.plan.structure, NumpyModel(checkpoint, job.plan)
    hidden = np.stack([model.embeddings(window) for window in windows])
    with tempfile.TemporaryDirectory(prefix="lazyneuron-") as folder, Encoder(checkpoint, threads) as encoder:
        check_space(Path(folder), max(_bytes_of(job.plan, i) for i in range(s.block_count)))
        for i in range(s.block_count):
            progress(f"measuring layer {i}", i, s.block_count)
            with (
                _block_file(job, i, Path(folder), encoder) as file,
                BlockRunner(file, threads, windows.shape[1]) as run,
            ):
                yield _of_block(run, i, windows, hidden, progress)


def _of_block(
    runner: BlockRunner, i: int, windows: calibration_text.Ids, hidden: Floats, progress: Progress
) -> tuple[Frequencies, ExpertUse | None]:
    """What block `i` does; `hidden` [n_windows, length, n_embd] becomes the states after it."""
    if i not in runner.structure.ffns:
        for k in range(len(windows)):
            hidden[k] = runner.output(i, hidden[k])
        return np.zeros(0, np.float32), None

    def told(_what: str, done: float, total: float) -> None:
        progress(f"measuring layer {i}", done, total)

    layer = next(calibrate(runner, windows, all_test(windows), progress=told, start=(i, hidden)))
    freq, chosen = layer.frequency, layer.expert_frequency
    if chosen is not None:  # of all tokens, not of those that chose the expert
        freq = freq * np.repeat(chosen, layer.ffn.expert_length)
    if layer.shared_fired is not None:
        freq = np.concatenate([freq, layer.shared_fired / windows.size])
    return np.sort(freq)[::-1].astype(np.float32), None if chosen is None else use_of(chosen)


@contextmanager
def _block_file(job: Job, i: int, folder: Path, encoder: Encoder) -> Iterator[GgufFile]:
    """The model's file with the bytes of block `i` alone, and of what all blocks share, for as long as it is needed."""
    path = folder / f"block-{i}.gguf"
    tensors = [
        NewTensor(t.name, t.shape, NUMBERS[t.type], t.nbytes, encoder.pieces(t))
        if _needed(t, i)
        else Hole(t.name, t.shape, NUMBERS[t.type], t.nbytes, ())
        for t in job.plan.tensors
    ]
    try:
        write_parts([NewFile(path, job.plan.structure.to_metadata(), tensors)])
        with GgufFile(path) as file:
            yield file
    finally:
        path.unlink(missing_ok=True)


def _needed(tensor: PlannedTensor, i: int) -> bool:
    """Whether block `i` needs a tensor. Of the model's own, those with one dimension may be needed, and are small."""
    at = names.parsed(tensor.name)
    return len(tensor.shape) == 1 if at is None else at[0] == i


def _bytes_of(plan: Plan, i: int) -> int:
    return sum(t.nbytes for t in plan.tensors if _needed(t, i))
