import pytest
import torch


@pytest.fixture
def two_threads():
    """Kernels and torch use two threads whatever the machine has; tests may change it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
