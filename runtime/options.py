"""How a model is run: one value, from the command line and from Python to the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from runtime.base.arguments import boolean, integer, integers, number, whole
from runtime.base.arguments import path as as_path
from runtime.base.processors import Threads, chosen_cpus
from runtime.base.sizes import parse_budgets
from runtime.bindings import ggml
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile
from runtime.model_file.structure import Structure

FFN_MODES = ("predicted", "exact", "verified", "dense")
KV_TYPES = {"f16": ggml.F16, "f32": ggml.F32}
AUTO = "auto"  # the first GPU, if there is one
NO_DEVICE = "none"
BATCH = 512  # tokens of a prompt computed at once
MOST_TOKENS = 1 << 24  # at once
MOST_SEQUENCES = 64  # that a cache tells apart
MOST_STAGES = 1024
MOST_KV = 4 << 30  # bytes of keys and values, where nobody says how many
DRAFT_MAX = 15  # tokens drafted at once: with the one before them, as many as have the same bits in any batch
DEFAULT_N_CTX = 8192  # at most, where nobody names one: keys and values are allocated when the model is loaded


@dataclass(frozen=True)
class RunOptions:
    """How to run a model. What is None is settled for a file by `for_file`.

    ffn: one of FFN_MODES. threads: None for one per physical core, within the CPU quota. n_ctx: positions.
    n_cells: of keys and values, which all sequences share, None for n_ctx for each of `sequences` (at most
    MOST_KV bytes of them, where there are several). kv_type: one of KV_TYPES.
    flash_attention: False builds attention from plain products.
    n_batch: tokens of a prompt computed at once. predictor_bias: added to the predictors' scores, in units of their
    typical error; infinity makes every neuron a candidate. draft_max: tokens drafted at once, at most, where `verified`
    or `lookup` draft any. draft_bias: as predictor_bias, for `verified`'s drafts; None to choose it while running.
    lookup: draft what followed where the text's last tokens stood before. deterministic: what a token gives depends
    neither on the cells that it has nor, in batches of equal size, on other sequences; slower, and on the CPU alone.
    cpus: processors to compute on, () for all.
    priority: as in runtime/base/processors.py. device: names as `python -m runtime devices` lists them, with commas.
    vram_budget: bytes on each device, () for what is free. hot: neurons of every block, or of each, on the first
    device; with it, all attention and the head are there too. trace: a file for Chrome's trace viewer.
    ram_budget: bytes of main memory for weights, keys and values, and buffers; None for no limit. What does not fit is
    read from the file when tokens ask for it; on the CPU alone, and in any mode but dense.
    mmap: True to read all weights from the mapped file, False to read all into memory first, None for memory where it
    is faster: what every token reads whole (Linux).
    stages: into how many consecutive parts the blocks are divided, each computed by a process of a Ray cluster; "auto"
    for one on each machine, None for none: this process computes. stage_timeout: seconds that a piece of work may take
    through all stages.
    Where the types are narrow, more is taken and turned into them: see `runtime.load`.
    Raises UserError for values that no model allows, or this machine does not.
    """

    ffn: str | None = None
    threads: int | None = None
    n_ctx: int | None = None
    n_cells: int | None = None
    sequences: int = 1
    kv_type: str = "f16"
    flash_attention: bool = True
    n_batch: int = BATCH
    predictor_bias: float = 0.0
    draft_max: int = 8
    draft_bias: float | None = None
    lookup: bool = False
    deterministic: bool = False
    cpus: tuple[int, ...] = ()
    priority: str = "normal"
    device: str = AUTO
    vram_budget: tuple[int, ...] = ()
    hot: int | tuple[int, ...] | None = None
    ram_budget: int | None = None
    mmap: bool | None = None
    trace: Path | None = None
    stages: int | str | None = None
    stage_timeout: float = 300.0

    def __post_init__(self) -> None:
        if self.ffn is not None and self.ffn not in FFN_MODES:
            raise UserError(f"ffn mode `{self.ffn}`, expected one of {', '.join(FFN_MODES)}")
        if self.kv_type not in list(KV_TYPES):  # of any type
            raise UserError(f"kv_type `{self.kv_type}`, expected one of {', '.join(KV_TYPES)}")
        team = Threads.of(self.threads, chosen_cpus(self.cpus), self.priority)
        for name, value in {
            "threads": None if self.threads is None else team.n,
            "cpus": team.cpus,
            "n_ctx": None if self.n_ctx is None else integer("n_ctx", self.n_ctx),
            "n_cells": None if self.n_cells is None else whole("n_cells", self.n_cells, 1, MOST_TOKENS),
            "sequences": whole("sequences", self.sequences, 1, MOST_TOKENS),
            "n_batch": whole("n_batch", self.n_batch, 1, MOST_TOKENS),
            "predictor_bias": number("predictor_bias", self.predictor_bias, -math.inf, math.inf),
            "draft_max": whole("draft_max", self.draft_max, 1, DRAFT_MAX),
            "draft_bias": None
            if self.draft_bias is None
            else number("draft_bias", self.draft_bias, -math.inf, math.inf),
            "lookup": boolean("lookup", self.lookup),
            "deterministic": boolean("deterministic", self.deterministic),
            "vram_budget": _bytes(self.vram_budget),
            "hot": integers("hot", self.hot),
            "ram_budget": None if self.ram_budget is None else whole("ram_budget", self.ram_budget, 1, 1 << 62),
            "mmap": None if self.mmap is None else boolean("mmap", self.mmap),
            "stages": _stages(self.stages),
            "stage_timeout": number("stage_timeout", self.stage_timeout, 0.1, 1e6),
            "trace": as_path("trace", self.trace) if self.trace else None,
        }.items():
            object.__setattr__(self, name, value)

    def for_file(self, file: GgufFile) -> SettledOptions:
        """The same with nothing left open, for a model. Raises UserError for what the file does not allow."""
        s, limit = file.structure, file.structure.context_length
        ffn = self.ffn or ("predicted" if any(s.predictor_rank) else "exact")
        _check_mode(file, ffn)
        _check_drafts(ffn, self)
        if self.ram_budget is not None:
            _check_budget(file, ffn, self)
        n_ctx = min(limit, DEFAULT_N_CTX) if self.n_ctx is None else self.n_ctx
        if not 1 <= n_ctx <= limit:
            raise UserError(f"`{file.path}`: n_ctx {n_ctx}, expected 1 to {limit}, the model's own limit")
        n_cells = _cells(s, n_ctx, self.sequences, KV_TYPES[self.kv_type]) if self.n_cells is None else self.n_cells
        if n_cells < n_ctx:
            raise UserError(f"n_cells {n_cells}, expected at least the context of {n_ctx}")
        threads = Threads.of(self.threads, self.cpus, self.priority).n
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.ram_budget is not None:
            given["device"] = NO_DEVICE
        return SettledOptions(**given | {"ffn": ffn, "n_ctx": n_ctx, "n_cells": n_cells, "threads": threads})


@dataclass(frozen=True)
class SettledOptions(RunOptions):
    """Options with nothing left open; made by `RunOptions.for_file`."""

    ffn: str = "exact"
    threads: int = 1
    n_ctx: int = 0

    @property
    def cells(self) -> int:
        """Cells of keys and values, which all sequences share."""
        return self.n_cells or self.n_ctx

    @property
    def kept_sequences(self) -> int:
        """Sequences whose states are kept in a model with Mamba blocks: those that run at once, as many whose
        beginnings are kept for others, and the one of whoever asks the model directly.
        """
        return min(MOST_SEQUENCES, 2 * self.sequences + 1)

    @property
    def kept_states(self) -> int:
        """States that are kept in a model with Mamba blocks: of each sequence, of one where it can be taken back to;
        where tokens are drafted, of one before them, and before they are checked.
        """
        return self.kept_sequences + (3 if self.drafts else 1)

    @property
    def logged(self) -> int:
        """Tokens of one sequence at once, at most, of which Mamba blocks keep what their states follow from."""
        return DRAFT_MAX + 1 if self.drafts else 0

    @property
    def by_rows(self) -> bool:
        """Whether few tokens are multiplied by our row kernels, with the same bits in any batch; else by ggml's."""
        return self.ffn != "dense" or self.deterministic

    @property
    def drafts(self) -> bool:
        """Whether tokens are drafted, and then checked in batches."""
        return self.lookup or self.ffn == "verified"

    @property
    def predicts(self) -> bool:
        """Whether predictors are used, for the tokens themselves or for drafts."""
        return self.ffn in ("predicted", "verified")

    @property
    def chooses(self) -> bool:
        """Whether a predictor chooses neurons; one that chooses all of them is not asked."""
        return self.ffn == "predicted" and self.predictor_bias < math.inf

    @property
    def deciding(self) -> SettledOptions:
        """How the logits are computed that decide the tokens."""
        return self.as_mode("exact", self.predictor_bias) if self.ffn == "verified" else self

    def as_mode(self, ffn: str, predictor_bias: float) -> SettledOptions:
        """The same, in another mode."""
        return replace(self, ffn=ffn, predictor_bias=predictor_bias)

    @property
    def team(self) -> Threads:
        """The computing threads."""
        return Threads(self.threads, self.cpus, self.priority)

    @property
    def kv_type_id(self) -> int:
        """The ggml type of keys and values."""
        return KV_TYPES[self.kv_type]


