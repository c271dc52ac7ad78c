import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import CASES, Case, cases
from tolerance import assert_close

from segkernels import BradleyTerry, segment_bradley_terry, segment_scores
from segkernels.native.bradley_terry import (
    segment_bradley_terry_bwd,
    segment_bradley_terry_fwd,
    segment_scores_bwd,
    segment_scores_fwd,
)

BACKENDS = ("reference", "native")
STORAGE = (torch.float32, torch.bfloat16, torch.float16)
FP32_SUM = {"rtol": 1e-5, "atol": 1e-5}  # what a plain sum of thousands of fp32 may lose
NAN = float("nan")
INF = float("inf")

backends = pytest.mark.parametrize("backend", BACKENDS)
storage = pytest.mark.parametrize("dtype", STORAGE, ids=str)
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])
case_names = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
PAIRS = {name: case for name, case in CASES.items() if len(case.lengths) % 2 == 0}
pair_names = pytest.mark.parametrize("case", PAIRS.values(), ids=PAIRS.keys())


def draw(case: Case, dtype=torch.float32, seed=0):
    """Rewards (NaN wherever no segment ends) and ends."""
    g = torch.Generator().manual_seed(seed)
    ends = case.mask & (torch.rand(case.n_tokens, generator=g) < 0.3)
    rewards = torch.randn(case.n_tokens, generator=g).to(dtype).masked_fill(~ends, NAN)
    return rewards, ends


def naive_scores(rewards, ends, lengths, reduction):
    scores, start = [], 0
    for length in lengths:
        r = [rewards[t] for t in range(start, start + length) if ends[t]]
        start += length
        total = math.fsum(r)
        scores.append(total / len(r) if r and reduction == "mean" else total)
    return scores


def naive_loss(scores, margin, smoothing, center):
    half = len(scores) // 2
    losses = []
    for i in range(half):
        d = scores[i] - scores[half + i] - margin[i]
        p = 1 / (1 + math.exp(-d))
        loss = -(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p)
        losses.append(loss + center * (scores[i] + scores[half + i]) ** 2)
    right = sum(scores[i] > scores[half + i] for i in range(half))
    return math.fsum(losses) / half, right / half


@backends
@reductions
@case_names
def test_scores_of_named_layouts(case, reduction, backend):
    rewards, ends = draw(case)
    expected = naive_scores(rewards.tolist(), ends.tolist(), case.lengths, reduction)
    options = {"reduction": reduction, "backend": backend}
    packed = segment_scores(rewards, ends, case.mask, cu_seqlens=case.cu_seqlens, **options)
    assert packed.dtype == torch.float32
    torch.testing.assert_close(packed, torch.tensor(expected), **FP32_SUM)
    padded = segment_scores(case.grid(rewards, NAN), case.grid(ends, False), **options)
    assert torch.equal(packed, padded)


@backends
def test_by_hand(backend):
    rewards = torch.tensor([[2.0, NAN, 4.0], [NAN, 1.0, NAN]], requires_grad=True)
    ends = torch.tensor([[True, False, True], [False, True, False]])
    out = segment_bradley_terry(rewards, ends, backend=backend)
    assert isinstance(out, BradleyTerry)
    assert out.scores.tolist() == [3.0, 1.0]
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)
    assert out.accuracy.item() == 1.0
    out.loss.backward()
    slope = 1 / (1 + math.exp(2))
    expected = torch.tensor([[-slope / 2, 0, -slope / 2], [0, slope, 0]])
    torch.testing.assert_close(rewards.grad, expected)


