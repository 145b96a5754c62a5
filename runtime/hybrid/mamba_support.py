"""Whether a device can compute a model's Mamba blocks: backends of ggml take some sizes only."""

from __future__ import annotations

from runtime.base.closing import Handles
from runtime.bindings import ggml
from runtime.compute.weights import new_context
from runtime.model_file.structure import Mamba2, Structure


def refused(device: ggml.DeviceP, s: Structure) -> frozenset[int]:
    """The blocks whose Mamba mixer a device cannot compute."""
    able = {m: _computes(device, m) for m in set(s.mambas.values())}
    return frozenset(i for i, m in s.mambas.items() if not able[m])


def _computes(device: ggml.DeviceP, m: Mamba2) -> bool:
    with Handles() as handles:
        ctx = handles.add(new_context(16), ggml.ggml_free)

        def new(*ne: int, type_id: int = ggml.F32) -> ggml.TensorP:
            return ggml.ggml_new_tensor_3d(ctx, type_id, *(*ne, 1, 1)[:3])

        conv = ggml.ggml_ssm_conv(ctx, new(m.conv_length, m.conv_channels), new(m.conv_length, m.conv_channels))
        group = new(m.state_length, m.group_count)
        scan = ggml.ggml_ssm_scan(
            ctx,
            new(m.state_length, m.head_length, m.head_count),
            new(m.head_length, m.head_count),
            new(m.head_count),
            new(1, m.head_count),
            group,
            group,
            new(1, type_id=ggml.I32),
            1,
        )
        return all(ggml.ggml_backend_dev_supports_op(device, ggml.ConstTensorP(op.value)) for op in (conv, scan))
