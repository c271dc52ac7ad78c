import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import CASES
from ranks import on_ranks, running_states
from sklearn.linear_model import HuberRegressor
from test_rewards import NORMALIZERS, draw
from test_rewards import normalizers as normalizer_names

from segkernels import (
    LocationNormalizer,
    RunningLocationNormalizer,
    ScalarNormalizer,
    TableNormalizer,
    fit_location,
    moments,
    native,
    normalizer_from_dict,
    segment_positions,
)
from segkernels.native.running_normalizer import location_moments
from segkernels.normalizer_fit import huber_line

NAN = float("nan")
INF = float("inf")
TO_SUMMATION_ORDER = {"rtol": 1e-12, "atol": 1e-12}
# scikit-learn stops its minimiser at a gradient of 1e-5.
TO_SCIKIT = {"rel": 1e-4, "abs": 1e-4}


def log_line_data(n=20_000, seed=0):
    """Rewards around 0.8 ln p + 0.5 with std 0.3 ln p + 2.5 at positions of rows of 1 to 12."""
    g = torch.Generator().manual_seed(seed)
    total = torch.randint(1, 13, (n,), generator=g)
    p = ((torch.rand(n, generator=g) * total).long() + 1).double() / total
    noise = torch.randn(n, generator=g, dtype=torch.float64)
    return p, 0.8 * p.log() + 0.5 + (0.3 * p.log() + 2.5) * noise


def running_after(*batches, **options):
    running = RunningLocationNormalizer(**options)
    for batch in batches:
        running.update(*batch)
        running.all_reduce()
    return running