@backends
@reductions
@pair_names
@pytest.mark.parametrize(
    ("smoothing", "center", "margins"), [(0.0, 0.0, False), (0.1, 0.01, True), (1.0, 0.0, True)]
)
def test_loss_of_named_layouts(case, smoothing, center, margins, reduction, backend):
    rewards, ends = draw(case)
    if reduction == "sum":
        rewards = rewards / 100  # the naive logarithms have no room for large scores
    half = len(case.lengths) // 2
    margin = torch.linspace(-1, 2, half) if margins else None
    scores = naive_scores(rewards.tolist(), ends.tolist(), case.lengths, reduction)
    loss, accuracy = naive_loss(
        scores, margin.tolist() if margins else [0.0] * half, smoothing, center
    )
    options = {
        "reduction": reduction,
        "margin": margin,
        "label_smoothing": smoothing,
        "center_coef": center,
        "backend": backend,
    }
    out = segment_bradley_terry(rewards, ends, case.mask, cu_seqlens=case.cu_seqlens, **options)
    assert out.loss.item() == pytest.approx(loss, rel=1e-5)
    assert out.accuracy.item() == pytest.approx(accuracy)
    torch.testing.assert_close(out.scores, torch.tensor(scores), **FP32_SUM)
    padded = segment_bradley_terry(case.grid(rewards, NAN), case.grid(ends, False), **options)
    assert all(torch.equal(a, b) for a, b in zip(out, padded, strict=True))


def value_and_gradient(op, rewards, weights):
    rewards = rewards.detach().requires_grad_()
    out = op(rewards)
    total = sum((x * w.to(x.dtype)).sum() for x, w in zip(out, weights, strict=True))
    (gradient,) = torch.autograd.grad(total, rewards)
    return *[x.detach() for x in out], gradient


def check_rule(op, rewards, weights):
    """tests/tolerance.py for every output and the gradient."""
    truth = value_and_gradient(lambda r: op(r, "reference"), rewards.double(), weights)
    baseline = value_and_gradient(lambda r: op(r, "reference"), rewards, weights)
    kernel = value_and_gradient(lambda r: op(r, "native"), rewards, weights)
    assert kernel[-1].dtype == rewards.dtype
    for i, (k, b, t) in enumerate(zip(kernel, baseline, truth, strict=True)):
        assert_close(k, b, t, f"output {i}")


@storage
@reductions
@case_names
def test_native_scores_within_tolerance(case, reduction, dtype):
    rewards, ends = draw(case, dtype)
    weight = torch.linspace(-1, 1, len(case.lengths)).double()

    def op(r, backend):
        return (
            segment_scores(
                r, ends, cu_seqlens=case.cu_seqlens, reduction=reduction, backend=backend
            ),
        )

    check_rule(op, rewards, [weight])


