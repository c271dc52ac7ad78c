import os

import pytest
import torch

REQUIRED = os.environ.get("SEGKERNELS_REQUIRE", "").split(",")


def pytest_runtest_setup(item):
    """Skips what needs a GPU where there is none, unless SEGKERNELS_REQUIRE names cuda."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        if "cuda" in REQUIRED:
            pytest.fail("there is no NVIDIA GPU, and SEGKERNELS_REQUIRE names cuda")
        pytest.skip("there is no NVIDIA GPU")


@pytest.fixture
def two_threads():
    """Kernels and torch use two threads whatever the machine has; tests may change it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
