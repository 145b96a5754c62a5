"""A process that takes memory away, so that others have no more than they are meant to have.

It takes more where more becomes free, never leaves less than FLOOR available to everybody, gives memory back where
others want more, and ends with whoever started it, however that ends. Where all goes wrong, it is the first that the
system kills.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import subprocess
import sys
from pathlib import Path

from runtime.base.closing import Closing
from runtime.base.memory_left import memory_left
from runtime.errors import UserError

FLOOR = 3 << 30  # bytes that stay available to all programs
_STEP = 64 << 20  # bytes
_CHECK_S = 0.1
_SIGKILL, _PR_SET_PDEATHSIG = 9, 1


class Pressure(Closing):
    """Takes memory until `available` bytes are left, `most` bytes of it. Linux alone.

    taken, locked: bytes at first; what was not locked was written once, which is as good where nothing is swapped.
    Raises UserError for less than `floor`, and where the process ends.
    """

    def __init__(self, available: int, floor: int = FLOOR, most: int = 1 << 40) -> None:
        if available < floor:
            raise UserError(
                f"{available / 2**30:.2f} GiB of memory would be left to all programs, expected at least "
                f"{floor / 2**30:.2f}",
                "use a larger model or budget, or --pressure trimmed",
            )
        command = [sys.executable, "-m", "bench.pressure", *map(str, (available, most, floor, os.getpid()))]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self._process.stdout
        words = self._process.stdout.readline().split()
        if len(words) != 2:
            self.close()
            raise UserError("the process that takes memory away has ended: is there too little of it?")
        self.taken, self.locked = map(int, words)

    def still_there(self) -> bool:
        """Whether all that was taken is still taken: if not, others needed it, and figures are worth nothing."""
        assert self._process.stdout
        return self._process.poll() is None and not select.select([self._process.stdout], [], [], 0)[0]

    def close(self) -> None:
        """Give all back."""
        self._process.kill()
        self._process.communicate()


def _take(taken: list[mmap.mmap], available: int, most: int) -> int:
    """Take memory, a step at a time, until no more than `available` is left; returns how many bytes are locked."""
    locked, libc = 0, ctypes.CDLL(None, use_errno=True)
    while memory_left() >= available + _STEP and (len(taken) + 1) * _STEP <= most:
        step = mmap.mmap(-1, _STEP, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        taken.append(step)
        address = ctypes.addressof(ctypes.c_char.from_buffer(step))
        if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(_STEP)) == 0:
            locked += _STEP
        else:
            for at in range(0, _STEP, mmap.PAGESIZE):
                step[at] = 1
    return locked


def _main(available: int, most: int, floor: int, parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    taken: list[mmap.mmap] = []
    locked = _take(taken, available, most)
    print(len(taken) * _STEP, locked, flush=True)
    while os.getppid() == parent and not select.select([sys.stdin], [], [], _CHECK_S)[0]:
        # Caches count as available, so only memory that cannot be dropped brings it below the floor.
        if taken and memory_left() < floor - _STEP:
            os.write(1, b"-")
            del taken[-1]
        _take(taken, available, most)


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