@storage
@reductions
@pair_names
def test_native_loss_within_tolerance(case, reduction, dtype):
    rewards, ends = draw(case, dtype)
    n_rows = len(case.lengths)
    margin = torch.linspace(-1, 2, n_rows // 2)

    def op(r, backend):
        out = segment_bradley_terry(
            r,
            ends,
            cu_seqlens=case.cu_seqlens,
            reduction=reduction,
            margin=margin,
            label_smoothing=0.1,
            center_coef=0.01,
            backend=backend,
        )
        return out.loss, out.scores

    weights = [torch.tensor(3.0).double(), torch.linspace(-1, 1, n_rows).double()]
    check_rule(op, rewards, weights)


@given(cases(even=True), st.sampled_from(["mean", "sum"]), st.integers(0, 2**31 - 1))
@settings(max_examples=30, deadline=None)
def test_random_layouts(case, reduction, seed):
    rewards, ends = draw(case, seed=seed)

    def op(r, backend):
        out = segment_bradley_terry(
            r, ends, case.mask, cu_seqlens=case.cu_seqlens, reduction=reduction, backend=backend
        )
        return out.loss, out.scores

    check_rule(op, rewards, [torch.ones(()).double(), torch.zeros(len(case.lengths)).double()])


@pytest.mark.parametrize("packed", [True, False])
@reductions
def test_gradcheck(packed, reduction):
    case = CASES["full"]
    rewards, ends = draw(case, torch.float64)
    cu = case.cu_seqlens if packed else None
    if not packed:
        rewards, ends = case.grid(rewards, NAN), case.grid(ends, False)
    rewards = rewards.nan_to_num().requires_grad_()
    options = {"cu_seqlens": cu, "reduction": reduction}
    torch.autograd.gradcheck(lambda r: segment_scores(r, ends, **options), rewards)

    def loss(r):
        out = segment_bradley_terry(
            r,
            ends,
            margin=torch.linspace(-1, 1, len(case.lengths) // 2),
            label_smoothing=0.2,
            center_coef=0.1,
            **options,
        )
        return out.loss, out.scores

    torch.autograd.gradcheck(loss, rewards)


@backends
def test_row_without_segment(backend):
    rewards = torch.full((4, 3), NAN, requires_grad=True)
    ends = torch.zeros(4, 3, dtype=torch.bool)
    out = segment_bradley_terry(rewards, ends, backend=backend)
    assert out.scores.tolist() == [0.0] * 4
    assert out.loss.item() == pytest.approx(math.log(2))
    assert out.accuracy.item() == 0.0
    (out.loss + out.scores.sum()).backward()
    assert rewards.grad.tolist() == [[0.0] * 3] * 4
    empty = segment_bradley_terry(torch.zeros(2, 0), torch.zeros(2, 0).bool(), backend=backend)
    assert empty.loss.item() == pytest.approx(math.log(2))


@backends
def test_no_rows_have_no_scores(backend):
    empty = torch.empty(0, 5)
    assert segment_scores(empty, empty.bool(), backend=backend).shape == (0,)


@backends
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("d", [1e4, -1e4, 3e38, -3e38, 100.0, -100.0])
def test_finite_for_any_finite_difference(d, smoothing, backend):
    rewards = torch.tensor([[d]] * 3 + [[0.0]] * 3, requires_grad=True)
    ends = torch.ones(6, 1, dtype=torch.bool)
    out = segment_bradley_terry(rewards, ends, label_smoothing=smoothing, backend=backend)
    expected = (1 - smoothing) * max(-d, 0) + smoothing * max(d, 0)
    assert out.loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-30)
    out.loss.backward()
    slope = (smoothing if d > 0 else smoothing - 1) / 3
    torch.testing.assert_close(rewards.grad[:3], torch.full((3, 1), slope))
    torch.testing.assert_close(rewards.grad[3:], torch.full((3, 1), -slope))


@backends
def test_infinite_scores_do_not_leak_into_terms_that_are_off(backend):
    rewards = torch.tensor([[INF], [0.0]], requires_grad=True)
    out = segment_bradley_terry(rewards, torch.ones(2, 1).bool(), backend=backend)
    assert out.loss.item() == 0.0
    out.loss.backward()
    assert rewards.grad.tolist() == [[0.0], [0.0]]


@backends
def test_nan_at_an_end_stays_in_its_row(backend):
    rewards = torch.tensor([[NAN, 1.0], [2.0, NAN], [3.0, 0.0], [1.0, 0.0]])
    ends = torch.tensor([[True, True], [True, False], [True, False], [True, False]])
    out = segment_bradley_terry(rewards, ends, backend=backend)
    assert out.scores.isnan().tolist() == [True, False, False, False]
    assert out.loss.isnan()
    assert out.accuracy.item() == 0.5


@backends
def test_accuracy_counts_neither_margin_nor_ties(backend):
    rewards = torch.tensor([[1.0], [2.0], [5.0], [0.0], [2.0], [6.0]])
    out = segment_bradley_terry(
        rewards, torch.ones(6, 1).bool(), margin=torch.full((3,), 9.0), backend=backend
    )
    assert out.accuracy.item() == pytest.approx(1 / 3)
    assert not out.accuracy.requires_grad


@backends
def test_margin_is_a_constant(backend):
    rewards = torch.randn(4, 3, requires_grad=True)
    margin = torch.ones(2, requires_grad=True)
    out = segment_bradley_terry(rewards, torch.ones(4, 3).bool(), margin=margin, backend=backend)
    out.loss.backward()
    assert margin.grad is None
    assert rewards.grad is not None


def test_double_margin_makes_the_loss_double():
    rewards, ends = torch.randn(2, 3), torch.ones(2, 3).bool()
    out = segment_bradley_terry(rewards, ends, margin=torch.ones(1).double())
    assert {x.dtype for x in out} == {torch.float64}


@backends
def test_without_gradient(backend):
    out = segment_bradley_terry(torch.randn(4, 3), torch.ones(4, 3).bool(), backend=backend)
    assert not out.loss.requires_grad
    assert not out.scores.requires_grad


@backends
@pytest.mark.parametrize("which", ["loss", "scores"])
def test_gradient_through_one_output(which, backend):
    rewards = torch.randn(4, 6, requires_grad=True)
    ends = torch.ones(4, 6, dtype=torch.bool)
    out = segment_bradley_terry(rewards, ends, center_coef=0.1, backend=backend)
    getattr(out, which).sum().backward()
    again = segment_scores(rewards.detach().requires_grad_(), ends, backend="reference")
    chosen, rejected = again.double().chunk(2)
    if which == "scores":
        expected = torch.ones(4).double()
    else:
        dd = -torch.sigmoid(rejected - chosen) / 2
        dsum = 0.2 * (chosen + rejected) / 2
        expected = torch.cat([dd + dsum, dsum - dd]).detach()
    torch.testing.assert_close(rewards.grad, (expected / 6).float()[:, None].expand(4, 6))


@backends
@reductions
def test_rows_are_independent(reduction, backend):
    case = CASES["lengths"]
    rewards, ends = draw(case)
    rewards, ends = case.grid(rewards, NAN), case.grid(ends, False)
    options = {"reduction": reduction, "backend": backend}
    scores = segment_scores(rewards, ends, **options)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(1))
    assert torch.equal(segment_scores(rewards[order], ends[order], **options), scores[order])
    for row in range(len(rewards)):
        alone = segment_scores(rewards[row : row + 1], ends[row : row + 1], **options)
        assert torch.equal(alone[0], scores[row])


