"""A model opened in stages on a Ray cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from runtime.base.closing import Handles
from runtime.compute.dense_threshold import expected
from runtime.compute.traffic import block_bytes
from runtime.errors import UserError
from runtime.model_file import tensor_names as n
from runtime.model_file.reader import GgufFile
from runtime.options import AUTO, NO_DEVICE, RunOptions, SettledOptions
from runtime.stages.cut import cut
from runtime.stages.staged_engine import StagedEngine


def open_staged(source: str | Path, file: GgufFile, options: RunOptions, settled: SettledOptions) -> StagedEngine:
    """An engine of `options.stages` stages. source: of the file, for whoever opens it elsewhere; settled: the options
    for it.

    Raises UserError where Ray is not installed or cannot be reached, where stages cannot be made, and for options that
    stages do not have.
    """
    _check(options)
    wanted, threads = options.stages, options.threads or 1
    cuts = cuts_of(file, settled, wanted) if isinstance(wanted, int) else []
    connect(max(1, len(cuts) * threads))
    from runtime.stages import ray_stages  # noqa: PLC0415  (see `connect`)

    cuts = cuts or cuts_of(file, settled, ray_stages.n_machines())
    fixed = replace(
        options,
        stages=None,
        device=NO_DEVICE,
        ffn=settled.ffn,
        n_ctx=settled.n_ctx,
        n_cells=settled.n_cells,
    )
    path = source if not Path(source).exists() else Path(source).resolve()
    with Handles() as handles:
        stages = ray_stages.RayStages(path, fixed, cuts, options.threads, options.stage_timeout)
        handles.enter_context(stages)
        engine = StagedEngine(file, settled, stages)
        handles.pop_all()
    return engine


def connect(n_cpus: int = 1) -> None:
    """Reach a Ray cluster, or begin one on this machine: see `ray_stages.connect`. Raises UserError where Ray is not
    installed, too.
    """
    try:
        from runtime.stages import ray_stages  # noqa: PLC0415  (an extra, which may not be installed)
    except ImportError as error:
        raise UserError(f"stages need the package {error.name}", 'pip install "lazyneuron[cluster]"') from None
    ray_stages.connect(n_cpus)


def cuts_of(file: GgufFile, settled: SettledOptions, n_stages: int) -> list[range]:
    """The blocks of each stage: cut so that the stage whose tokens read the most bytes reads as few as can be."""
    s = file.structure
    activity = expected(file, settled.deciding.ffn, settled.predictor_bias)
    costs = [block_bytes(s, file.tensors, activity, i) for i in range(s.block_count)]
    head = file.tensors[n.weight(n.TOKEN_EMBD if s.tied_output else n.OUTPUT)].nbytes
    return cut(costs, n_stages, last=head)


def _check(options: RunOptions) -> None:
    refused = {
        "a device": options.device not in (AUTO, NO_DEVICE) or options.hot is not None or bool(options.vram_budget),
        "a budget of main memory": options.ram_budget is not None,
        "a trace": options.trace is not None,
        "processors of this machine (--cpus)": bool(options.cpus),
    }
    for what, asked in refused.items():
        if asked:
            raise UserError(f"stages with {what}, expected neither: stages compute on their machines' CPUs")
