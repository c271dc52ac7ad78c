import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import CASES, Case, cases
from streams import (
    BACKENDS,
    INF,
    NAN,
    assert_same_bits,
    assert_threads_do_not_matter,
    backends,
    case_names,
    doubles,
    draw,
    grids,
    of_giant_rows,
    storage,
)
from test_gae import naive_gae
from test_rewards import CREDITS, NORMALIZERS, naive_token_rewards
from test_segments import draw_entropy
from tolerance import assert_close

from segkernels import (
    gae,
    scatter_segment_rewards,
    segment_advantages,
    segment_ends,
    segment_ends_and_advantages,
    whiten,
)
from segkernels.native.advantages import segment_advantages_fwd, segment_ends_and_advantages_fwd


def draw_with_entropy(case: Case, dtype=torch.float32, seed=0):
    """entropy, rewards, logprobs, ref_logprobs, values, mask; NaN outside the mask."""
    rewards, _, *rest = draw(case, dtype, seed)
    return draw_entropy(case, dtype, seed), rewards, *rest


@case_names
@pytest.mark.parametrize("credit", CREDITS, ids=lambda c: c["spread"])
def test_reference_is_the_definition(case, credit):
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


def check(case, dtype, seed=0, **options):
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
def test_native(case, dtype):
    for normalizer, credit in zip(("none", "line", "table"), CREDITS, strict=True):
        check(case, dtype, normalizer=NORMALIZERS[normalizer][0], **credit)


@given(cases(), st.sampled_from(list(NORMALIZERS)), st.integers(0, 2**31 - 1))
@settings(max_examples=20, deadline=None)
def test_random_layouts(case, normalizer, seed):
    check(case, torch.float32, seed, normalizer=NORMALIZERS[normalizer][0])


def test_mixed_storage():
    args = list(draw(CASES["holes"], torch.float32))
    args[0], args[4] = args[0].bfloat16(), args[4].half()
    truth = segment_advantages(*doubles(args), cu_seqlens=CASES["holes"].cu_seqlens)
    baseline, kernel = (
        segment_advantages(*args, cu_seqlens=CASES["holes"].cu_seqlens, backend=b) for b in BACKENDS
    )
    for triple in zip(kernel, baseline, truth, strict=True):
        assert_close(*triple)


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
def test_its_parts(case, backend):
    rewards, ends, logprobs, ref_logprobs, values, mask = draw(case)
    where = {"cu_seqlens": case.cu_seqlens, "backend": backend}
    _, _, token_rewards, kl = segment_advantages(
        rewards, ends, logprobs, ref_logprobs, values, mask, **where
    )
    assert torch.equal(token_rewards, scatter_segment_rewards(rewards, ends, mask, **where))
    assert torch.equal(kl[mask], (logprobs - ref_logprobs)[mask])


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
    args, cu_seqlens = of_giant_rows()
    assert_threads_do_not_matter(lambda: segment_advantages(*args, cu_seqlens=cu_seqlens))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 4)])
@backends
def test_no_action_token(shape, backend):
    none = torch.zeros(shape, dtype=torch.bool)
    nan = torch.full(shape, NAN)
    out = segment_advantages(nan, none, nan, nan, nan, none, backend=backend)
    ends, *rest = segment_ends_and_advantages(nan, nan, nan, nan, nan, none, 1.0, backend=backend)
    assert torch.equal(ends, none)
    for x in (*out, *rest):
        assert torch.equal(x, torch.zeros(shape))


@backends
def test_not_differentiable(backend):
    args = [x.requires_grad_() if x.is_floating_point() else x for x in draw(CASES["full"])]
    where = {"cu_seqlens": CASES["full"].cu_seqlens, "backend": backend}
    out = segment_advantages(*args, **where)
    out += segment_ends_and_advantages(args[0], *args[2:5], args[4], args[5], 1.0, **where)
    assert not any(x.requires_grad for x in out)


def test_custom_operators():
    case = CASES["holes"]
    rewards, ends, logprobs, ref_logprobs, values, mask = draw(case)
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
