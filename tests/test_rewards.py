import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import CASES, Case, cases
from tolerance import assert_close

from segkernels import (
    LocationNormalizer,
    RunningLocationNormalizer,
    ScalarNormalizer,
    TableNormalizer,
    scatter_segment_rewards,
)
from segkernels.native.rewards import scatter_segment_rewards_fwd

BACKENDS = ("reference", "native")
STORAGE = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")
INF = float("inf")

# Each with mean(p) and std(p) written out.
NORMALIZERS = {
    "none": (None, None, None),
    "line": (
        LocationNormalizer(0.8967, 0.8572, 0.5680, 4.1667),
        lambda p: 0.8967 * math.log(p) + 0.8572,
        lambda p: max(0.5680 * math.log(p) + 4.1667, 0.41667),
    ),
    "line that falls below its floor": (
        LocationNormalizer(1.7340, 1.3212, 3.9, 5.4513),
        lambda p: 1.7340 * math.log(p) + 1.3212,
        lambda p: max(3.9 * math.log(p) + 5.4513, 0.54513),
    ),
    "table": (
        TableNormalizer([0.25, 0.5, 0.75], [1.0, -1.0, 2.0], [0.5, 2.0, 1.0]),
        lambda p: {0: 1.0, 1: 1 - 8 * (p - 0.25), 2: -1 + 12 * (p - 0.5), 3: 2.0}[
            sum(p > x for x in (0.25, 0.5, 0.75))
        ],
        lambda p: {0: 0.5, 1: 0.5 + 6 * (p - 0.25), 2: 2 - 4 * (p - 0.5), 3: 1.0}[
            sum(p > x for x in (0.25, 0.5, 0.75))
        ],
    ),
    "scalar": (ScalarNormalizer(-0.5, 2.0), lambda p: -0.5, lambda p: 2.0),
}

backends = pytest.mark.parametrize("backend", BACKENDS)
case_names = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
normalizers = pytest.mark.parametrize("normalizer", NORMALIZERS)
CREDITS = [
    {"spread": "even", "reduction": "sum"},
    {"spread": "repeat", "reduction": "mean"},
    {"spread": "last", "reduction": "mean"},
]
credits = pytest.mark.parametrize("credit", CREDITS, ids=lambda c: c["spread"])


def draw(case: Case, dtype=torch.float32, seed=0):
    """Rewards (NaN wherever no segment ends), and ends at about a third of the action tokens."""
    g = torch.Generator().manual_seed(seed)
    ends = case.mask & (torch.rand(case.n_tokens, generator=g) < 0.3)
    rewards = 3 * torch.randn(case.n_tokens, generator=g)
    return rewards.to(dtype).masked_fill(~ends, NAN), ends


def naive_token_rewards(case, rewards, ends, mean, std, spread, reduction, clip):
    rewards, ends, mask = rewards.tolist(), ends.tolist(), case.mask.tolist()
    out, start = [0.0] * len(rewards), 0
    for length in case.lengths:
        segments, current = [], []
        for t in range(start, start + length):
            if mask[t]:
                current.append(t)
                if ends[t]:
                    segments.append(current)
                    current = []
        start += length
        for k, segment in enumerate(segments):
            p = (k + 1) / len(segments)
            r = rewards[segment[-1]]
            if mean is not None:
                r = (r - mean(p)) / std(p)
            if spread == "even":
                r /= len(segment)
            if reduction == "mean":
                r /= len(segments)
            for t in segment[-1:] if spread == "last" else segment:
                out[t] = min(max(r, -clip), clip)
    return torch.tensor(out, dtype=torch.float64)


@case_names
@normalizers
@credits
def test_reference_is_the_definition(case, normalizer, credit):
    rewards, ends = draw(case, torch.float64)
    fitted, mean, std = NORMALIZERS[normalizer]
    options = {**credit, "clip": 1.5}
    out = scatter_segment_rewards(
        rewards, ends, case.mask, cu_seqlens=case.cu_seqlens, normalizer=fitted, **options
    )
    expected = naive_token_rewards(case, rewards, ends, mean, std, **options)
    torch.testing.assert_close(out, expected)


def check_native(case, dtype, seed=0, **options):
    rewards, ends = draw(case, dtype, seed)
    options["cu_seqlens"] = case.cu_seqlens
    truth = scatter_segment_rewards(rewards.double(), ends, case.mask, **options)
    baseline, kernel = (
        scatter_segment_rewards(rewards, ends, case.mask, backend=backend, **options)
        for backend in BACKENDS
    )
    assert kernel.dtype == torch.float32
    assert_close(kernel, baseline, truth)
    assert torch.equal(kernel[~case.mask], torch.zeros_like(kernel[~case.mask]))