def batch_of(seed, rows=40, dtype=torch.float32):
    """(rewards, ends, mask) of a grid; NaN where no segment ends."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, 30, generator=g) < 0.8
    ends = mask & (torch.rand(rows, 30, generator=g) < 0.3)
    rewards = (torch.randn(rows, 30, generator=g) + seed).to(dtype).masked_fill(~ends, NAN)
    return rewards, ends, mask


# The four normalisers


@normalizer_names
def test_formulas(normalizer):
    fitted, mean, std = NORMALIZERS[normalizer]
    if fitted is None:
        return
    p = torch.tensor([1e-3, 1 / 3, 0.25, 0.5, 0.6, 0.75, 0.9, 1.0], dtype=torch.float64)
    means, stds = ([f(x) for x in p.tolist()] for f in (mean, std))
    assert fitted.mean(p).tolist() == pytest.approx(means)
    assert fitted.std(p).tolist() == pytest.approx(stds)
    r = torch.linspace(-3, 3, 8, dtype=torch.float64)
    expected = [(x - m) / s for x, m, s in zip(r.tolist(), means, stds, strict=True)]
    assert fitted(r, p).tolist() == pytest.approx(expected)
    assert fitted.mean(p.float()).dtype == torch.float32


def test_published_token_line_does_not_flip_signs():
    # Unfloored, its std at 1/1024 is -1.41.
    line = LocationNormalizer(1.7340, 1.3212, 0.9906, 5.4513)
    p = torch.tensor([1 / 1024], dtype=torch.float64)
    assert 0.9906 * math.log(1 / 1024) + 5.4513 == pytest.approx(-1.415, abs=1e-3)
    assert line.std(p).item() == pytest.approx(0.54513)
    assert LocationNormalizer(1.0, 0.0, 1.0, 2.0, min_std=0.5).min_std == 0.5


@normalizer_names
def test_dicts_round_trip_through_json(normalizer):
    fitted = NORMALIZERS[normalizer][0]
    if fitted is None:
        return
    again = normalizer_from_dict(json.loads(json.dumps(fitted.to_dict())))
    assert type(again) is type(fitted)
    assert again == fitted
    assert again != ScalarNormalizer(0.25, 0.25)
    assert repr(again).startswith(type(fitted).__name__ + "(")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocationNormalizer(NAN, 0, 0, 1), "mean_slope: expected finite numbers, got nan"),
        (lambda: LocationNormalizer(0, 0, INF, 1), "std_slope: expected finite numbers, got inf"),
        (
            lambda: LocationNormalizer(0, 0, 1, -2.0),
            "min_std: expected a positive number, got a tenth of std_intercept = -2.0; pass",
        ),
        (lambda: LocationNormalizer(0, 0, 1, 2, 0.0), "min_std: expected a positive number, got 0"),
        (lambda: LocationNormalizer(0, 0, 1, 2, NAN), "min_std: expected a positive number, got n"),
        (lambda: ScalarNormalizer(0, 0), "std: expected a positive number, got 0.0; pass the sta"),
        (lambda: ScalarNormalizer(0, -1), "std: expected a positive number, got -1.0"),
        (lambda: ScalarNormalizer(NAN, 1), "mean: expected finite numbers, got nan"),
        (lambda: TableNormalizer([], [], []), "positions: expected 1 to 64 knots, got 0"),
        (
            lambda: TableNormalizer([i / 65 for i in range(1, 66)], [0] * 65, [1] * 65),
            "positions: expected 1 to 64 knots, got 65; merge",
        ),
        (lambda: TableNormalizer([0.5, 0.5], [0, 0], [1, 1]), "strictly increasing numbers"),
        (lambda: TableNormalizer([0.0, 0.5], [0, 0], [1, 1]), r"increasing numbers in \(0, 1\]"),
        (lambda: TableNormalizer([0.5, 1.1], [0, 0], [1, 1]), r"increasing numbers in \(0, 1\]"),
        (lambda: TableNormalizer([0.5, 1.0], [0], [1, 1]), "means: expected 2 numbers like pos"),
        (lambda: TableNormalizer([0.5], [0], [1, 1]), "stds: expected 1 numbers like positions"),
        (lambda: TableNormalizer([0.5], [NAN], [1]), "means: expected finite numbers, got nan"),
        (lambda: TableNormalizer([0.5, 1], [0, 0], [-1, 1]), "stds: expected no negative number"),
        (lambda: TableNormalizer([0.5], [0], [0]), "min_std: .*, got a tenth of the last std = 0"),
        (lambda: normalizer_from_dict({"type": "lines"}), "expected type line, table, .* 'lines'"),
        (lambda: normalizer_from_dict({}), "expected type line, .* got None"),
        (
            lambda: normalizer_from_dict({"type": "scalar", "mean": 0.0}),
            r"expected the fields of type scalar, got \['mean'\]",
        ),
        (lambda: RunningLocationNormalizer(bins=0), "bins: expected 1 or more, got 0"),
        (
            lambda: RunningLocationNormalizer(decay=0.0),
            r"decay: expected a number in \(0, 1\], got",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Positions


def test_positions_by_hand():
    yes, no = True, False
    ends = torch.tensor([[no, yes, yes, no, yes], [no, no, yes, no, no], [no] * 5])
    mask = torch.tensor([[yes] * 5, [no, no, yes, yes, yes], [yes] * 5])
    p = segment_positions(ends, mask)
    assert p.dtype == torch.float64
    assert p.tolist() == [1 / 3, 2 / 3, 1.0, 1.0]
    assert segment_positions(ends[:0], mask[:0]).tolist() == []


def test_positions_of_packed_rows():
    case = CASES["lengths"]
    _, ends = draw(case)
    packed = segment_positions(ends, case.mask, cu_seqlens=case.cu_seqlens)
    padded = segment_positions(case.grid(ends, False), case.grid(case.mask, False))
    assert torch.equal(packed, padded)
    expected = []
    for row in ends.split(case.lengths):
        k = int(row.sum())
        expected += [(i + 1) / k for i in range(k)]
    assert packed.tolist() == expected
    with pytest.raises(TypeError, match="ends: expected bool"):
        segment_positions(ends.float(), case.mask, cu_seqlens=case.cu_seqlens)
    with pytest.raises(ValueError, match="mask: expected shape"):
        segment_positions(ends, case.mask[1:], cu_seqlens=case.cu_seqlens)


# The fit


def scikit_line(x, y, epsilon=1.35):
    model = HuberRegressor(epsilon=epsilon, alpha=1e-10, max_iter=10_000)
    model.fit(np.asarray(x)[:, None], np.asarray(y))
    return model.coef_[0], model.intercept_


@pytest.mark.parametrize("epsilon", [1.05, 1.35, 3.0])
@pytest.mark.parametrize("outliers", [0, 5, 30])
def test_huber_line_is_that_of_scikit_learn(outliers, epsilon):
    g = torch.Generator().manual_seed(outliers)
    x = torch.rand(100, generator=g, dtype=torch.float64).clamp(min=0.01).log()
    y = 0.7 * x + 0.4 + 0.2 * torch.randn(100, generator=g, dtype=torch.float64)
    y[:outliers] += 8
    assert huber_line(x, y, epsilon) == pytest.approx(scikit_line(x, y, epsilon), **TO_SCIKIT)


def test_huber_line_of_degenerate_points():
    one = torch.zeros(4, dtype=torch.float64)
    slope, intercept = huber_line(one, torch.tensor([1.0, 2.0, 3.0, 2.0]))
    assert slope == 0.0
    assert intercept == pytest.approx(2.0)
    assert huber_line(one[:1], torch.tensor([3.0])) == (0.0, 3.0)
    x = torch.tensor([-3.0, -2.0, -1.0, 0.0])
    assert huber_line(x, 2 * x + 1) == pytest.approx((2.0, 1.0))
    assert huber_line(x, 0 * x) == (0.0, 0.0)
    # Most points lie exactly on a line; the scale goes to 0 and the outlier has no say.
    x = torch.arange(-10.0, 0.0)
    y = 2 * x + 1
    y[4] += 50
    assert huber_line(x, y) == pytest.approx((2.0, 1.0), abs=1e-6)


def test_fit_is_the_published_recipe():
    p, rewards = log_line_data(3000)
    fit = fit_location(p, rewards)
    groups: dict[float, list[float]] = {}
    for at, r in zip(np.round(p.numpy(), 3), rewards.tolist(), strict=True):
        groups.setdefault(at, []).append(r)
    x = sorted(groups)
    means = [np.mean(groups[at]) for at in x]
    stds = [np.std(groups[at]) for at in x]
    assert fit.positions.tolist() == pytest.approx(x)
    assert fit.counts.tolist() == [len(groups[at]) for at in x]
    assert fit.means.tolist() == pytest.approx(means)
    assert fit.stds.tolist() == pytest.approx(stds)
    line = fit.line.mean_slope, fit.line.mean_intercept, fit.line.std_slope, fit.line.std_intercept
    expected = *scikit_line(np.log(x), means), *scikit_line(np.log(x), stds)
    assert line == pytest.approx(expected, **TO_SCIKIT)
    fitted = line[0] * np.log(x) + line[1]
    r2 = 1 - np.sum((means - fitted) ** 2) / np.sum((means - np.mean(means)) ** 2)
    assert fit.r2_mean == pytest.approx(r2)


def test_fit_finds_a_log_line():
    fit = fit_location(*log_line_data())
    line = fit.line.mean_slope, fit.line.mean_intercept, fit.line.std_slope, fit.line.std_intercept
    assert line == pytest.approx((0.8, 0.5, 0.3, 2.5), abs=0.15)
    assert fit.line.min_std == pytest.approx(fit.line.std_intercept / 10)
    assert fit.r2_mean > 0.8
    assert fit.best is fit.line
    p, rewards = log_line_data(seed=1)
    for normalizer in (fit.line, fit.table):
        white = normalizer(rewards, p)
        assert white.mean().item() == pytest.approx(0, abs=0.05)
        assert white.std().item() == pytest.approx(1, abs=0.05)


def test_fit_prefers_the_table_where_the_curve_is_no_line():
    p, _ = log_line_data()
    bump = torch.where((p > 0.3) & (p < 0.7), 5.0, 0.0)
    fit = fit_location(p.float(), (bump + torch.randn(p.shape)).bfloat16())
    assert fit.r2_mean < 0.5
    assert fit.best is fit.table
    at = torch.tensor([0.1, 0.5, 0.9, 1.0])
    assert fit.table.mean(at).tolist() == pytest.approx([0, 5, 0, 0], abs=0.4)
    assert fit.table.std(at).tolist() == pytest.approx([1, 1, 1, 1], abs=0.4)


def test_table_merges_positions_into_few_knots():
    p = torch.rand(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).clamp(
        min=1e-4
    )
    fit = fit_location(p, p)
    assert len(fit.positions) > 900
    assert 50 <= len(fit.table.positions) <= 64
    assert len(fit_location(p[:100], p[:100], min_std=0.1).table.positions) == 3
    # One row's worth of segments: one knot, the plain mean and std.
    few = torch.tensor([0.25, 0.5, 0.75, 1.0])
    table = fit_location(few, few, min_std=0.1).table
    assert (table.positions, table.means) == ((0.625,), (0.625,))
    assert table.stds[0] == pytest.approx(few.std(correction=0).item())


def test_bandit_rewards_fit_to_a_scalar():
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0])
    fit = fit_location(torch.ones(4), rewards)
    assert (fit.line.mean_slope, fit.line.std_slope) == (0.0, 0.0)
    assert fit.line.mean_intercept == pytest.approx(3.0)
    assert fit.line.std_intercept == pytest.approx(rewards.std(correction=0).item())
    assert (fit.r2_mean, fit.r2_std) == (1.0, 1.0)


def test_long_rows_round_to_the_first_thousandth():
    fit = fit_location(torch.tensor([1e-5, 1e-3, 1.0, 1.0]), torch.tensor([0.0, 2.0, 1.0, 3.0]))
    assert fit.positions.tolist() == [0.001, 1.0]
    assert fit.counts.tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("positions", "rewards", "error", "message"),
    [
        ([], [], ValueError, r"positions: expected shape \[segments\] with one segment or more"),
        ([[0.5]], [[1.0]], ValueError, r"positions: expected shape \[segments\].*got \[1, 1\]"),
        ([0.5], [1.0, 2.0], ValueError, r"rewards: expected shape \[1\] like positions, got \[2\]"),
        ([0.5, 1.0], [1.0, NAN], ValueError, "rewards: expected finite .* got 1 of 2 that are not"),
        ([0.0, 1.0], [1.0, 2.0], ValueError, r"positions: expected numbers in \(0, 1\], got 0.0"),
        ([0.5, NAN], [1.0, 2.0], ValueError, r"positions: expected numbers in \(0, 1\], got nan"),
        (
            [1.0, 1.0],
            [2.0, 2.0],
            ValueError,
            "min_std: .* a tenth of std_intercept = 0.0; pass min",
        ),
        ([1, 1], [2.0, 2.0], TypeError, "positions: expected float32.*got torch.int64"),
    ],
)
def test_fit_errors(positions, rewards, error, message):
    with pytest.raises(error, match=message):
        fit_location(torch.tensor(positions), torch.tensor(rewards))


def test_min_std_rescues_rewards_without_spread():
    fit = fit_location(torch.ones(2), torch.full((2,), 2.0), min_std=0.5)
    assert fit.best(torch.tensor([3.0]), torch.tensor([1.0])).tolist() == [2.0]


# Moments


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(0, 2**31 - 1))
@settings(max_examples=30, deadline=None)
def test_merged_moments_are_those_of_all_values(sizes, seed):
    g = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, generator=g, dtype=torch.float64) + 1e6 for n in sizes]
    groups = [torch.randint(0, 3, (n,), generator=g) for n in sizes]
    merged = torch.zeros(3, 3, dtype=torch.float64)
    for x, group in zip(parts, groups, strict=True):
        merged = moments.merge(merged, moments.grouped(x, group, 3))
    x, group = torch.cat(parts), torch.cat(groups)
    for i in range(3):
        mine = x[group == i]
        m2 = (mine - mine.mean()).square().sum().item() if len(mine) else 0.0
        assert merged[0, i] == len(mine)
        assert merged[1, i].item() == pytest.approx(mine.mean().item() if len(mine) else 0.0)
        assert merged[2, i].item() == pytest.approx(m2, rel=1e-7, abs=1e-7)


def test_native_moments_merge_in_tree_order():
    x = torch.randn(33, dtype=torch.float64) + 100

    def tree(values):
        if len(values) <= 1:
            return (float(len(values)), sum(values), 0.0)
        half = len(values) // 2
        return native.extension.combine_moments(tree(values[:half]), tree(values[half:]))

    m2 = (x - x.mean()).square().sum().item()
    assert tree(x.tolist()) == pytest.approx((33, x.mean().item(), m2), rel=1e-12)
    assert native.extension.combine_moments(tree([]), tree([])) == (0.0, 0.0, 0.0)
    assert native.extension.combine_moments(tree([]), tree([5.0])) == (1.0, 5.0, 0.0)


# The running form


def test_running_equals_the_offline_fit_of_all_batches():
    batches = [batch_of(seed) for seed in range(4)]
    p = torch.cat([segment_positions(ends, mask) for _, ends, mask in batches])
    rewards = torch.cat([r[ends] for r, ends, _ in batches])
    offline = fit_location(p, rewards)
    fit = running_after(*batches).refit()
    assert fit.positions.tolist() == offline.positions.tolist()
    assert fit.counts.tolist() == offline.counts.tolist()
    torch.testing.assert_close(fit.means, offline.means, **TO_SUMMATION_ORDER)
    torch.testing.assert_close(fit.stds, offline.stds, **TO_SUMMATION_ORDER)
    assert fit.line.to_dict() == pytest.approx(offline.line.to_dict())


def test_running_applies_the_better_form():
    running = running_after(batch_of(0))
    fit = running.refit()
    p = torch.rand(20).clamp(min=0.01)
    assert torch.equal(running.mean(p), fit.best.mean(p))
    assert torch.equal(running.std(p), fit.best.std(p))
    running.update(*batch_of(5))
    assert torch.equal(running.mean(p), fit.best.mean(p))  # until the next refit
    assert torch.equal(running.refit().best.mean(p), running.mean(p))
    assert not torch.equal(running.mean(p), fit.best.mean(p))


def test_running_merges_updates_within_a_batch():
    parts = [batch_of(seed) for seed in range(3)]
    running = RunningLocationNormalizer(decay=0.5)
    for part in parts:
        running.update(*part)
    whole = RunningLocationNormalizer(decay=0.5)
    whole.update(*(torch.cat(x) for x in zip(*parts, strict=True)))
    assert running.refit().counts.tolist() == whole.refit().counts.tolist()
    torch.testing.assert_close(running.refit().stds, whole.refit().stds, **TO_SUMMATION_ORDER)


def bandit_batch(*rewards):
    x = torch.tensor(rewards)[:, None]
    every = torch.ones_like(x, dtype=torch.bool)
    return x, every, every


def test_decay_forgets_the_past():
    fit = running_after(bandit_batch(1.0, 3.0), bandit_batch(5.0, 5.0), decay=0.5).refit()
    # The first two weigh half: mean (0.5 * 4 + 10) / 3 = 4, M2 0.5 * 2 + 1 * 2 * 9 / 3 = 7.
    assert fit.counts.tolist() == [3.0]
    assert fit.means.tolist() == pytest.approx([4.0])
    assert fit.stds.tolist() == pytest.approx([math.sqrt(7 / 3)])


def test_a_batch_without_segments_changes_nothing():
    running = running_after(bandit_batch(1.0, 3.0), decay=0.5)
    before = running.state_dict()
    none = torch.zeros(2, 3, dtype=torch.bool)
    running.update(torch.full((2, 3), NAN), none, none)
    running.all_reduce()
    running.all_reduce()
    assert running.state_dict() == before


def test_bins_that_decayed_away_are_left_out():
    rewards, ends = torch.tensor([[1.0, 2.0]]), torch.ones(1, 2, dtype=torch.bool)
    batches = [(rewards, ends, ends), *[bandit_batch(1.0, 3.0)] * 2]
    assert running_after(*batches[:2], decay=0.5).refit().positions.tolist() == [0.5, 1.0]
    assert running_after(*batches, decay=0.5).refit().positions.tolist() == [1.0]


def test_running_reads_packed_rows_and_any_storage():
    case = CASES["lengths"]
    rewards, ends = draw(case, torch.bfloat16)
    packed, padded = RunningLocationNormalizer(), RunningLocationNormalizer()
    packed.update(rewards, ends, case.mask, cu_seqlens=case.cu_seqlens)
    mask = case.grid(case.mask, False)
    padded.update(case.grid(rewards, NAN), case.grid(ends, False), mask)
    assert packed == padded


def collected(rewards, ends, mask, backend, bins=1000, **where):
    running = RunningLocationNormalizer(bins)
    running.update(rewards, ends, mask, backend=backend, **where)
    return running.state_dict()["batch"]


@pytest.mark.parametrize("bins", [1, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_native_update_is_the_definition(case, dtype, bins):
    rewards, ends = draw(case, dtype)
    where = {"bins": bins, "cu_seqlens": case.cu_seqlens}
    native_state, reference = (
        collected(rewards, ends, case.mask, backend, **where) for backend in ("native", "reference")
    )
    for key in ("bin", "count"):
        assert native_state[key] == reference[key]
    for key in ("mean", "m2"):
        expected = torch.tensor(reference[key], dtype=torch.float64)
        got = torch.tensor(native_state[key], dtype=torch.float64)
        torch.testing.assert_close(got, expected, **TO_SUMMATION_ORDER)


def test_update_does_not_depend_on_threads(two_threads):
    batch = [x.repeat(50, 1) for x in batch_of(0)]
    many = [collected(*batch, "native") for _ in range(2)]
    torch.set_num_threads(1)
    assert many == [collected(*batch, "native")] * 2
    assert sum(many[0]["count"]) == batch[1].sum()


def test_update_is_a_custom_operator():
    for dtype in (torch.float32, torch.float16):
        rewards, ends, mask = batch_of(0, rows=5, dtype=dtype)
        torch.library.opcheck(location_moments, (rewards, ends, mask, None, 10))
    case = CASES["holes"]
    rewards, ends = draw(case)
    torch.library.opcheck(location_moments, (rewards, ends, case.mask, case.cu_seqlens, 1000))


def test_state_round_trips_in_the_middle_of_a_batch():
    running = running_after(batch_of(0), bins=100, decay=0.9, min_std=0.01)
    running.refit()
    running.update(*batch_of(1))
    through_json = normalizer_from_dict(json.loads(json.dumps(running.to_dict())))
    loaded = RunningLocationNormalizer()
    loaded.load_state_dict(running.state_dict())
    for again in (loaded, through_json):
        assert again == running
        assert again.curve == running.curve
    running.update(*batch_of(2))
    expected = running.refit()
    for again in (loaded, through_json):
        again.update(*batch_of(2))
        assert again.refit().line == expected.line
        assert again == running


def test_state_can_be_saved_without_pickle(tmp_path):
    state = running_after(batch_of(0)).state_dict()
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state


@pytest.mark.parametrize("wrong", [{"decay": 2.0}, {"past": {"bin": [1]}}, {"applied": {}}])
def test_a_state_that_cannot_be_read_changes_nothing(wrong):
    running, other = running_after(batch_of(0)), running_after(batch_of(1))
    before = running.state_dict()
    with pytest.raises((ValueError, KeyError)):
        running.load_state_dict({**other.state_dict(), **wrong})
    assert running.state_dict() == before


def test_unfitted_is_an_error_that_says_what_to_do():
    running = RunningLocationNormalizer()
    p = torch.ones(1)
    for apply in (running.mean, running.std, lambda p: running(p, p)):
        with pytest.raises(RuntimeError, match=r"call update\(.* and then refit\(\), or .*segrlhf"):
            apply(p)
    with pytest.raises(RuntimeError, match=r"no segment to fit to; call update\("):
        running.refit()
    running.update(*batch_of(0))
    with pytest.raises(RuntimeError, match="never fitted"):
        running.mean(p)
    running.refit()
    assert running.std(p).item() > 0


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_reward_that_is_not_finite_is_refused(backend):
    running = running_after(batch_of(0))
    before = running.state_dict()
    rewards, ends, mask = batch_of(1)
    rewards[tuple(ends.nonzero()[0])] = INF
    message = rf"rewards: expected finite rewards at .* got 1 of {int(ends.sum())} that are not"
    with pytest.raises(ValueError, match=message):
        running.update(rewards, ends, mask, backend=backend)
    assert running.state_dict() == before
    with pytest.raises(ValueError, match="mask: expected shape"):
        running.update(rewards, ends, mask[:1])


def test_ranks_merge_exactly_in_one_all_reduce(tmp_path):
    none = torch.zeros(2, 30, dtype=torch.bool)
    nothing = torch.full((2, 30), NAN), none, none
    batches = [[batch_of(0), batch_of(1), nothing], [batch_of(2, rows=7), nothing, batch_of(3)]]
    (states, calls), (other_states, _) = on_ranks(running_states, 2, tmp_path, batches, 0.5)
    assert states == other_states
    assert calls == 3
    alone = RunningLocationNormalizer(decay=0.5)
    for state, here, there in zip(states, *batches, strict=True):
        alone.update(*here)
        alone.update(*there)
        alone.refit()
        expected = alone.state_dict()
        assert state["past"]["bin"] == expected["past"]["bin"]
        for key in ("count", "mean", "m2"):
            assert state["past"][key] == pytest.approx(expected["past"][key], rel=1e-12, abs=1e-12)


def test_a_rare_position_is_no_knot_of_its_own():
    """Its own mean and std, of one segment, would be 3 and 0."""
    positions = torch.tensor([0.25] * 400 + [0.3] + [0.5] * 400 + [1.0] * 400)
    rewards = torch.linspace(-1, 1, 400).repeat(3)
    rewards = torch.cat([rewards[:400], torch.tensor([3.0]), rewards[400:]])
    table = fit_location(positions, rewards).table
    assert len(table.positions) == 3
    assert min(table.stds) > 0.5
