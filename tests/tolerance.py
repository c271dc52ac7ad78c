"""The only tolerances of the test-suite.

Truth is the reference in fp64 on inputs that are already rounded to the storage dtype; the baseline
is the reference on those inputs in their own dtype. A kernel may be wrong by twice the baseline's
own error and four roundings of the largest true value, no more.
"""

import torch
from torch import Tensor

BASELINE_FACTOR = 2.0
ROUNDINGS = 4.0


def farthest(baselines: list[Tensor], truth: Tensor) -> Tensor:
    """The baseline that is most wrong: of a handful of numbers one alone may be right by luck."""
    return max(baselines, key=lambda x: (x.double() - truth).nan_to_num().abs().sum().item())


def assert_close(kernel: Tensor, baseline: Tensor, truth: Tensor, what: str = "") -> None:
    """Fails unless max|kernel - truth| <= 2 max|baseline - truth| + 4 eps max|truth|.

    eps is that of the kernel's own output dtype. NaN and infinities must stand in the same places
    as in the truth.
    """
    assert kernel.shape == truth.shape, f"{what}: shape {kernel.shape} instead of {truth.shape}"
    assert truth.dtype == torch.float64
    kernel64, baseline64 = kernel.double(), baseline.double()
    finite = truth.isfinite()
    assert torch.equal(kernel64.isnan(), truth.isnan()), f"{what}: NaN misplaced"
    same = torch.equal(kernel64[~finite].nan_to_num(), truth[~finite].nan_to_num())
    assert same, f"{what}: infinities misplaced"
    if not finite.any():
        return
    error = (kernel64 - truth)[finite].abs().max().item()
    allowed = (baseline64 - truth)[finite].abs().max().item() * BASELINE_FACTOR
    allowed += ROUNDINGS * torch.finfo(kernel.dtype).eps * truth[finite].abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"
