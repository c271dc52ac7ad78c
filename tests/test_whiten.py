import math

import pytest
import torch
from layouts import CASES
from ranks import on_ranks, whitened
from streams import (
    BACKENDS,
    INF,
    NAN,
    assert_threads_do_not_matter,
    backends,
    case_names,
    draw,
    of_giant_rows,
    storage,
)
from tolerance import assert_close

from segkernels import whiten
from segkernels.native.whiten import moments_fwd, whiten_fwd


def naive_whiten(x, mask, center):
    chosen = [v for v, m in zip(x.flatten().tolist(), mask.flatten().tolist(), strict=True) if m]
    mean = math.fsum(chosen) / len(chosen)
    variance = math.fsum((v - mean) ** 2 for v in chosen) / len(chosen)
    shift = 0 if center else mean
    out = (x - mean) / math.sqrt(max(variance, 1e-8)) + shift
    return torch.where(mask, out, 0.0)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("name", ["full", "holes", "giant", "one action token"])
def test_reference_is_the_definition(name, center):
    case = CASES[name]
    x = draw(case, torch.float64)[0] + 5
    torch.testing.assert_close(
        whiten(x, case.mask, center=center), naive_whiten(x, case.mask, center)
    )


@case_names
@storage
@pytest.mark.parametrize("center", [True, False])
def test_native(case, dtype, center):
    x = draw(case, dtype)[0] + 5
    truth = whiten(x.double(), case.mask, center=center)
    baseline, kernel = (whiten(x, case.mask, center=center, backend=b) for b in BACKENDS)
    assert kernel.dtype == torch.float32
    assert_close(kernel, baseline, truth)
    padded = whiten(case.grid(x, NAN), case.grid(case.mask, False), center=center)
    assert_close(case.flat(padded), baseline, truth)


@backends
def test_variance_has_a_floor_and_masked_tokens_are_zeros(backend):
    mask = torch.tensor([[True, True, False]])
    constant = torch.tensor([[3.0, 3.0, NAN]])
    assert whiten(constant, mask, backend=backend).tolist() == [[0.0, 0.0, 0.0]]
    assert whiten(constant, mask, center=False, backend=backend).tolist() == [[3.0, 3.0, 0.0]]
    tiny = torch.tensor([[1e-6, -1e-6, NAN]])
    torch.testing.assert_close(
        whiten(tiny, mask, backend=backend), torch.tensor([[1e-2, -1e-2, 0.0]])
    )
    nothing = whiten(constant, torch.zeros_like(mask), backend=backend)
    assert nothing.tolist() == [[0.0, 0.0, 0.0]]
    poisoned = whiten(torch.tensor([[1.0, INF, NAN]]), mask, backend=backend)
    assert poisoned.isnan().tolist() == [[True, True, False]]


def test_exact_across_ranks(tmp_path):
    case = CASES["holes"]
    x, mask = case.grid(draw(case)[0] + 5, NAN), case.grid(case.mask, False)
    unequal = slice(0, 1), slice(1, None)
    by_rank = on_ranks(whitened, 2, tmp_path, [(x[part], mask[part]) for part in unequal], BACKENDS)
    truth = whiten(x.double(), mask)
    baseline = whiten(x, mask, backend="reference")
    for parts in zip(*by_rank, strict=True):
        assert_close(torch.cat(parts), baseline, truth)


def test_threads_do_not_matter(two_threads):
    (x, *_, mask), _ = of_giant_rows()
    assert_threads_do_not_matter(lambda: [whiten(x, mask, center=c) for c in (True, False)])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 4)])
@backends
def test_no_action_token(shape, backend):
    none = torch.zeros(shape, dtype=torch.bool)
    out = whiten(torch.full(shape, NAN), none, backend=backend)
    assert torch.equal(out, torch.zeros(shape))


@backends
def test_not_differentiable(backend):
    x, *_, mask = draw(CASES["full"])
    assert not whiten(x.requires_grad_(), mask, backend=backend).requires_grad


def test_custom_operators():
    x, *_, mask = draw(CASES["holes"])
    torch.library.opcheck(moments_fwd, (x, mask))
    torch.library.opcheck(whiten_fwd, (x, mask, moments_fwd(x, mask), True))


def test_errors():
    ones, every = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask: expected shape \[2, 3\] like x, got \[1, 3\]"):
        whiten(ones, every[:1])
    with pytest.raises(TypeError, match="x: expected float32"):
        whiten(ones.int(), every)
