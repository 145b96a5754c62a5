"""The devices that a model can be put on, and how fast they are."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.base.processors import default_threads
from runtime.hybrid.bandwidth import speed_of
from runtime.hybrid.devices import DeviceInfo, devices


@dataclass(frozen=True)
class DeviceSpeed:
    """A device of this machine, and how fast it is: bandwidth in bytes/s, sync in seconds; None where not measured."""

    device: DeviceInfo
    bandwidth: float | None = None
    sync: float | None = None


def device_speeds(measure: bool, threads: int | None) -> list[DeviceSpeed]:
    """What ggml sees that a model can be put on. measure: measure anew how fast each is; threads: of the CPU."""
    found = devices()
    return [_measured_device(d, threads) if measure and d.kind != "ACCEL" else DeviceSpeed(d) for d in found]


def _measured_device(device: DeviceInfo, threads: int | None) -> DeviceSpeed:
    speed = speed_of(device, threads or default_threads(), anew=True)
    return DeviceSpeed(device, speed.bandwidth, speed.sync)
