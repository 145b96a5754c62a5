"""A model as its users see it: text and ids in, text and logits out.

`load` is the door to the whole package; everything behind it is one engine, one tokenizer and one file.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from runtime.base.arguments import function, functions, limit, texts, token_ids
from runtime.base.arguments import path as as_path
from runtime.base.atomic import check_target
from runtime.base.closing import Closing, Handles, closed
from runtime.base.sizes import parse_budget, parse_budgets
from runtime.base_engine import BaseEngine
from runtime.compute.paging import PagedStats
from runtime.compute.trace import Trace
from runtime.engine import Engine
from runtime.errors import UserError
from runtime.generation import Generation, LogitsProcessor, Request, Stats, Token, Turns
from runtime.hub.locate import locate
from runtime.hybrid.choose import arrange
from runtime.model_file.reader import GgufFile
from runtime.options import AUTO, BATCH, RunOptions
from runtime.sequence import CachedSequence
from runtime.stages.opening import open_staged
from runtime.text.sampling import Sampling
from runtime.text.tokenizer import Tokenizer
from runtime.text.vocabulary import SPECIAL_TOKENS


def load(
    path: str | Path,
    ffn: str | None = None,
    threads: int | None = None,
    n_ctx: int | None = None,
    kv_type: str = "f16",
    flash_attention: bool = True,
    n_batch: int = BATCH,
    predictor_bias: float = 0.0,
    draft_max: int = 8,
    draft_bias: float | None = None,
    lookup: bool = False,
    cpus: str | Iterable[int] = (),
    priority: str = "normal",
    device: str = AUTO,
    vram_budget: str | float | None = None,
    hot: int | Sequence[int] | None = None,
    ram_budget: str | float | None = None,
    mmap: bool | None = None,
    trace: str | Path | None = None,
    stages: int | str | None = None,
    stage_timeout: float = 300.0,
) -> Model:
    """Open a converted model: a file (the first shard of a split one), or a name on the Hub such as "user/repo:q4_0",
    which is fetched.

    ffn: "predicted" computes the neurons that the file's predictor expects to fire, "exact" those that fire, "dense"
    all; "verified" gives the tokens of "exact", drafted by "predicted" and checked several at once. Default:
    "predicted" where the file has a predictor that pays, else "exact".
    threads: default, one per physical core, and no more than the CPU quota allows. n_ctx: context in tokens; default,
    the model's own limit, at most 8192.
    kv_type: "f16" or "f32". n_batch: tokens of a prompt computed at once. flash_attention: False builds attention from
    plain products.
    predictor_bias: more recall (positive) or more speed (negative), in units of the predictors' typical error.
    draft_max: tokens drafted at once, at most. draft_bias: predictor_bias for the drafts of "verified"; None to choose
    it while running. lookup: draft what followed where the text's last tokens stood before, in any mode but "dense".
    cpus: processors to compute on, also as text such as "0-3,6" (default: all that the process may use); priority:
    "low", "normal", "medium", "high" or "realtime".
    device: names as `python -m runtime devices` lists them, with commas; "none" for the CPU alone; "auto" for the first
    GPU, if there is one.
    vram_budget: memory to use on it, all that is free if None: GiB, or text such as "6GiB", "6,4" (two devices),
    "800MiB" or "6GB" (see runtime/base/sizes.py).
    hot: neurons of every block (or of each) on the first device, instead of what the planner chooses.
    ram_budget: main memory for the model (weights, keys and values, buffers), in the same units; neurons that do not
    fit are read from the file when they fire (docs/disk.md). None: no limit.
    mmap: True leaves all weights in the mapped file, False reads all into memory first; default, what every token reads
    whole is read into memory (Linux), if there is enough. trace: a file for Chrome's trace viewer, written by `close`.
    stages: into how many parts the model is divided, each computed by a process of a Ray cluster, "auto" for one on
    each machine (docs/cluster.md); None: this process computes. stage_timeout: seconds that stages have for one piece
    of work.
    Raises UserError for a file that is not ours, damaged or incomplete, for options out of range, and where memory does
    not suffice.
    """
    given = {name: value for name, value in locals().items() if name != "path"}
    memory = None if ram_budget is None else parse_budget(ram_budget)
    return open_model(path, RunOptions(**given | {"vram_budget": parse_budgets(vram_budget), "ram_budget": memory}))


def open_model(path: str | Path, options: RunOptions) -> Model:
    """As `load`, with the options as one value."""
    recorder = Trace(options.trace) if options.trace else None
    file = GgufFile(
        locate(as_path("path", path, "a file, or a name on the Hub"))
    )  # nothing is mapped before the engine does it
    if recorder:
        check_target(recorder.path, 0, force=True, inputs=[part.path for part in file.parts])
    settled = options.for_file(file)
    with Handles() as handles:
        tokenizer = handles.enter_context(Tokenizer(file.path, file.metadata))
        engine: BaseEngine
        if options.stages is None:
            engine = Engine(file, settled, arrange(file, settled), recorder)
        else:
            engine = open_staged(path, file, options, settled)
        handles.enter_context(engine)
        model = Model(file, engine, tokenizer)
        handles.pop_all()
        return model


@dataclass(frozen=True)
class ModelStats:
    """How a model runs and what it did. file_bytes: its weights; memory_bytes: those that were read into memory, the
    others are mapped; kv_bytes: keys and values of a full context; device_bytes: of all buffers on each device.

    total: the figures of all generations that have ended, together; generations: their number. paged: what was read
    from the file while computing; None without ram_budget.
    """

    ffn: str
    threads: int
    n_ctx: int
    kv_type: str
    file_bytes: int
    memory_bytes: int
    kv_bytes: int
    device_bytes: tuple[int, ...]
    generations: int
    total: Stats
    paged: PagedStats | None = None


class Model(Closing):
    """A loaded model; made by `load`. Use it in a `with` statement or call `close`.

    Methods may be called from any thread: the computing itself is done by one. After `close` they raise UserError.
    """

    def __init__(self, file: GgufFile, engine: BaseEngine, tokenizer: Tokenizer) -> None:
        self.file, self._engine, self.tokenizer = file, engine, tokenizer
        self._sequence = CachedSequence(engine)
        self.path, self.metadata, self.structure = file.path, file.metadata, engine.structure
        self.tensors = file.tensors
        options = engine.options
        self.ffn, self.threads, self.n_ctx, self.kv_type = options.ffn, options.threads, options.n_ctx, options.kv_type
        self.arrangement = engine.asked  # None where no device was wanted
        self.memory_note = engine.memory_note  # why weights are not in memory that should be; ""
        self._turns, self._total, self._generations, self._totals_lock = Turns(), Stats(), 0, Lock()
        # A queue, since a generation may end in a finaliser, which must not wait for the lock.
        self._ended: SimpleQueue[Stats] = SimpleQueue()
        self._closed = False

    @property
    def engine(self) -> BaseEngine:
        """What computes, for those who schedule sequences themselves. Raises UserError after `close`."""
        return self._open_engine()

    def device_bytes(self) -> tuple[int, ...]:
        """Bytes of all buffers on each device; empty where all is computed on the CPU."""
        return self._open_engine().device_bytes()

    @property
    def chat_template(self) -> str | None:
        """The file's Jinja chat template, if it has one."""
        template = self.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    @property
    def special_tokens(self) -> dict[str, Any]:
        """What the file's chat template may name: bos_token, eos_token and others -> their texts;
        `additional_special_tokens` is a list.
        """
        return self.tokenizer.special_tokens(self.metadata.get(SPECIAL_TOKENS))

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Ids of a text; add_special: with the start token, where the tokenizer adds one; parse_special: `<s>` in the
        text is the token.
        """
        self._open_engine()
        if not isinstance(text, str):
            raise UserError(f"text is a {type(text).__name__}, expected a str")
        return self.tokenizer.encode(text, add_special, parse_special)

    def detokenize(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of some ids; special tokens are left out."""
        self._open_engine()
        return self.tokenizer.decode(token_ids("ids", ids, self.structure.vocab_size), skip_special=True)

    def logits(self, ids: Iterable[SupportsIndex]) -> npt.NDArray[np.float32]:
        """Logits at every position of `ids`, from an empty context, as this mode decodes: float32 [len(ids), n_vocab].

        Raises UserError when there are none, too many for the context, or one out of the vocabulary.
        """
        known = token_ids("ids", ids, self.structure.vocab_size)
        self._open_engine()
        if not 1 <= len(known) <= self.n_ctx:
            raise UserError(
                f"{len(known)} tokens, expected 1 to the context of {self.n_ctx}",
                "split the text, or raise n_ctx if the model allows",
            )
        return self._sequence.logits(known, last=len(known))

    def generate(
        self,
        prompt: str | Iterable[SupportsIndex],
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Iterable[str] | None = (),
        cache_prompt: bool = False,
        logits_processors: LogitsProcessor | Iterable[LogitsProcessor] | None = (),
        on_token: Callable[[Token], bool | None] | None = None,
        on_prompt: Callable[[int, int], bool | None] | None = None,
    ) -> Generation:
        """Continue a prompt (text, or ids): an iterator of pieces of text, for `for` and for `async for`.

        A long prompt is computed with every neuron where that is faster: no less accurate than the mode itself.
        max_tokens: None (or -1) goes on until the model ends or the context is full. stop: a text that ends it, or
        several: the text is cut where the first of them begins.
        cache_prompt: reuse what the previous generation had computed of this prompt, as a chat does; the logits may
        then differ slightly from those of a fresh run.
        logits_processors: called one after the other for each token with the ids so far, int32 [n], and its logits,
        float32 [n_vocab]; each returns the logits to go on with.
        on_token: called with each `Token`. on_prompt: called with the tokens of the prompt computed so far and their
        number, after every batch. Either ends the generation by returning False.
        Asynchronous generations of one model run one after the other. Raises UserError for a prompt that is empty,
        longer than the context or with ids out of the vocabulary, and for an argument that is not of its kind or out of
        range.
        """
        self._open_engine()
        self._totals()
        if not isinstance(sampling, Sampling | None):
            raise UserError(f"sampling is a {type(sampling).__name__}, expected runtime.Sampling")
        n, either = self.structure.vocab_size, "a text or a list of token ids"
        request = Request(
            self.tokenize(prompt) if isinstance(prompt, str) else token_ids("prompt", prompt, n, either),
            limit("max_tokens", max_tokens),
            sampling or Sampling(),
            texts("stop", stop),
            cache_prompt,
            functions("logits_processors", logits_processors),
            function("on_token", on_token),
            function("on_prompt", on_prompt),
        )
        return Generation(self._sequence, self.tokenizer, self.file, request, self._turns, self._ended.put)

    def _totals(self) -> tuple[Stats, int]:
        """The figures of all generations that have ended, and their number."""
        with self._totals_lock:
            with contextlib.suppress(Empty):
                while True:
                    self._total += self._ended.get_nowait()
                    self._generations += 1
            return replace(self._total), self._generations

    def stats(self) -> ModelStats:
        """How the model runs, what it holds, and the figures of all its generations so far."""
        engine, (total, generations) = self._open_engine(), self._totals()
        return ModelStats(
            self.ffn,
            self.threads,
            self.n_ctx,
            self.kv_type,
            self.file.size,
            engine.held_bytes,
            engine.kv_held,
            engine.device_bytes(),
            generations,
            total,
            engine.paged(),
        )

    def expert_shares(self) -> list[list[float]]:
        """By layer, the share of tokens that chose each expert since the model was loaded; empty for layers without
        experts, and where whole matrices were computed.
        """
        return self._open_engine().expert_shares()

    def layer_shares(self) -> list[float]:
        """Share of each layer's neurons computed since `reset_counts`."""
        return self._open_engine().counters.layer_shares()

    def gate_shares(self) -> list[float]:
        """Share of each layer's neurons whose gate rows (ungated: up rows) were read since `reset_counts`."""
        return self._open_engine().counters.gate_shares()

    def reset_counts(self) -> None:
        """Count FFN activity anew from here."""
        self._open_engine().counters.reset()

    def close(self) -> None:
        """Free the model, when what is being computed has ended; generations of other threads then raise UserError.
        Calling it twice does no harm.
        """
        self._closed = True
        self.tokenizer.close()
        self._engine.close()

    def _open_engine(self) -> BaseEngine:
        if self._closed:
            raise closed(f"`{self.path}`: the model")
        return self._engine

    def __del__(self) -> None:
        # The engine is freed with what refers to it: behind what the worker does, which a finaliser must not wait for.
        if not getattr(self, "_closed", True):
            warnings.warn(f"unclosed model {self.path}", ResourceWarning, source=self, stacklevel=2)
