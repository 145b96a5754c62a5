"""The devices that the installed ggml sees: what they are called, what they can do, how much memory they have."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from runtime.bindings import ggml
from runtime.bindings import ggml_devices as gd
from runtime.errors import UserError
from runtime.options import AUTO

NONE = "none"
_INSTALL = (
    "llama-cpp-python must be built for the device: docs/install-gpu.md; `python -m runtime devices` lists what it sees"
)


@dataclass(frozen=True)
class DeviceInfo:
    """One device. kind: "GPU", "IGPU" (shares the CPU's memory), "CPU" or "ACCEL". Memory in bytes, as the driver
    reports it.
    """

    index: int
    name: str
    description: str
    backend: str
    kind: str
    memory_free: int
    memory_total: int
    asynchronous: bool
    events: bool
    host_buffer: bool

    @property
    def handle(self) -> ggml.DeviceP:
        """ggml's own handle."""
        return gd.ggml_backend_dev_get(self.index)

    @property
    def is_stand_in(self) -> bool:
        """Whether this is the CPU itself, a second backend in the place of a device: for tests, it makes nothing
        faster.
        """
        return self.kind == "CPU"


def devices() -> list[DeviceInfo]:
    """All devices that ggml was built for and whose drivers are there, the CPU included."""
    return [_info(i) for i in range(gd.ggml_backend_dev_count())]


def _info(index: int) -> DeviceInfo:
    device = gd.ggml_backend_dev_get(index)
    props = gd.ggml_backend_dev_props()
    gd.ggml_backend_dev_get_props(device, ctypes.pointer(props))
    return DeviceInfo(
        index=index,
        name=props.name.decode(),
        description=(props.description or b"").decode("utf-8", "replace").strip(),
        backend=gd.ggml_backend_reg_name(ggml.ggml_backend_dev_backend_reg(device)).decode(),
        kind=gd.DEVICE_TYPES[props.type],
        memory_free=props.memory_free,
        memory_total=props.memory_total,
        asynchronous=getattr(props.caps, "async"),
        events=props.caps.events,
        host_buffer=props.caps.host_buffer,
    )


def parse_names(text: str) -> tuple[str, ...]:
    """Names of devices, with commas (and spaces) between them. Raises UserError where one is empty."""
    names = tuple(name.strip() for name in text.split(",")) if isinstance(text, str) else ("",)
    if not all(names):
        raise UserError(f"device `{text}`, expected a name, or several with commas", _INSTALL)
    return names


def find(names: tuple[str, ...]) -> list[DeviceInfo]:
    """The devices of these names (letter case does not matter), in this order; none for ("none",); the first GPU, if
    any, for ("auto",).

    Raises UserError for a name that no device has, one named twice, and a device that has no memory of its own to hold
    weights in.
    """
    if _is(NONE, names):
        return []
    known = {d.name.lower(): d for d in devices()}
    if _is(AUTO, names):
        return [d for d in known.values() if d.kind == "GPU"][:1]
    found = [_one(name, known) for name in names]
    for device in found:
        if not device.is_stand_in and found.count(device) > 1:
            raise UserError(f"device `{device.name}` is named twice")
    return found


def _is(word: str, names: tuple[str, ...]) -> bool:
    return [name.lower() for name in names] == [word]


def _one(name: str, known: dict[str, DeviceInfo]) -> DeviceInfo:
    usable = [d.name for d in known.values() if d.kind in ("GPU", "IGPU", "CPU")]
    if name.lower() not in known:
        raise UserError(f"no device `{name}`, found {', '.join(usable)}", _INSTALL)
    device = known[name.lower()]
    if device.name not in usable:
        raise UserError(f"device `{device.name}` is of type {device.kind}, expected a GPU", _INSTALL)
    return device