@case_names
@normalizers
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_native(case, normalizer, dtype):
    for credit in CREDITS:
        check_native(case, dtype, normalizer=NORMALIZERS[normalizer][0], **credit)


@given(cases(), st.sampled_from(list(NORMALIZERS)), st.integers(0, 2**31 - 1))
@settings(max_examples=30, deadline=None)
def test_random_layouts(case, normalizer, seed):
    check_native(case, torch.float32, seed, normalizer=NORMALIZERS[normalizer][0], clip=INF)


@backends
@case_names
def test_padded_equals_packed(case, backend):
    rewards, ends = draw(case)
    options = {"normalizer": NORMALIZERS["line"][0], "backend": backend}
    packed = scatter_segment_rewards(
        rewards, ends, case.mask, cu_seqlens=case.cu_seqlens, **options
    )
    padded = scatter_segment_rewards(
        case.grid(rewards, NAN), case.grid(ends, False), case.grid(case.mask, False), **options
    )
    assert torch.equal(case.flat(padded), packed)
    assert padded.isfinite().all()


@backends
def test_rows_do_not_matter_to_each_other(backend):
    case = CASES["holes"]
    rewards, ends = (case.grid(x, fill) for x, fill in zip(draw(case), (NAN, False), strict=True))
    mask = case.grid(case.mask, False)
    together = scatter_segment_rewards(rewards, ends, mask, backend=backend)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = scatter_segment_rewards(rewards[order], ends[order], mask[order], backend=backend)
    assert torch.equal(permuted, together[order])
    for row in range(len(order)):
        one = slice(row, row + 1)
        alone = scatter_segment_rewards(rewards[one], ends[one], mask[one], backend=backend)
        assert torch.equal(alone, together[one])


def test_threads_do_not_matter(two_threads):
    case = CASES["giant"]
    rewards, ends = (x.repeat(4) for x in draw(case))
    mask = case.mask.repeat(4)
    cu_seqlens = torch.tensor([0, *case.lengths * 4]).cumsum(0).int()
    many = scatter_segment_rewards(rewards, ends, mask, cu_seqlens=cu_seqlens)
    again = scatter_segment_rewards(rewards, ends, mask, cu_seqlens=cu_seqlens)
    torch.set_num_threads(1)
    one = scatter_segment_rewards(rewards, ends, mask, cu_seqlens=cu_seqlens)
    assert torch.equal(many, one)
    assert torch.equal(many, again)


@backends
def test_by_hand(backend):
    nan, yes, no = NAN, True, False
    rewards = torch.tensor([[nan, 6.0, nan, nan, 3.0, nan]])
    ends = torch.tensor([[no, yes, no, no, yes, no]])
    mask = torch.tensor([[yes, yes, no, yes, yes, yes]])

    def pay(**options):
        return scatter_segment_rewards(rewards, ends, mask, backend=backend, **options).tolist()

    assert pay() == [[3.0, 3.0, 0.0, 1.5, 1.5, 0.0]]
    assert pay(spread="repeat") == [[6.0, 6.0, 0.0, 3.0, 3.0, 0.0]]
    assert pay(spread="last") == [[0.0, 6.0, 0.0, 0.0, 3.0, 0.0]]
    assert pay(spread="last", reduction="mean") == [[0.0, 3.0, 0.0, 0.0, 1.5, 0.0]]
    assert pay(spread="last", clip=4.0) == [[0.0, 4.0, 0.0, 0.0, 3.0, 0.0]]
    assert pay(normalizer=ScalarNormalizer(5.0, 0.5)) == [[1.0, 1.0, 0.0, -2.0, -2.0, 0.0]]


@backends
@pytest.mark.parametrize("spread", ["even", "last"])
def test_mean_reduction_keeps_the_score_of_the_row(spread, backend):
    case = CASES["lengths"]
    rewards, ends = draw(case, torch.bfloat16)
    paid = scatter_segment_rewards(
        case.grid(rewards, NAN),
        case.grid(ends, False),
        case.grid(case.mask, False),
        spread=spread,
        reduction="mean",
        clip=INF,
        backend=backend,
    )
    for row, r, e in zip(paid, rewards.split(case.lengths), ends.split(case.lengths), strict=True):
        score = r[e].float().mean() if e.any() else torch.tensor(0.0)
        torch.testing.assert_close(row.sum(), score)


