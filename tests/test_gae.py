import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import CASES, cases
from streams import (
    BACKENDS,
    NAN,
    assert_threads_do_not_matter,
    backends,
    case_names,
    draw,
    of_giant_rows,
    storage,
)
from tolerance import assert_close

from segkernels import gae, native
from segkernels.native.gae import gae_fwd

DISCOUNTS = [(1.0, 0.95), (0.97, 1.0), (1.0, 1.0), (0.9, 0.0)]


def naive_gae(case, rewards, values, gamma, lam):
    r, v, mask = rewards.tolist(), values.tolist(), case.mask.tolist()
    advantages, returns = [0.0] * len(r), [0.0] * len(r)
    start = 0
    for length in case.lengths:
        action = [t for t in range(start, start + length) if mask[t]]
        start += length
        advantage = next_value = 0.0
        for t in reversed(action):
            advantage = r[t] + gamma * next_value - v[t] + gamma * lam * advantage
            next_value = v[t]
            advantages[t], returns[t] = advantage, advantage + v[t]
    return torch.tensor([advantages, returns], dtype=torch.float64).unbind()


@case_names
@pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)
def test_reference_is_the_definition(case, gamma, lam):
    rewards, _, _, _, values, mask = draw(case, torch.float64)
    out = gae(rewards, values, mask, cu_seqlens=case.cu_seqlens, gamma=gamma, lam=lam)
    torch.testing.assert_close(out, naive_gae(case, rewards, values, gamma, lam))


def check_gae(case, dtype, seed=0, **options):
    rewards, _, _, _, values, mask = draw(case, dtype, seed)
    options["cu_seqlens"] = case.cu_seqlens
    truth = gae(rewards.double(), values.double(), mask, **options)
    baseline, kernel = (gae(rewards, values, mask, backend=b, **options) for b in BACKENDS)
    for name, *triple in zip(("advantages", "returns"), kernel, baseline, truth, strict=True):
        assert triple[0].dtype == torch.float32
        assert_close(*triple, name)
        assert not triple[0][~mask].any()


@case_names
@storage
def test_native(case, dtype):
    for gamma, lam in DISCOUNTS:
        check_gae(case, dtype, gamma=gamma, lam=lam)


@given(cases(), st.sampled_from(DISCOUNTS), st.integers(0, 2**31 - 1))
@settings(max_examples=20, deadline=None)
def test_random_layouts(case, discounts, seed):
    check_gae(case, torch.float32, seed, gamma=discounts[0], lam=discounts[1])


@backends
def test_by_hand(backend):
    # A hole neither discounts nor adds.
    rewards = torch.tensor([[1.0, NAN, 2.0], [4.0, NAN, NAN]])
    values = torch.tensor([[0.5, NAN, 1.0], [8.0, NAN, NAN]])
    mask = torch.tensor([[True, False, True], [True, False, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5, backend=backend)
    assert advantages.tolist() == [[1.0 + 0.5 - 0.5 + 0.25, 0.0, 1.0], [-4.0, 0.0, 0.0]]
    assert returns.tolist() == [[1.75, 0.0, 2.0], [4.0, 0.0, 0.0]]


@backends
def test_a_nan_reaches_every_earlier_token(backend):
    rewards = torch.tensor([[1.0, 1.0, NAN, 1.0], [1.0, 1.0, 1.0, 1.0]])
    mask = torch.ones(2, 4, dtype=torch.bool)
    advantages, _ = gae(rewards, torch.zeros(2, 4), mask, backend=backend)
    assert advantages.isnan().tolist() == [[True, True, True, False], [False] * 4]


@backends
@pytest.mark.parametrize("wrong", [NAN, float("inf"), float("-inf")])
def test_no_later_token_is_reached(backend, wrong):
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 1, 100, generator=g)
    mask = torch.ones(1, 100, dtype=torch.bool)
    for at in (0, 41, 42, 43, 44, 95, 99):
        poisoned = rewards.clone()
        poisoned[0, at] = wrong
        for a, b in zip(
            gae(poisoned, values, mask, lam=0.9, backend=backend),
            gae(rewards, values, mask, lam=0.9, backend=backend),
            strict=True,
        ):
            assert torch.equal(a[0, at + 1 :], b[0, at + 1 :])
            expected = torch.full((at + 1,), wrong)
            torch.testing.assert_close(a[0, : at + 1], expected, rtol=0, atol=0, equal_nan=True)


def test_affine_scan_in_tree_order():
    g = torch.Generator().manual_seed(0)
    deltas, decay = torch.randn(33, generator=g), 0.95
    maps = [(decay, delta) for delta in deltas.tolist()]

    def tree(steps):
        if len(steps) == 1:
            return steps[0]
        half = len(steps) // 2
        return native.extension.combine_affine(tree(steps[:half]), tree(steps[half:]))

    got = torch.tensor([tree(maps[i:])[1] for i in range(33)])
    options = {"lam": decay, "backend": "reference"}
    rows = deltas[None], torch.zeros(1, 33), torch.ones(1, 33, dtype=torch.bool)
    truth = gae(rows[0].double(), *rows[1:], **options)[0]
    assert_close(got, gae(*rows, **options)[0][0], truth[0])


def test_threads_do_not_matter(two_threads):
    (rewards, _, _, _, values, mask), cu_seqlens = of_giant_rows()
    assert_threads_do_not_matter(lambda: gae(rewards, values, mask, cu_seqlens=cu_seqlens))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 4)])
@backends
def test_no_action_token(shape, backend):
    none = torch.zeros(shape, dtype=torch.bool)
    nan = torch.full(shape, NAN)
    for x in gae(nan, nan, none, backend=backend):
        assert torch.equal(x, torch.zeros(shape))


@backends
def test_not_differentiable(backend):
    rewards, _, _, _, values, mask = draw(CASES["full"])
    rewards, values = rewards.requires_grad_(), values.requires_grad_()
    out = gae(rewards, values, mask, cu_seqlens=CASES["full"].cu_seqlens, backend=backend)
    assert not any(x.requires_grad for x in out)


def test_custom_operators():
    rewards, _, _, _, values, mask = draw(CASES["holes"])
    cu_seqlens = CASES["holes"].cu_seqlens
    torch.library.opcheck(gae_fwd, (rewards, values, mask, cu_seqlens, 1.0, 0.95))


def test_errors():
    ones, every = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"lam: expected a number in \[0, 1\], got 2.0"):
        gae(ones, ones, every, lam=2.0)
    with pytest.raises(ValueError, match=r"mask: expected shape \[2, 3\] like rewards"):
        gae(ones, ones, every[:1])
