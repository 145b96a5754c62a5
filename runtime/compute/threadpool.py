"""ggml's thread pool: it carries the processors and the priority of the computing threads.

ggml is an OpenMP build. Such a pool has no threads of its own: its settings are applied to the team that computes a
graph.
"""

from __future__ import annotations

import os

from runtime.base.processors import FIFO, PRIORITIES, Threads
from runtime.bindings import ggml


def new_pool(threads: Threads) -> ggml.ThreadpoolP | None:
    """A pool to be set on a CPU backend and freed by the caller; None where nothing special is asked for.

    Call it on the thread that computes.
    """
    if not threads.cpus and threads.priority == "normal":
        return None
    if threads.n == 1:
        _apply(threads)
    params = ggml.ggml_threadpool_params_default(threads.n)
    for cpu in threads.cpus:
        params.cpumask[cpu] = True
    params.prio = PRIORITIES[threads.priority]
    return ggml.ggml_threadpool_new(params)


def _apply(threads: Threads) -> None:
    # ggml does this for teams of two threads and more only.
    if threads.cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, threads.cpus)
    if threads.priority == "low" and hasattr(os, "SCHED_BATCH"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    elif threads.priority in FIFO and hasattr(os, "SCHED_FIFO"):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(FIFO[threads.priority]))
