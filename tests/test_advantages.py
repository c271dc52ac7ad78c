import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import CASES, Case, cases
from ranks import on_ranks, whitened
from test_rewards import CREDITS, NORMALIZERS, naive_token_rewards
from test_segments import draw_entropy
from tolerance import assert_close

from segkernels import (
    gae,
    native,
    scatter_segment_rewards,
    segment_advantages,
    segment_ends,
    segment_ends_and_advantages,
    whiten,
)
from segkernels.native.advantages import segment_advantages_fwd, segment_ends_and_advantages_fwd
from segkernels.native.gae import gae_fwd
from segkernels.native.whiten import moments_fwd, whiten_fwd

BACKENDS = ("reference", "native")
STORAGE = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")
INF = float("inf")
DISCOUNTS = [(1.0, 0.95), (0.97, 1.0), (1.0, 1.0), (0.9, 0.0)]

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


def doubles(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


@case_names
@pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)
def test_gae_reference_is_the_definition(case, gamma, lam):
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
def test_gae_native(case, dtype):
    for gamma, lam in DISCOUNTS:
        check_gae(case, dtype, gamma=gamma, lam=lam)


@given(cases(), st.sampled_from(DISCOUNTS), st.integers(0, 2**31 - 1))
@settings(max_examples=20, deadline=None)
def test_gae_random_layouts(case, discounts, seed):
    check_gae(case, torch.float32, seed, gamma=discounts[0], lam=discounts[1])