@backends
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_reward_that_is_not_finite_pays_nan_in_its_segment(bad, backend):
    rewards = torch.tensor([[0.0, bad, 0.0, 2.0], [0.0, 1.0, 0.0, 2.0]])
    ends = torch.tensor([[False, True, False, True]] * 2)
    mask = torch.ones(2, 4, dtype=torch.bool)
    out = scatter_segment_rewards(rewards, ends, mask, backend=backend)
    assert out.isnan().tolist() == [[True, True, False, False], [False] * 4]


@backends
def test_ends_at_masked_tokens_are_not_read(backend):
    rewards = torch.tensor([[1.0, NAN, 4.0]])
    ends = torch.tensor([[False, True, True]])
    mask = torch.tensor([[True, False, True]])
    out = scatter_segment_rewards(rewards, ends, mask, backend=backend)
    assert out.tolist() == [[2.0, 0.0, 2.0]]


@backends
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 4)])
def test_no_action_token(shape, backend):
    none = torch.zeros(shape, dtype=torch.bool)
    out = scatter_segment_rewards(torch.full(shape, NAN), none, none, backend=backend)
    assert torch.equal(out, torch.zeros(shape))


@backends
def test_not_differentiable(backend):
    rewards = torch.ones(1, 3, requires_grad=True)
    ends = torch.ones(1, 3, dtype=torch.bool)
    assert not scatter_segment_rewards(rewards, ends, ends, backend=backend).requires_grad


@pytest.mark.parametrize("normalizer", ["none", "line", "table"])
def test_custom_operator(normalizer):
    case = CASES["holes"]
    rewards, ends = draw(case)
    curve = None if normalizer == "none" else NORMALIZERS[normalizer][0].curve.packed
    args = (rewards, ends, case.mask, case.cu_seqlens, curve, 0, True, 10.0)
    torch.library.opcheck(scatter_segment_rewards_fwd, args)


@pytest.mark.parametrize("normalizer", ["none", "line", "table"])
def test_compiles(normalizer):
    case = CASES["holes"]
    rewards, ends = draw(case)
    fitted = NORMALIZERS[normalizer][0]

    def pay(rewards, ends, mask, cu_seqlens):
        return 2 * scatter_segment_rewards(
            rewards, ends, mask, cu_seqlens=cu_seqlens, normalizer=fitted
        )

    args = rewards, ends, case.mask, case.cu_seqlens
    compiled = torch.compile(pay, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), pay(*args))


def test_running_normalizer_applies_its_last_fit():
    case = CASES["lengths"]
    rewards, ends = draw(case)
    running = RunningLocationNormalizer()
    args = rewards, ends, case.mask
    running.update(*args, cu_seqlens=case.cu_seqlens)
    with pytest.raises(RuntimeError, match=r"call update\(.*refit\(\), or .* 'segrlhf fit-norm"):
        scatter_segment_rewards(*args, cu_seqlens=case.cu_seqlens, normalizer=running)
    best = running.refit().best
    of_running, of_fit = (
        scatter_segment_rewards(*args, cu_seqlens=case.cu_seqlens, normalizer=n)
        for n in (running, best)
    )
    assert torch.equal(of_running, of_fit)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"spread": "all"}, ValueError, "spread: expected one of even, repeat, last, got 'all'"),
        ({"reduction": "max"}, ValueError, "reduction: expected 'sum' or 'mean', got 'max'"),
        ({"clip": 0.0}, ValueError, "clip: expected a positive number, got 0.0; pass math.inf"),
        ({"clip": NAN}, ValueError, "clip: expected a positive number, got nan"),
        ({"normalizer": (0.0, 1.0)}, TypeError, "normalizer: expected a Location.*, got tuple"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask: expected bool, got torch.float32"),
        (
            {"ends": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            r"ends: expected shape \[2, 3\] like rewards, got \[2, 4\]",
        ),
        ({"rewards": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "rewards: expected float32"),
    ],
)
def test_errors(options, error, message):
    every = torch.ones(2, 3, dtype=torch.bool)
    arguments = {"rewards": torch.ones(2, 3), "ends": every, "mask": every, **options}
    with pytest.raises(error, match=message):
        scatter_segment_rewards(**arguments)
