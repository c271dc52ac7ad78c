import pytest
import torch

from segkernels import linear_policy, native_vocab, projection, vocab
from segkernels.backend import DEVICES


@pytest.fixture
def two_threads():
    """Kernels and torch use two threads whatever the machine has; tests may change it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gpu_driver(monkeypatch):
    """backend="triton" takes CPU tensors: what the linear forms do on GPUs (tiles in the dtype of
    the hidden states, no conversion), with the compiled row kernels in place of Triton's."""
    monkeypatch.setattr(vocab, "kernels", lambda backend: native_vocab)
    for op in ("linear_logprobs_and_entropy", "linear_policy_loss"):
        monkeypatch.setitem(DEVICES[op], "triton", ("cpu",))


@pytest.fixture
def capturing(monkeypatch):
    """The host learns nothing from the device, as while a CUDA graph is captured."""
    for module in (projection, linear_policy):
        monkeypatch.setattr(module, "may_synchronise", lambda tensor: False)
