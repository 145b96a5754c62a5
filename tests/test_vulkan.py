"""On a real backend of ggml with its own memory, queue and events: Mesa's software Vulkan. Run by `make test-vulkan`; nothing here is ever skipped."""

from __future__ import annotations

import numpy as np
import pytest
from devices import TYPES, gpu, product

pytestmark = pytest.mark.vulkan


@pytest.fixture(scope="session")
def device() -> str:
    """Name of the GPU device, e.g. "Vulkan0"; where there is none, the tests fail."""
    return str(gpu().name.decode())


def test_the_device_is_a_gpu_with_its_own_queue_and_events(device: str) -> None:
    props = gpu()
    assert device.startswith("Vulkan")
    assert "llvmpipe" in props.description.decode()  # the software driver, not a GPU that happens to be there
    assert TYPES[props.type] == "GPU"
    assert getattr(props.caps, "async")
    assert props.caps.events
    assert props.memory_free > 0


@pytest.mark.parametrize("n_tokens", [1, 64])
def test_a_product_on_the_device_is_that_of_float64(device: str, n_tokens: int) -> None:
    rng = np.random.default_rng(5)
    weights, x = rng.normal(size=(320, 512)).astype(np.float32), rng.normal(size=(n_tokens, 512)).astype(np.float32)
    expected = x.astype(np.float64) @ weights.astype(np.float64).T
    error = np.abs(product(device, weights, x) - expected).max() / np.abs(expected).max()
    assert error < 1e-4