@backends
def test_strided_inputs(backend):
    rewards, ends = torch.randn(6, 4), torch.rand(6, 4) < 0.5
    expected = segment_bradley_terry(rewards, ends, ends, backend=backend)
    turned = [x.t().contiguous().t() for x in (rewards, ends, ends)]
    margin = torch.zeros(6)[::2]
    out = segment_bradley_terry(*turned, margin=margin, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@reductions
def test_long_rows_are_accurate(reduction):
    """A hundred thousand segments around 1000: a plain fp32 sum loses four digits."""
    g = torch.Generator().manual_seed(0)
    rewards = 1000 + torch.randn(2, 100_000, generator=g)
    ends = torch.ones_like(rewards, dtype=torch.bool)
    scores = segment_scores(rewards, ends, reduction=reduction, backend="native")
    exact = rewards.double().sum(1) if reduction == "sum" else rewards.double().mean(1)
    assert torch.equal(scores, exact.float())


def test_threads_do_not_matter(two_threads):
    case = CASES["giant"]
    rewards, ends = draw(case)

    def run():
        leaf = rewards.clone().requires_grad_()
        out = segment_bradley_terry(leaf, ends, cu_seqlens=case.cu_seqlens, backend="native")
        out.loss.backward()
        return *out, leaf.grad

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


REWARDS = torch.zeros(4, 3)
ENDS = torch.zeros(4, 3, dtype=torch.bool)


@backends
@pytest.mark.parametrize("op", [segment_scores, segment_bradley_terry])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rewards": torch.zeros(3)}, ValueError, r"rewards: expected shape \[rows, tokens\]"),
        ({"rewards": REWARDS.int()}, TypeError, "rewards: expected float32, .* got torch.int32"),
        ({"ends": ENDS.int()}, TypeError, r"ends: expected bool, .*; pass ends.bool\(\)"),
        ({"ends": ENDS[:3]}, ValueError, r"ends: expected shape \[4, 3\] like rewards, got \[3"),
        ({"mask": ENDS.int()}, TypeError, r"mask: expected bool, .*; pass mask.bool\(\)"),
        ({"mask": ENDS[:, :2]}, ValueError, r"mask: expected shape \[4, 3\] like rewards, got \["),
        ({"reduction": "max"}, ValueError, "reduction: expected 'mean' or 'sum', got 'max'"),
    ],
)
def test_bad_arguments(op, changed, error, message, backend):
    arguments = {"rewards": REWARDS, "ends": ENDS, "backend": backend} | changed
    with pytest.raises(error, match=message):
        op(**arguments)


