"""What llama.cpp puts on a device of some size: whole layers, or all but the FFNs of the first layers.cpp itself."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.hybrid.planner import BlockCosts, Machine, Placement, evaluate


def offloaded(blocks: Sequence[BlockCosts], head: int, machine: Machine) -> Placement:
    """All but some FFNs on the device; where not even that fits, whole layers."""
    return dense_ffns_on_cpu(blocks, head, machine) or whole_layers(blocks, head, machine)


def whole_layers(blocks: Sequence[BlockCosts], head: int, machine: Machine) -> Placement:
    """llama.cpp's `--n-gpu-layers`: head and as many of the last layers as fit; the others wholly on the CPU."""
    n = len(blocks)

    def placed(first: int, with_head: bool) -> Placement:
        hot = [(b.neurons if i >= first else 0,) for i, b in enumerate(blocks)]
        return evaluate(blocks, head, machine, first, with_head, hot)

    return _fullest([placed(first, True) for first in range(n + 1)], machine) or placed(n, False)


def dense_ffns_on_cpu(blocks: Sequence[BlockCosts], head: int, machine: Machine) -> Placement | None:
    """llama.cpp's `--n-cpu-ffn`: everything on the device but the FFNs of the first layers; None where that does not
    fit.
    """
    options = [
        evaluate(blocks, head, machine, 0, True, [(0 if i < n else b.neurons,) for i, b in enumerate(blocks)])
        for n in range(len(blocks) + 1)
    ]
    return _fullest(options, machine)


def _fullest(options: list[Placement], machine: Machine) -> Placement | None:
    fitting = [option for option in options if option.bytes[0] <= machine.devices[0].budget]
    return max(fitting, key=lambda option: option.bytes[0], default=None)
