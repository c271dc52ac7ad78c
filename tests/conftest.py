import importlib.util
import os

import numpy as np
import pytest
import torch

from segkernels import backend, linear_policy, projection

# Before anything imports triton: without a GPU, its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
REQUIRED = os.environ.get("SEGKERNELS_REQUIRE", "").split(",")


def pytest_runtest_setup(item):
    """Skips what cannot run here; SEGKERNELS_REQUIRE=triton,cuda (or one) makes that a failure."""

    def missing(name, reason):
        if name in REQUIRED:
            pytest.fail(f"{reason}, and SEGKERNELS_REQUIRE names {name}")
        pytest.skip(reason)

    if item.get_closest_marker("triton") and not TRITON_INSTALLED:
        missing("triton", "triton is not installed")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        missing("cuda", "there is no NVIDIA GPU")
    if item.get_closest_marker("interpreter") and not INTERPRETED:
        pytest.skip("Triton kernels are compiled for the GPU here")


@pytest.fixture(scope="session", autouse=True)
def fma_rounds_once():
    """As it does in hardware. Triton's interpreter rounds the product too, before version 3.9."""
    if not (INTERPRETED and TRITON_INSTALLED):
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    InterpreterBuilder.create_fma = fma


@pytest.fixture
def two_threads():
    """Kernels and torch use two threads whatever the machine has; tests may change it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gpu_driver(monkeypatch):
    """backend="triton" of the linear forms goes the way of GPUs (tiles in the dtype of the hidden
    states, their workspace), but with the compiled row kernels, which are faster than interpreted
    ones by orders of magnitude."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend, "TRITON_INSTALLED", True)
    monkeypatch.setitem(backend.ROW_KERNELS, "triton", backend.ROW_KERNELS["native"])


@pytest.fixture
def capturing(monkeypatch):
    """The host learns nothing from the device, as while a CUDA graph is captured."""
    for module in (projection, linear_policy):
        monkeypatch.setattr(module, "may_synchronise", lambda tensor: False)