@backends
def test_gae_by_hand(backend):
    # A hole neither discounts nor adds.
    rewards = torch.tensor([[1.0, NAN, 2.0], [4.0, NAN, NAN]])
    values = torch.tensor([[0.5, NAN, 1.0], [8.0, NAN, NAN]])
    mask = torch.tensor([[True, False, True], [True, False, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5, backend=backend)
    assert advantages.tolist() == [[1.0 + 0.5 - 0.5 + 0.25, 0.0, 1.0], [-4.0, 0.0, 0.0]]
    assert returns.tolist() == [[1.75, 0.0, 2.0], [4.0, 0.0, 0.0]]


@case_names
@pytest.mark.parametrize("credit", CREDITS, ids=lambda c: c["spread"])
def test_advantages_reference_is_the_definition(case, credit):
    rewards, ends, logprobs, ref_logprobs, values, mask = draw(case, torch.float64)
    fitted, mean, std = NORMALIZERS["table"]
    out = segment_advantages(
        *(rewards, ends, logprobs, ref_logprobs, values, mask),
        cu_seqlens=case.cu_seqlens,
        normalizer=fitted,
        clip=2.0,
        kl_coef=0.1,
        gamma=0.99,
        lam=0.9,
        **credit,
    )
    token_rewards = naive_token_rewards(case, rewards, ends, mean, std, clip=2.0, **credit)
    kl = torch.where(mask, logprobs - ref_logprobs, 0.0)
    expected = naive_gae(case, token_rewards - 0.1 * kl, values, 0.99, 0.9)
    torch.testing.assert_close(out, (*expected, token_rewards, kl))


def check_advantages(case, dtype, seed=0, **options):
    args = draw(case, dtype, seed)
    options["cu_seqlens"] = case.cu_seqlens
    truth = segment_advantages(*doubles(args), **options)
    baseline, kernel = (segment_advantages(*args, backend=b, **options) for b in BACKENDS)
    names = "advantages", "returns", "token_rewards", "kl"
    for name, *triple in zip(names, kernel, baseline, truth, strict=True):
        assert triple[0].dtype == torch.float32
        assert_close(*triple, name)
        assert not triple[0][~case.mask].any()


@case_names
@storage
def test_advantages_native(case, dtype):
    for normalizer, credit in zip(("none", "line", "table"), CREDITS, strict=True):
        check_advantages(case, dtype, normalizer=NORMALIZERS[normalizer][0], **credit)


@given(cases(), st.sampled_from(list(NORMALIZERS)), st.integers(0, 2**31 - 1))
@settings(max_examples=20, deadline=None)
def test_advantages_random_layouts(case, normalizer, seed):
    check_advantages(case, torch.float32, seed, normalizer=NORMALIZERS[normalizer][0])


def test_advantages_of_mixed_storage():
    args = list(draw(CASES["holes"], torch.float32))
    args[0], args[4] = args[0].bfloat16(), args[4].half()
    truth = segment_advantages(*doubles(args), cu_seqlens=CASES["holes"].cu_seqlens)
    baseline, kernel = (
        segment_advantages(*args, cu_seqlens=CASES["holes"].cu_seqlens, backend=b) for b in BACKENDS
    )
    for triple in zip(kernel, baseline, truth, strict=True):
        assert_close(*triple)


def draw_with_entropy(case: Case, dtype=torch.float32, seed=0):
    """entropy, rewards, logprobs, ref_logprobs, values, mask; NaN outside the mask."""
    rewards, _, *rest = draw(case, dtype, seed)
    return draw_entropy(case, dtype, seed), rewards, *rest


def one_after_the_other(
    *streams,
    threshold=1.0,
    entropy_of="next",
    exclude_last=True,
    cu_seqlens=None,
    backend,
    **options,
):
    """What ``segment_ends_and_advantages`` is."""
    entropy, rewards, *rest, mask = streams
    where = {"cu_seqlens": cu_seqlens, "backend": backend}
    cuts = {"entropy_of": entropy_of, "exclude_last": exclude_last}
    ends = segment_ends(entropy, mask, threshold, **cuts, **where)
    return ends, *segment_advantages(rewards, ends, *rest, mask, **options, **where)


def assert_same_bits(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@backends
@case_names
@pytest.mark.parametrize("entropy_of", ["next", "current"])
@pytest.mark.parametrize("exclude_last", [True, False, "by row"])
def test_ends_and_advantages_at_once(case, backend, entropy_of, exclude_last):
    if exclude_last == "by row":
        g = torch.Generator().manual_seed(1)
        exclude_last = torch.rand(len(case.lengths), generator=g) < 0.5
    line = {"normalizer": NORMALIZERS["line"][0], "cu_seqlens": case.cu_seqlens}
    cuts = {"entropy_of": entropy_of, "exclude_last": exclude_last, "backend": backend}
    streams = draw_with_entropy(case)
    at_once = segment_ends_and_advantages(*streams, 1.0, **cuts, **line)
    assert_same_bits(at_once, one_after_the_other(*streams, **cuts, **line))


@backends
@storage
def test_ends_and_advantages_of_stored_halves_and_of_a_mixture(backend, dtype):
    case = CASES["giant"]
    where = {"cu_seqlens": case.cu_seqlens, "backend": backend}
    streams = list(draw_with_entropy(case, dtype))
    for _ in range(2):
        at_once = segment_ends_and_advantages(*streams, 1.0, **where)
        assert_same_bits(at_once, one_after_the_other(*streams, **where))
        streams[0], streams[2] = streams[0].float(), streams[2].float()


@backends
def test_nan_entropy_is_an_error(backend):
    streams = [torch.zeros(3, 4) for _ in range(5)]
    streams[0][1, 2] = NAN
    mask = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"entropy: .* got NaN at row 1, position 2; look for NaN"):
        segment_ends_and_advantages(*streams, mask, 1.0, backend=backend)
    mask[1, 2] = False
    segment_ends_and_advantages(*streams, mask, 1.0, backend=backend)


@backends
@case_names
def test_advantages_are_its_parts(case, backend):
    rewards, ends, logprobs, ref_logprobs, values, mask = draw(case)
    where = {"cu_seqlens": case.cu_seqlens, "backend": backend}
    _, _, token_rewards, kl = segment_advantages(
        rewards, ends, logprobs, ref_logprobs, values, mask, **where
    )
    assert torch.equal(token_rewards, scatter_segment_rewards(rewards, ends, mask, **where))
    assert torch.equal(kl[mask], (logprobs - ref_logprobs)[mask])


def grids(case, args):
    return [case.grid(x, NAN if x.is_floating_point() else False) for x in args]


@backends
@case_names
def test_padded_equals_packed(case, backend):
    args = draw(case)
    packed = segment_advantages(*args, cu_seqlens=case.cu_seqlens, backend=backend)
    padded = segment_advantages(*grids(case, args), backend=backend)
    for flat, grid in zip(packed, padded, strict=True):
        assert torch.equal(case.flat(grid), flat)
        assert grid.isfinite().all()


@backends
def test_rows_do_not_matter_to_each_other(backend):
    args = grids(CASES["holes"], draw(CASES["holes"]))
    together = segment_advantages(*args, backend=backend)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = segment_advantages(*(x[order] for x in args), backend=backend)
    for a, b in zip(permuted, together, strict=True):
        assert torch.equal(a, b[order])
    args[0][1, args[1][1]] = NAN
    poisoned = segment_advantages(*args, backend=backend)
    others = [0, 2, 3, 4, 5]
    for a, b in zip(poisoned, together, strict=True):
        assert torch.equal(a[others], b[others])


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


@given(st.lists(st.integers(1, 70), min_size=2, max_size=40), st.integers(0, 2**31 - 1))
@settings(max_examples=50, deadline=None)
def test_holes_change_no_bit(runs, seed):
    """Runs of action tokens with holes between them give what the tokens give side by side."""
    mask = torch.cat([torch.full((n,), i % 2 == 0) for i, n in enumerate(runs)])[None]
    g = torch.Generator().manual_seed(seed)
    rewards, logprobs, ref_logprobs, values = torch.randn(4, *mask.shape, generator=g)
    ends = segment_ends(torch.rand(mask.shape, generator=g), mask, 0.8)
    holes = segment_advantages(rewards, ends, logprobs, ref_logprobs, values, mask, lam=0.9)
    args = (x[mask][None] for x in (rewards, ends, logprobs, ref_logprobs, values, mask))
    for a, b in zip(holes, segment_advantages(*args, lam=0.9), strict=True):
        assert torch.equal(a[mask], b[0])
        assert not a[~mask].any()


def test_threads_do_not_matter(two_threads):
    args = [x.repeat(4) for x in draw(CASES["giant"])]
    cu_seqlens = torch.tensor([0, *CASES["giant"].lengths * 4]).cumsum(0).int()

    def everything():
        out = segment_advantages(*args, cu_seqlens=cu_seqlens)
        out += gae(args[0], args[4], args[5], cu_seqlens=cu_seqlens)
        return (*out, whiten(out[0], args[5]), whiten(args[0], args[5], center=False))

    many, again = everything(), everything()
    torch.set_num_threads(1)
    for a, b, c in zip(many, again, everything(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


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


# Whitening


def naive_whiten(x, mask, center):
    chosen = [v for v, m in zip(x.flatten().tolist(), mask.flatten().tolist(), strict=True) if m]
    mean = math.fsum(chosen) / len(chosen)
    variance = math.fsum((v - mean) ** 2 for v in chosen) / len(chosen)
    shift = 0 if center else mean
    out = (x - mean) / math.sqrt(max(variance, 1e-8)) + shift
    return torch.where(mask, out, 0.0)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("name", ["full", "holes", "giant", "one action token"])
def test_whiten_reference_is_the_definition(name, center):
    case = CASES[name]
    x = draw(case, torch.float64)[0] + 5
    torch.testing.assert_close(
        whiten(x, case.mask, center=center), naive_whiten(x, case.mask, center)
    )


@case_names
@storage
@pytest.mark.parametrize("center", [True, False])
def test_whiten_native(case, dtype, center):
    x = draw(case, dtype)[0] + 5
    truth = whiten(x.double(), case.mask, center=center)
    baseline, kernel = (whiten(x, case.mask, center=center, backend=b) for b in BACKENDS)
    assert kernel.dtype == torch.float32
    assert_close(kernel, baseline, truth)
    padded = whiten(case.grid(x, NAN), case.grid(case.mask, False), center=center)
    assert_close(case.flat(padded), baseline, truth)


@backends
def test_whiten_keeps_its_floor_and_its_zeros(backend):
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


def test_whiten_is_exact_across_ranks(tmp_path):
    case = CASES["holes"]
    x, mask = case.grid(draw(case)[0] + 5, NAN), case.grid(case.mask, False)
    unequal = slice(0, 1), slice(1, None)
    by_rank = on_ranks(whitened, 2, tmp_path, [(x[part], mask[part]) for part in unequal], BACKENDS)
    truth = whiten(x.double(), mask)
    baseline = whiten(x, mask, backend="reference")
    for parts in zip(*by_rank, strict=True):
        assert_close(torch.cat(parts), baseline, truth)


# Everything else


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 4)])
@backends
def test_no_action_token(shape, backend):
    none = torch.zeros(shape, dtype=torch.bool)
    nan = torch.full(shape, NAN)
    out = segment_advantages(nan, none, nan, nan, nan, none, backend=backend)
    ends, *rest = segment_ends_and_advantages(nan, nan, nan, nan, nan, none, 1.0, backend=backend)
    assert torch.equal(ends, none)
    out += (*rest, *gae(nan, nan, none, backend=backend))
    for x in (*out, whiten(nan, none, backend=backend)):
        assert torch.equal(x, torch.zeros(shape))


@backends
def test_not_differentiable(backend):
    args = [x.requires_grad_() if x.is_floating_point() else x for x in draw(CASES["full"])]
    where = {"cu_seqlens": CASES["full"].cu_seqlens, "backend": backend}
    out = segment_advantages(*args, **where)
    out += gae(args[0], args[4], args[5], **where)
    out += (whiten(args[0], args[5], backend=backend),)
    out += segment_ends_and_advantages(args[0], *args[2:5], args[4], args[5], 1.0, **where)
    assert not any(x.requires_grad for x in out)


def test_custom_operators():
    case = CASES["holes"]
    rewards, ends, logprobs, ref_logprobs, values, mask = draw(case)
    torch.library.opcheck(gae_fwd, (rewards, values, mask, case.cu_seqlens, 1.0, 0.95))
    curve = NORMALIZERS["table"][0].curve.packed
    streams = rewards, ends, logprobs, ref_logprobs, values, mask, case.cu_seqlens
    torch.library.opcheck(
        segment_advantages_fwd, (*streams, curve, 0, False, 10.0, 0.01, 1.0, 0.95)
    )
    rows = mask.new_ones(len(case.lengths))
    for exclude_last in (None, rows):
        torch.library.opcheck(
            segment_ends_and_advantages_fwd,
            (
                *(values, 1.0, False, exclude_last, True),
                *(rewards, logprobs, ref_logprobs, values, mask, case.cu_seqlens),
                *(curve, 0, False, 10.0, 0.01, 1.0, 0.95),
            ),
        )
    torch.library.opcheck(moments_fwd, (values, mask))
    torch.library.opcheck(whiten_fwd, (values, mask, moments_fwd(values, mask), True))


def test_compiles():
    case = CASES["holes"]

    def step(rewards, ends, logprobs, ref_logprobs, values, mask, cu_seqlens):
        advantages, returns, token_rewards, kl = segment_advantages(
            *(rewards, ends, logprobs, ref_logprobs, values, mask),
            cu_seqlens=cu_seqlens,
            normalizer=NORMALIZERS["line"][0],
        )
        again, _ = gae(token_rewards - 0.01 * kl, values, mask, cu_seqlens=cu_seqlens)
        at_once = segment_ends_and_advantages(
            *(values, rewards, logprobs, ref_logprobs, values, mask, 1.0), cu_seqlens=cu_seqlens
        )
        return whiten(advantages, mask), whiten(again, mask), returns, *at_once

    args = *draw(case), case.cu_seqlens
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*args), step(*args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gamma": 1.5}, ValueError, r"gamma: expected a number in \[0, 1\], got 1.5; 1.0 disc"),
        ({"lam": -0.1}, ValueError, r"lam: expected a number in \[0, 1\], got -0.1"),
        ({"gamma": NAN}, ValueError, r"gamma: expected a number in \[0, 1\], got nan"),
        ({"kl_coef": NAN}, ValueError, "kl_coef: expected a finite number, got nan; pass 0.0"),
        ({"kl_coef": INF}, ValueError, "kl_coef: expected a finite number, got inf"),
        ({"spread": "all"}, ValueError, "spread: expected one of even, repeat, last"),
        (
            {"values": torch.ones(2, 4)},
            ValueError,
            r"values: expected shape \[2, 3\] like rewards, got \[2, 4\]; pass the values of",
        ),
        ({"logprobs": torch.ones(2, 3).int()}, TypeError, "logprobs: expected float32"),
    ],
)
def test_errors(options, error, message):
    ones, every = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    names = "rewards", "ends", "logprobs", "ref_logprobs", "values", "mask"
    defaults = dict(zip(names, (ones, every, ones, ones, ones, every), strict=True))
    with pytest.raises(error, match=message):
        segment_advantages(**{**defaults, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": NAN}, ValueError, r"threshold: expected nats or \+-inf, got NaN"),
        (
            {"entropy_of": "last"},
            ValueError,
            "entropy_of: expected 'next' or 'current'",
        ),
        (
            {"exclude_last": torch.ones(3, dtype=torch.bool)},
            ValueError,
            r"exclude_last: expected shape \[2\], one per row, got \[3\]",
        ),
        (
            {"rewards": torch.ones(2, 4)},
            ValueError,
            r"rewards: expected shape \[2, 3\] like entropy, got \[2, 4\]",
        ),
        ({"entropy": torch.ones(2, 3).int()}, TypeError, "entropy: expected float32"),
        ({"kl_coef": NAN}, ValueError, "kl_coef: expected a finite number, got nan"),
        ({"gamma": 1.5}, ValueError, r"gamma: expected a number in \[0, 1\], got 1.5"),
        ({"clip": 0.0}, ValueError, "clip: expected a positive number, got 0.0"),
    ],
)
def test_errors_of_ends_and_advantages(options, error, message):
    names = "entropy", "rewards", "logprobs", "ref_logprobs", "values"
    defaults = {name: torch.ones(2, 3) for name in names} | {
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "threshold": 1.0,
    }
    with pytest.raises(error, match=message):
        segment_ends_and_advantages(**{**defaults, **options})


def test_errors_of_gae_and_whiten():
    ones, every = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"lam: expected a number in \[0, 1\], got 2.0"):
        gae(ones, ones, every, lam=2.0)
    with pytest.raises(ValueError, match=r"mask: expected shape \[2, 3\] like rewards"):
        gae(ones, ones, every[:1])
    with pytest.raises(ValueError, match=r"mask: expected shape \[2, 3\] like x, got \[1, 3\]"):
        whiten(ones, every[:1])
    with pytest.raises(TypeError, match="x: expected float32"):
        whiten(ones.int(), every)