def _cells(s: Structure, n_ctx: int, sequences: int, kv_type: int) -> int:
    """Cells for the full context of each sequence, as far as MOST_KV goes; of one sequence always."""
    size = 2 * ggml.ggml_row_size(kv_type, sum(a.kv_length for a in s.attentions.values()))
    return max(n_ctx, min(sequences * n_ctx, MOST_KV // max(1, size)))


def _bytes(budgets: str | float | Sequence[int] | None) -> tuple[int, ...]:
    """Bytes of each device; what is a sequence was parsed before."""
    return tuple(budgets) if isinstance(budgets, tuple) else parse_budgets(budgets)  # type: ignore[arg-type]


def _stages(stages: int | str | None) -> int | str | None:
    return stages if stages in (None, AUTO) else whole("stages", stages, 1, MOST_STAGES)


def _check_mode(file: GgufFile, ffn: str) -> None:
    if ffn == "dense" and file.structure.layout != "both":
        raise UserError(
            f"`{file.path}`: has no ffn_down tensors (layout `{file.structure.layout}`), which `dense` mode needs",
            "use --ffn exact, or convert with --layout both",
        )
    if ffn in ("predicted", "verified") and not any(file.structure.predictor_rank):
        raise UserError(
            f"`{file.path}`: has no predictor that pays, which `{ffn}` mode needs",
            "use --ffn exact, or fit one: python -m predictors fit MODEL.gguf OUT.gguf",
        )


def _check_budget(file: GgufFile, ffn: str, options: RunOptions) -> None:
    """What a budget of main memory goes with."""
    if not any(block.ffn for block in file.structure.blocks):
        raise UserError(f"`{file.path}`: has no neurons to leave on the disk", "leave --ram-budget out")
    if ffn == "dense":
        raise UserError(
            "a budget of main memory in `dense` mode, expected another: it reads every weight for every token",
            "use --ffn exact, which computes the same",
        )
    if options.device not in (AUTO, NO_DEVICE) or options.vram_budget or options.hot is not None:
        raise UserError("a budget of main memory with a device, expected the CPU alone", "use --device none")
    if options.mmap is not None:
        raise UserError(
            f"a budget of main memory with --{'' if options.mmap else 'no-'}mmap, expected one of them",
            "with a budget, what does not fit is read from the file, and all else is in memory",
        )


def _check_drafts(ffn: str, options: RunOptions) -> None:
    if options.lookup and ffn == "dense":
        raise UserError(
            "lookup in `dense` mode, expected another: its products depend on how many tokens are computed at once, so "
            "drafts could change the text",
            "use --ffn exact, which computes the same",
        )
    if (options.lookup or ffn == "verified") and not options.flash_attention:
        raise UserError(
            "drafts without flash attention, expected with it: plain products depend on how many tokens are computed "
            "at once, so drafts could change the text"
        )