@backends
@pytest.mark.parametrize("op", [segment_scores, segment_bradley_terry])
def test_ends_outside_the_mask_are_not_read(op, backend):
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[2, 1] = mask[3, 0] = False
    ends = torch.ones_like(mask)
    rewards = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    kept = rewards.clone().requires_grad_()
    inside = op(kept, ends & mask, mask, backend=backend)
    poisoned = rewards.masked_fill(~mask, NAN).requires_grad_()
    outside = op(poisoned, ends, mask, backend=backend)
    pick = (lambda out: out) if op is segment_scores else (lambda out: out.scores)
    assert torch.equal(pick(inside), pick(outside))
    gradients = [
        torch.autograd.grad(pick(out).sum(), x)[0]
        for out, x in ((inside, kept), (outside, poisoned))
    ]
    assert torch.equal(*gradients)


@backends
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rewards": REWARDS[:3], "ends": ENDS[:3]}, ValueError, "even number of rows, .* got 3"),
        ({"rewards": REWARDS[:0], "ends": ENDS[:0]}, ValueError, "at least 2, got 0; stack all"),
        ({"margin": torch.zeros(4)}, ValueError, r"margin: expected shape \[2\], .* got \[4\]"),
        ({"margin": torch.zeros(2, device="meta")}, ValueError, "margin: expected device cpu like"),
        ({"margin": torch.zeros(2).long()}, TypeError, "margin: expected float32, .* torch.int64"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: .* in \[0, 1\], got 1.5"),
        ({"label_smoothing": NAN}, ValueError, r"label_smoothing: .* in \[0, 1\], got nan"),
        ({"center_coef": -1.0}, ValueError, r"center_coef: expected a weight >= 0, got -1.0"),
        ({"center_coef": NAN}, ValueError, r"center_coef: expected a weight >= 0, got nan"),
    ],
)
def test_bad_pairs(changed, error, message, backend):
    arguments = {"rewards": REWARDS, "ends": ENDS, "backend": backend} | changed
    with pytest.raises(error, match=message):
        segment_bradley_terry(**arguments)


@pytest.mark.parametrize("packed", [True, False])
@storage
def test_operators_are_registered_soundly(packed, dtype):
    case = CASES["response"]
    rewards, ends = draw(case, dtype)
    rewards, mask, cu = rewards.nan_to_num(), case.mask, case.cu_seqlens
    if not packed:
        rewards, ends, mask = (
            case.grid(rewards, 0.0),
            case.grid(ends, False),
            case.grid(mask, False),
        )
        cu = None
    rewards.requires_grad_()
    n_rows = len(case.lengths)
    torch.library.opcheck(segment_scores_fwd, (rewards, ends, mask, cu, True))
    torch.library.opcheck(
        segment_bradley_terry_fwd,
        (rewards, ends, mask, cu, torch.ones(n_rows // 2), True, 0.1, 0.01),
    )
    scores, counts = torch.randn(n_rows), torch.ones(n_rows, dtype=torch.int32)
    torch.library.opcheck(segment_scores_bwd, (scores, counts, ends, mask, cu, True))
    torch.library.opcheck(
        segment_bradley_terry_bwd,
        (torch.ones(()), scores, torch.randn(n_rows), counts, ends, mask, cu, True),
    )


@pytest.mark.parametrize("packed", [True, False])
def test_compiles(packed):
    case = CASES["holes"]
    rewards, ends = draw(case)
    mask, cu = case.mask, case.cu_seqlens
    if not packed:
        rewards, ends, mask = (
            case.grid(rewards, NAN),
            case.grid(ends, False),
            case.grid(mask, False),
        )
        cu = None

    def loss(rewards):
        out = segment_bradley_terry(2 * rewards, ends, mask, cu_seqlens=cu)
        scores = segment_scores(rewards, ends, mask, cu_seqlens=cu, reduction="sum")
        return out.loss + out.scores.square().mean() + scores.mean()

    def gradient(f):
        leaf = rewards.clone().requires_grad_()
        value = f(leaf)
        value.backward()
        return value.detach(), leaf.grad

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(gradient(loss), gradient(compiled), strict=True):
        assert torch.equal(eager, traced)
