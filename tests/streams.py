"""What the tests of gae, advantages and whiten draw: the streams of one case."""

from __future__ import annotations

import pytest
import torch
from layouts import CASES, Case

BACKENDS = ("reference", "native")
STORAGE = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")
INF = float("inf")

backends = pytest.mark.parametrize("backend", BACKENDS)
storage = pytest.mark.parametrize("dtype", STORAGE, ids=str)
case_names = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def draw(case: Case, dtype=torch.float32, seed=0):
    """rewards, ends, logprobs, ref_logprobs, values, mask; NaN outside the mask."""
    g = torch.Generator().manual_seed(seed)
    ends = case.mask & (torch.rand(case.n_tokens, generator=g) < 0.3)

    def normal(scale):
        x = scale * torch.randn(case.n_tokens, generator=g)
        return x.to(dtype).masked_fill(~case.mask, NAN)

    return normal(3), ends, normal(1) - 2, normal(1) - 2, normal(1), case.mask


def doubles(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


def grids(case, args):
    return [case.grid(x, NAN if x.is_floating_point() else False) for x in args]


def of_giant_rows():
    """draw of giant rows, and its cu_seqlens."""
    case = CASES["giant"]
    cu_seqlens = torch.tensor([0, *case.lengths * 4]).cumsum(0).int()
    return [x.repeat(4) for x in draw(case)], cu_seqlens


def assert_same_bits(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def assert_threads_do_not_matter(run):
    """Needs the fixture ``two_threads``."""
    many, again = run(), run()
    torch.set_num_threads(1)
    one = run()
    for other in (again, one):
        assert_same_bits(many, other)
