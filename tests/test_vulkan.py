"""On a real backend of ggml with its own memory, queue and events: Mesa's software Vulkan.

`make test-vulkan` runs these twice, in the device's own precision and in F32 alone. Nothing here is ever skipped.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from devices import TYPES, gpu, product

pytestmark = pytest.mark.vulkan


@pytest.fixture(scope="session")
def device() -> str:
    """Name of the GPU device, e.g. "Vulkan0"; where there is none, the tests fail."""
    return str(gpu().name.decode())


@pytest.fixture(scope="session")
def half_precision() -> bool:
    """Whether the device may round the factors of large F32 products to F16, which is ggml's default where the device can."""
    return "GGML_VK_DISABLE_F16" not in os.environ


def test_the_device_is_a_gpu_with_its_own_queue_and_events(device: str) -> None:
    props = gpu()
    assert device.startswith("Vulkan")
    assert "llvmpipe" in props.description.decode()  # the software driver, not a GPU that happens to be there
    assert TYPES[props.type] == "GPU"
    assert getattr(props.caps, "async")
    assert props.caps.events
    assert props.memory_free > 0


@pytest.mark.parametrize("n_tokens", [1, 64])
def test_a_product_on_the_device_is_that_of_float64(device: str, half_precision: bool, n_tokens: int) -> None:
    rng = np.random.default_rng(5)
    weights, x = rng.normal(size=(320, 512)).astype(np.float32), rng.normal(size=(n_tokens, 512)).astype(np.float32)
    expected = x.astype(np.float64) @ weights.astype(np.float64).T
    error = np.abs(product(device, weights, x) - expected).max() / np.abs(expected).max()
    rounded = half_precision and n_tokens > 8  # products with few columns are computed in F32 always
    assert error < (2**-11 if rounded else 1e-4)
