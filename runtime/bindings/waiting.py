"""How OpenMP's threads wait for each other: in a loop for some microseconds, then asleep.

Left to itself GNU's library lets them loop for milliseconds at every barrier. Where another program wants the same
processors, they loop while the thread that they wait for has none. The library reads its settings once: they have to
be set before it is loaded. Knows nothing of ggml.
"""

from __future__ import annotations

import functools
import os
import sys

# Turns of its loop, 10 to 25 ns each, by measurement (docs/log.md, "beside other programs, measured again"): fewer, and
# threads fall asleep between two tokens of a small model; more, and a busy machine waits longer.
# LLVM's library gives way to other programs by itself, and loses three quarters of a small model's speed with
# KMP_BLOCKTIME=0: nothing is set for it.
SPIN_COUNT = "GOMP_SPINCOUNT"
TURNS = "10000"
_DECIDED = (SPIN_COUNT, "OMP_WAIT_POLICY")  # whoever sets one of these has decided how threads wait
_GNU = "libgomp.so.1"
_added: dict[str, str] = {}  # to the environment


@functools.cache
def settle() -> str:
    """Let threads of an OpenMP library that is loaded from now on wait with little spinning, unless the user has
    decided otherwise; returns a line that says how they wait.

    On Linux only: elsewhere nothing was measured. The first call counts.
    """
    if sys.platform != "linux":
        return "OpenMP: threads wait as its library does by itself"
    if given := [f"{name}={os.environ[name]}" for name in _DECIDED if name in os.environ]:
        return f"OpenMP: threads wait as the environment says ({' '.join(given)})"
    if _loaded():
        return (
            "OpenMP: its library was loaded by others before, so its threads wait as they did; where other programs "
            f"are busy, load lazyneuron first, or set {SPIN_COUNT}={TURNS}"
        )
    _added[SPIN_COUNT] = TURNS
    os.environ.update(_added)
    return f"OpenMP: threads wait with {SPIN_COUNT}={TURNS}"


def unsettled() -> dict[str, str]:
    """This process's environment without what `settle` added: for programs whose threads are to wait as they do by
    themselves.
    """
    return {name: value for name, value in os.environ.items() if name not in _added}


def _loaded() -> bool:
    """Whether the OpenMP library that ggml is going to use is in this process already: one whose functions all
    libraries see, as that of torch, or the one of ggml's name.
    """
    import ctypes  # noqa: PLC0415  (a list of commands needs it not)

    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return True
    try:
        ctypes.CDLL(_GNU, mode=os.RTLD_NOLOAD | os.RTLD_LOCAL)
    except OSError:
        return False
    return True
