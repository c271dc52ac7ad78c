"""The CUDA kernels: on the host, where a small stand-in for CUDA runs them, and on a GPU."""

import functools
import math
from types import SimpleNamespace

import pytest
import test_advantages
import test_bradley_terry
import test_normalizer
import test_ppo_loss
import test_segments
import torch
from layouts import CASES, GIANT, Case, _case
from on_host import build
from streams import assert_same_bits, draw
from test_gae import DISCOUNTS
from test_ppo_loss import AGGREGATIONS, LOSSES
from test_rewards import CREDITS, NORMALIZERS
from tolerance import assert_close

from segkernels import (
    RunningLocationNormalizer,
    TableNormalizer,
    gae,
    native,
    scatter_segment_rewards,
    segment_advantages,
    segment_bradley_terry,
    segment_ends,
    segment_ends_and_advantages,
    segment_scores,
    whiten,
)
from segkernels.backend import explain
from segkernels.native.rewards import curve_address
from segkernels.native.running_normalizer import fit_location, location_moments
from segkernels.normalizer_fit import FitOnGPU, fit_moments
from segkernels.reference import running_normalizer as reference

STORAGE = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")
GUARD = 64  # bytes on both sides of what a kernel writes

# Rows longer than a tile, for blocks of several sizes: a mean of up to 512 tokens takes 256 threads
# (and long rows tiles of 2,048 tokens), longer ones take 32 to 512.
TILES = {
    "a giant among short rows": _case([5, 31, 0, 9, 3000, 2, 1, 64, 33, 7, 40, 12], "holes", 4),
    "uneven long rows": _case([600, 5000, 0, 700], "holes", 5),
    "tiles filled exactly": _case([4096, 8192, 4095, 1], "all"),
    "long rows": _case([1023, 1025, 1024, 513, 900, 1200], "response"),
}
EVERY = {**CASES, **TILES}
PAIRS = {name: case for name, case in EVERY.items() if len(case.lengths) % 2 == 0}
case_names = pytest.mark.parametrize("case", EVERY.values(), ids=EVERY.keys())
storage = pytest.mark.parametrize("dtype", STORAGE, ids=str)
alignments = pytest.mark.parametrize("entropy_of", ["next", "current"])

on_host = functools.cache(build)


class Device:
    """Where the kernels run, and what their memory looks like before and after."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.torch = "cuda" if name == "gpu" else "cpu"
        self.guarded: list[torch.Tensor] = []

    def empty(self, like, *shape, dtype=torch.float32):
        """``native.empty`` filled with bytes of ones (NaN) and with some more on both sides."""
        size = torch.Size(shape).numel() * dtype.itemsize
        whole = torch.full((size + 2 * GUARD,), 255, dtype=torch.uint8, device=like.device)
        self.guarded.append(whole)
        return whole[GUARD : GUARD + size].view(dtype).view(shape)

    def check_guards(self):
        for whole in self.guarded:
            assert (whole[:GUARD] == 255).all(), "written before the start of an output"
            assert (whole[-GUARD:] == 255).all(), "written behind the end of an output"
        self.guarded.clear()

    def run(self, op, args, **options):
        """The op's native form on this device; results on the CPU."""

        def there(x):
            return x.to(self.torch) if isinstance(x, torch.Tensor) else x

        if "cu_seqlens" in options:
            options = {**options, "cu_seqlens": there(options["cu_seqlens"])}
        out = op(*map(there, args), backend="native", **options)
        return out.cpu() if isinstance(out, torch.Tensor) else tuple(x.cpu() for x in out)

    def orders(self):
        """Runs in which the threads of a block take turns in different orders."""
        for seed in (0, 1, 5):
            if self.name == "host":
                on_host().order(seed)
            yield seed
        if self.name == "host":
            on_host().order(0)


@pytest.fixture(params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    device = Device(request.param)
    if device.name == "host":
        monkeypatch.setattr(native, "kernels", lambda tensor: on_host())
        monkeypatch.setattr(native, "executor", lambda tensor: (0, 0))
    else:
        assert native.cuda_extension is not None, native.cuda_missing
    monkeypatch.setattr(native, "empty", device.empty)
    yield device
    device.check_guards()


@pytest.fixture
def in_memory(device, monkeypatch):
    """The device, where a curve and a normaliser's state in its memory count as a GPU's."""
    if device.name == "host":
        monkeypatch.setattr(native, "on_gpu", lambda tensor: True)
    return device


def doubles(args):
    return [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args
    ]


def grids(case, args):
    """The padded form, poisoned with NaN."""
    return [case.grid(x, NAN if x.is_floating_point() else False) for x in args]


def check(device, case, op, args, names, **options):
    """Flat and padded, against the truth by the rule of tolerance.py."""
    flat = {"cu_seqlens": case.cu_seqlens, **options}
    truth = op(*doubles(args), **flat)
    baseline = op(*args, backend="reference", **flat)
    packed = device.run(op, args, **flat)
    padded = device.run(op, grids(case, args), **options)
    single = isinstance(truth, torch.Tensor)
    for name, *out in zip(
        names, *([x] if single else x for x in (packed, padded, baseline, truth)), strict=True
    ):
        kernel, grid, expected, exact = out
        assert kernel.dtype == torch.float32
        if grid.dim() == 2:  # tokens, not rows
            assert not grid[~case.grid(case.mask, False)].any(), f"{name}: not 0 outside the mask"
            grid = case.flat(grid)
        assert_close(kernel, expected, exact, name)
        assert_close(grid, expected, exact, f"{name}, padded")


# The stand-in itself


def test_the_stand_in_finds_a_barrier_that_is_left_out():
    with pytest.raises(RuntimeError, match="a barrier or shuffle that not every thread reaches"):
        on_host().run_faulty(True)


def test_the_stand_in_finds_what_depends_on_the_order():
    last = []
    for seed in (0, 1):
        on_host().order(seed)
        last.append(on_host().run_faulty(False))
    on_host().order(0)
    assert last[0] != last[1]


# Which device and which driver


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """And create no context elsewhere: one on GPU 0 would take hundreds of MiB in each process."""
    monkeypatch.setattr(native, "kernels", lambda tensor: on_host())
    monkeypatch.setattr(native, "executor", lambda tensor: (0, 2))
    x, mask = torch.rand(4, 100), torch.ones(4, 100, dtype=torch.bool)
    on_host().forget_contexts()
    try:
        for current, contexts in ((2, [2]), (1, [1, 2])):
            # There is no going back to device 0, which has no context; to device 1 there is.
            if current == 1:
                on_host().set_device(1)
            for op, *args in ((whiten, x, mask), (segment_ends, x, mask, 0.5)):
                op(*args, backend="native")
                assert on_host().devices() == (2, current, contexts)
    finally:
        on_host().forget_contexts()


@pytest.mark.parametrize(
    ("driver", "runtime", "built_and_served"),
    [
        (12080, 13000, ("13.0", "12.8")),
        (11080, 12040, ("12.4", "11.8")),
        (13000, 13000, None),
        (13000, 13010, None),  # minor versions are compatible
        (13020, 12080, None),
        (0, 13000, None),  # a machine without GPU
    ],
)
def test_a_driver_that_is_too_old_is_named_once(monkeypatch, driver, runtime, built_and_served):
    module = SimpleNamespace(
        cuda_versions=lambda: (driver, runtime), build_info=lambda: "built for x"
    )
    monkeypatch.setattr(native, "_load", lambda name: (module, ""))
    monkeypatch.setattr(torch.version, "hip", None)
    loaded, why = native._load_cuda()
    monkeypatch.setattr(native, "cuda_extension", loaded)
    monkeypatch.setattr(native, "cuda_missing", why)
    text = explain("cuda")
    assert (loaded is None) == (built_and_served is not None)
    if built_and_served:
        built, served = built_and_served
        said = (
            f"CUDA module: cannot be used: built with CUDA {built}, which the NVIDIA driver is too "
            f"old for, it serves CUDA {served}; install a driver for CUDA {built[:2]}, or build "
        )
        assert said in text
        assert text.count("too old") == 1
        assert "\ngae                          reference  the CUDA module" in text
    else:
        assert "CUDA module: built for x" in text


def test_the_module_tells_its_versions():
    if native.cuda_extension is None:
        pytest.skip(f"no CUDA module: {native.cuda_missing}")
    driver, runtime = native.cuda_extension.cuda_versions()
    assert driver >= 0
    assert runtime >= 11000


# Boundaries


@case_names
@alignments
@pytest.mark.parametrize("exclude_last", [True, False, "by row"])
def test_ends(device, case, entropy_of, exclude_last):
    g = torch.Generator().manual_seed(0)
    if exclude_last == "by row":
        exclude_last = torch.rand(len(case.lengths), generator=g) < 0.5
    entropy = test_segments.draw_entropy(case)
    flat = {"cu_seqlens": case.cu_seqlens, "entropy_of": entropy_of}
    expected = segment_ends(
        entropy, case.mask, 1.0, exclude_last=exclude_last, backend="reference", **flat
    )

    def ends(entropy, mask, last, **options):
        return segment_ends(entropy, mask, 1.0, exclude_last=last, **options)

    for dtype in STORAGE:
        args = entropy.to(dtype), case.mask
        assert torch.equal(device.run(ends, (*args, exclude_last), **flat), expected)
    args = (*grids(case, (entropy, case.mask)), exclude_last)
    padded = device.run(ends, args, entropy_of=entropy_of)
    assert torch.equal(padded, case.grid(expected, False))


def test_ends_of_rows_with_one_action_token_in_any_tile(device):
    mask = torch.zeros(6, 9000, dtype=torch.bool)
    mask[range(6), [0, 1, 4095, 4096, 8999, 5000]] = True
    for exclude_last in (True, False):
        ends = device.run(
            lambda *args, last=exclude_last, **o: segment_ends(*args, exclude_last=last, **o),
            (torch.zeros(mask.shape), mask, 1.0),
        )
        assert torch.equal(ends, mask)


# Scores and losses


@case_names
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scores(device, case, reduction):
    for dtype in STORAGE:
        rewards, ends = test_bradley_terry.draw(case, dtype)
        args = rewards, ends, case.mask
        check(device, case, segment_scores, args, ["scores"], reduction=reduction)
        args = rewards, ends & case.mask
        check(device, case, segment_scores, args, ["scores"], reduction=reduction)


def slopes(op, device=None, upstream=(1.0,), **options):
    """What ``op`` gives and the gradient of its first argument, as an op of its own."""

    def run(first, *rest, **more):
        first = first.detach().requires_grad_()
        out = op(first, *rest, **options, **more)
        outs = (out,) if isinstance(out, torch.Tensor) else out
        total = sum(
            (weight * x).sum() for weight, x in zip(upstream, outs, strict=False) if x.requires_grad
        )
        (gradient,) = torch.autograd.grad(total, first)
        return *(x.detach() for x in outs), gradient

    return run


@case_names
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_of_scores(device, case, reduction):
    rewards, ends = test_bradley_terry.draw(case)
    op = slopes(segment_scores, upstream=(0.7,), reduction=reduction)
    check(device, case, op, (rewards, ends, case.mask), ["scores", "drewards"])


@pytest.mark.parametrize("case", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize(
    ("options", "upstream"),
    [
        ({"label_smoothing": 0.1, "center_coef": 0.01}, (0.7, 0.3)),
        ({"reduction": "sum"}, (1.0,)),  # of the loss alone
        ({}, (0.0, 1.0)),
    ],
    ids=["everything", "loss alone", "scores"],
)
def test_bradley_terry_loss(device, case, options, upstream):
    g = torch.Generator().manual_seed(1)
    margin = torch.rand(len(case.lengths) // 2, generator=g)
    names = "loss", "scores", "accuracy", "drewards"
    for dtype in STORAGE:
        rewards, ends = test_bradley_terry.draw(case, dtype)

        def op(rewards, ends, mask, **more):
            here = margin.to(rewards.device)
            return slopes(segment_bradley_terry, upstream=upstream, margin=here, **options)(
                rewards, ends, mask, **more
            )

        flat = {"cu_seqlens": case.cu_seqlens}
        args = rewards, ends, case.mask
        truth = op(*doubles(args), **flat)
        baseline = op(*args, backend="reference", **flat)
        kernel = device.run(op, args, **flat)
        assert torch.equal(kernel[2], truth[2].float())
        for name, *triple in zip(names, kernel, baseline, truth, strict=True):
            assert_close(*triple, name)
        padded = device.run(op, grids(case, args))
        for name, *triple in zip(names[:3], padded, baseline, truth, strict=False):
            assert_close(*triple, f"{name}, padded")
        assert_close(case.flat(padded[3]), baseline[3], truth[3], "drewards, padded")


@case_names
@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_losses(device, case, loss_of, aggregation):
    args = test_ppo_loss.draw(case)
    op = slopes(loss_of, upstream=(0.7,), aggregation=aggregation)
    check(device, case, op, args, ["loss", "gradient"])


@case_names
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_policy_loss_of_all_terms(device, case, aggregation):
    for dtype in STORAGE:
        args = *test_ppo_loss.draw(case, dtype), *test_ppo_loss.draw_more(case, dtype)
        whole = functools.partial(test_ppo_loss.whole, upstream=0.7)
        names = test_ppo_loss.FIELDS
        flat = {"cu_seqlens": case.cu_seqlens, "aggregation": aggregation}
        truth = whole(*doubles(args), **flat)
        baseline = whole(*args, backend="reference", **flat)
        for name, *triple in zip(
            names, device.run(whole, args, **flat), baseline, truth, strict=True
        ):
            assert_close(*triple, name)


@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES.keys())
def test_losses_of_stored_halves(device, loss_of):
    for dtype in STORAGE[1:]:
        for name in ("holes", "giant", "uneven long rows"):
            args = test_ppo_loss.draw(EVERY[name], dtype)
            flat = {"cu_seqlens": EVERY[name].cu_seqlens}
            truth = loss_of(*doubles(args), **flat)
            baseline = loss_of(*args, backend="reference", **flat)
            assert_close(device.run(loss_of, args, **flat), baseline, truth)


# Rewards to advantages

SIXTY_FOUR = TableNormalizer(
    [(i + 1) / 64 for i in range(64)],
    [(i % 5) / 4 for i in range(64)],
    [1 + (i % 3) / 2 for i in range(64)],
)


@case_names
@pytest.mark.parametrize("normalizer", [*NORMALIZERS, "64 knots"])
def test_scatter(device, case, normalizer):
    fitted = SIXTY_FOUR if normalizer == "64 knots" else NORMALIZERS[normalizer][0]
    rewards, ends, *_ = draw(case)
    for credit in CREDITS:
        args = rewards, ends, case.mask
        names = ["token rewards"]
        check(device, case, scatter_segment_rewards, args, names, normalizer=fitted, **credit)


@case_names
@pytest.mark.parametrize("normalizer", [*NORMALIZERS, "64 knots"])
def test_a_curve_is_read_from_memory(device, case, normalizer, monkeypatch):
    fitted = SIXTY_FOUR if normalizer == "64 knots" else NORMALIZERS[normalizer][0]
    if fitted is None:
        return
    args = draw(case)
    flat = {"cu_seqlens": case.cu_seqlens, "normalizer": fitted}
    ops = (
        (segment_advantages, args),
        (scatter_segment_rewards, (*args[:2], case.mask)),
        (segment_ends_and_advantages, (*test_advantages.draw_with_entropy(case), 1.0)),
    )
    from_host = [device.run(op, args, **flat) for op, args in ops]
    if device.name == "host":
        monkeypatch.setattr(native, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(type(fitted), "curve_on", lambda self, device: self.curve.packed.to(device))
    from_memory = [device.run(op, args, **flat) for op, args in ops]
    for got, expected in zip(from_memory, from_host, strict=True):
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


@case_names
@storage
def test_gae(device, case, dtype):
    rewards, _, _, _, values, mask = draw(case, dtype)
    for gamma, lam in DISCOUNTS:
        names = "advantages", "returns"
        check(device, case, gae, (rewards, values, mask), names, gamma=gamma, lam=lam)


@case_names
@storage
def test_advantages_of_segments(device, case, dtype):
    args = draw(case, dtype)
    names = "advantages", "returns", "token_rewards", "kl"
    for normalizer, credit in zip(("none", "line", "table"), CREDITS, strict=True):
        fitted = NORMALIZERS[normalizer][0]
        check(device, case, segment_advantages, args, names, normalizer=fitted, **credit)


def test_advantages_of_ends_far_apart(device):
    """Segments over several tiles, rows whose first or last tile has no end, and no end at all."""
    case = _case([9000, 9000, 9000, 9000], "holes", 6)
    args = list(draw(case))
    args[1] = torch.zeros_like(case.mask)
    for row, ends in enumerate([[8999], [4500], [3, 8000, 8001], []]):
        args[1][[9000 * row + end for end in ends]] = True
    args[1] &= case.mask
    args[0] = torch.where(args[1], 2.0, NAN)
    for credit in CREDITS:
        names = "advantages", "returns", "token_rewards", "kl"
        check(device, case, segment_advantages, args, names, **credit)


@case_names
@alignments
@pytest.mark.parametrize("exclude_last", [True, False])
def test_ends_and_advantages_at_once(device, case, entropy_of, exclude_last):
    """To the bit what the two ops are, packed and padded."""
    cuts = {"entropy_of": entropy_of, "exclude_last": exclude_last}
    options = cuts | {"normalizer": NORMALIZERS["line"][0]}
    streams = test_advantages.draw_with_entropy(case)

    def in_two(*args, backend, **more):
        return test_advantages.one_after_the_other(*args, backend=backend, **options, **more)

    def at_once(*args, backend, **more):
        return segment_ends_and_advantages(*args, 1.0, backend=backend, **options, **more)

    flat = {"cu_seqlens": case.cu_seqlens}
    packed = device.run(at_once, streams, **flat)
    expected = at_once(*streams, backend="reference", **flat)
    assert torch.equal(packed[0], expected[0])
    assert_same_bits(packed, device.run(in_two, streams, **flat))
    padded = grids(case, streams)
    assert_same_bits(device.run(at_once, padded), device.run(in_two, padded))


@storage
def test_ends_and_advantages_of_stored_halves_and_of_a_mixture(device, dtype):
    for name in ("holes", "uneven long rows"):
        flat = {"cu_seqlens": EVERY[name].cu_seqlens}
        streams = list(test_advantages.draw_with_entropy(EVERY[name], dtype))

        def at_once(*args, **more):
            return segment_ends_and_advantages(*args, 1.0, **more)

        for _ in range(2):
            expected = device.run(test_advantages.one_after_the_other, streams, **flat)
            assert_same_bits(device.run(at_once, streams, **flat), expected)
            streams[0], streams[2] = streams[0].float(), streams[2].float()


def test_ends_and_advantages_of_rows_with_one_action_token_in_any_tile(device):
    mask = torch.zeros(6, 9000, dtype=torch.bool)
    mask[range(6), [0, 1, 4095, 4096, 8999, 5000]] = True
    streams = *(torch.where(mask, 2.0, NAN) for _ in range(5)), mask
    for threshold in (1.0, 3.0):
        ends, *out = device.run(segment_ends_and_advantages, (*streams, threshold))
        assert torch.equal(ends, mask)
        expected = segment_advantages(*streams[1:2], ends, *streams[2:], backend="reference")
        assert_same_bits(out, expected)


@case_names
@storage
@pytest.mark.parametrize("center", [True, False])
def test_whiten(device, case, dtype, center):
    x = draw(case, dtype)[0] + 5
    truth = whiten(x.double(), case.mask, center=center)
    baseline = whiten(x, case.mask, center=center, backend="reference")
    assert_close(device.run(whiten, (x, case.mask), center=center), baseline, truth)
    padded = device.run(whiten, grids(case, (x, case.mask)), center=center)
    assert_close(case.flat(padded), baseline, truth)


# The running normaliser

TO_ROUNDING = {"rtol": 1e-12, "atol": 1e-12}
# Both iterations end when a step is below 1e-12, so they end that close to each other.
TO_ITERATION = {"rel": 1e-9, "abs": 1e-10}


def binned(device, case, args, bins):
    """(moments, not finite) of a flat stream on the device."""
    rewards, ends, mask = (x.to(device.torch) for x in args)
    out = location_moments(rewards, ends, mask, case.cu_seqlens.to(device.torch), bins)
    return tuple(x.cpu() for x in out)


@case_names
@storage
@pytest.mark.parametrize("bins", [1, 7, 1000])
def test_moments_of_positions(in_memory, case, dtype, bins):
    rewards, ends, *_ = draw(case, dtype)
    args = rewards, ends, case.mask
    got, not_finite = binned(in_memory, case, args, bins)
    expected = reference.location_moments(*args, case.cu_seqlens, bins)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got, expected, **TO_ROUNDING)
    assert not_finite.tolist() == [0, 0]
    grid = [x.to(in_memory.torch) for x in grids(case, args)]
    padded, _ = location_moments(*grid, None, bins)
    assert torch.equal(padded.cpu()[0], expected[0])
    torch.testing.assert_close(padded.cpu(), expected, **TO_ROUNDING)


def test_moments_of_more_rows_than_parts(in_memory):
    """Several rows of a part share a table, long and short ones."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 40, (5000,), generator=g).tolist()
    lengths[7::900] = [700] * len(lengths[7::900])
    case = _case(lengths, "holes", 1)
    rewards, ends, *_ = draw(case)
    args = rewards, ends, case.mask
    got, _ = binned(in_memory, case, args, 100)
    torch.testing.assert_close(
        got, reference.location_moments(*args, case.cu_seqlens, 100), **TO_ROUNDING
    )


def test_rewards_that_are_not_finite_are_counted(in_memory):
    case = EVERY["uneven long rows"]
    rewards, ends, *_ = draw(case)
    at = (case.mask & ends).nonzero().squeeze(1)
    rewards[at[[0, 5, -1]]] = torch.tensor([NAN, math.inf, -math.inf])
    moments, not_finite = binned(in_memory, case, (rewards, ends, case.mask), 10)
    assert not moments.any()
    assert not_finite.tolist() == [3, len(at)]


def synthetic(name):
    """Moments [3, bins] that ask for one thing each."""
    g = torch.Generator().manual_seed(0)
    bins = 7 if name == "few bins" else 2500 if name == "many bins" else 1000
    x = (torch.arange(1, bins + 1).double() / bins).log()
    noise = 0.2 * torch.randn(2, bins, generator=g, dtype=torch.float64)
    count = torch.randint(1, 60, (bins,), generator=g).double()
    mean, std = 0.8 * x + 0.5 + noise[0], (0.1 * x + 2.5 + noise[1]).abs()
    if name == "outliers":
        mean[::9] += 20
    elif name == "bump":
        mean = torch.where((x.exp() > 0.3) & (x.exp() < 0.7), 5.0, 0.0) + noise[0]
    elif name == "decayed":
        count = count * 0.9 ** torch.randint(0, 60, (bins,), generator=g).double()
    elif name == "sparse":
        count = torch.where(torch.rand(bins, generator=g) < 0.03, count, 0.0)
    elif name == "frequent and rare":
        count[::3] = 5000
    elif name == "one position":
        count[:-1] = 0
    elif name == "exact line":
        mean, std = 0.8 * x + 0.5, 0.1 * x + 2.5
    elif name == "few segments":
        count = torch.where(torch.arange(bins) % 100 == 99, 4.0, 0.0)
    elif name == "rewards of 0":
        mean = 0 * mean
    moments = torch.stack([count, mean, count * std.square()])
    return torch.where(count > 0, moments, 0.0)


SYNTHETIC = ["line", "outliers", "bump", "decayed", "sparse", "frequent and rare", "one position"]
SYNTHETIC += ["exact line", "few segments", "rewards of 0", "few bins", "many bins"]


def assert_same_fit(got, expected):
    for name in ("positions", "counts", "means", "stds"):
        assert torch.equal(getattr(got, name), getattr(expected, name))
    for form in ("line", "table"):
        numbers, wanted = (getattr(fit, form).curve.numbers for fit in (got, expected))
        assert numbers == pytest.approx(wanted, **TO_ITERATION)
    assert got.r2_mean == pytest.approx(expected.r2_mean, rel=1e-8, abs=1e-8)
    assert got.r2_std == pytest.approx(expected.r2_std, rel=1e-8, abs=1e-8)
    assert type(got.best) is type(expected.best)


@pytest.mark.parametrize("name", SYNTHETIC)
@pytest.mark.parametrize(("epsilon", "min_std"), [(1.35, None), (1.05, 0.3), (3.0, None)])
def test_fit_is_that_of_the_host(in_memory, name, epsilon, min_std):
    moments = synthetic(name)
    expected = fit_moments(moments, epsilon, min_std)
    forms, curve = fit_location(moments.to(in_memory.torch), epsilon, min_std)
    assert_same_fit(FitOnGPU(forms, moments, min_std), expected)
    numbers = expected.best.curve.numbers
    assert curve[: len(numbers)].tolist() == pytest.approx(numbers, **TO_ITERATION)
    assert not curve[len(numbers) :].any()


@pytest.fixture
def host_as_gpu(monkeypatch):
    """The stand-in, with memory as torch gives it."""
    monkeypatch.setattr(native, "kernels", lambda tensor: on_host())
    monkeypatch.setattr(native, "executor", lambda tensor: (0, 0))
    monkeypatch.setattr(native, "on_gpu", lambda tensor: True)


def test_fit_is_a_custom_operator(host_as_gpu):
    for name, min_std in (("line", None), ("few bins", 0.5)):
        torch.library.opcheck(fit_location, (synthetic(name), 1.35, min_std))


def on(device, batch):
    return [x.to(device.torch) for x in batch]


def running_pair(device, n_batches, **options):
    """The same history in two normalisers: on the device, and by the definition on the host."""
    there, here = (RunningLocationNormalizer(**options) for _ in range(2))
    for seed in range(n_batches):
        batch = test_normalizer.batch_of(seed)
        there.update(*on(device, batch))
        here.update(*batch, backend="reference")
        if seed % 2:
            there.all_reduce()
            here.all_reduce()
    return there, here


def assert_same_state(got, expected):
    """Of two state_dicts: the bins and counts exactly, the rest to rounding."""
    assert [k for k in got if got[k] is None] == [k for k in expected if expected[k] is None]
    for key in ("past", "batch"):
        if got[key] is None:
            continue
        assert got[key]["bin"] == expected[key]["bin"]
        assert got[key]["count"] == expected[key]["count"]
        for name in ("mean", "m2"):
            assert got[key][name] == pytest.approx(expected[key][name], rel=1e-12, abs=1e-12)
    if got["applied"] is not None:
        assert got["applied"]["type"] == expected["applied"]["type"]
        for key, value in expected["applied"].items():
            if key != "type":
                assert got["applied"][key] == pytest.approx(value, **TO_ITERATION)


@pytest.mark.parametrize("decay", [1.0, 0.7])
@pytest.mark.parametrize("n_batches", [1, 5])
def test_running_is_that_of_the_host(in_memory, decay, n_batches):
    there, here = running_pair(in_memory, n_batches, decay=decay, bins=200)
    assert_same_state(there.state_dict(), here.state_dict())
    assert_same_fit_of_running(there.refit(), here.refit())
    assert_same_state(there.state_dict(), here.state_dict())
    none = torch.zeros(2, 3, dtype=torch.bool)
    for running in (there, here):
        running.all_reduce()  # an empty batch, and one without segments
    there.update(*on(in_memory, (torch.full((2, 3), NAN), none, none)))
    here.update(torch.full((2, 3), NAN), none, none, backend="reference")
    assert_same_state(there.state_dict(), here.state_dict())


def assert_same_fit_of_running(got, expected):
    assert torch.equal(got.counts, expected.counts)
    torch.testing.assert_close(got.means, expected.means, **TO_ROUNDING)
    torch.testing.assert_close(got.stds, expected.stds, **TO_ROUNDING)
    assert got.best.curve.numbers == pytest.approx(expected.best.curve.numbers, **TO_ITERATION)


@pytest.mark.parametrize("bump", [0.0, 5.0])
def test_running_pays_what_its_fit_pays(in_memory, bump):
    """A line and a table, which segment_advantages reads where the fit has left it."""
    running = RunningLocationNormalizer(min_std=0.1)
    rewards, ends, mask = test_normalizer.batch_of(3)
    at_middle = torch.arange(30).expand(40, 30) % 30 // 10 == 1
    batch = on(in_memory, (rewards + bump * at_middle, ends, mask))
    running.update(*batch)
    best = running.refit().best
    assert torch.equal(
        running.curve_on(batch[0].device)[: len(best.curve.packed)].cpu(), best.curve.packed
    )
    credit = {"spread": "even", "reduction": "mean"}
    of_running, of_fit = (
        scatter_segment_rewards(*batch, normalizer=n, **credit) for n in (running, best)
    )
    assert torch.equal(of_running, of_fit)


def test_running_state_goes_between_devices(in_memory):
    there, here = running_pair(in_memory, 3, decay=0.9, bins=100, min_std=0.05)
    there.refit()
    here.refit()
    state = there.state_dict()
    back = RunningLocationNormalizer.from_state_dict(state)  # on the host
    assert back.state_dict() == state
    batch = test_normalizer.batch_of(7)
    back.update(*on(in_memory, batch))  # takes it to the device
    there.update(*on(in_memory, batch))
    assert back.state_dict() == there.state_dict()
    memory = there.curve_on(there._past.device).data_ptr()
    there.load_state_dict(here.state_dict())
    assert there.state_dict() == here.state_dict()
    assert there.curve_on(there._past.device).data_ptr() == memory
    assert there.curve == here.curve


def test_running_reports_what_it_found_when_it_is_read(in_memory):
    running = RunningLocationNormalizer(bins=50)
    batch = on(in_memory, test_normalizer.batch_of(0))
    running.update(*batch)
    with pytest.raises(RuntimeError, match="never fitted"):
        scatter_segment_rewards(*batch, normalizer=running)
    before = running.state_dict()
    rewards, ends, mask = test_normalizer.batch_of(1)
    rewards[tuple(ends.nonzero()[0])] = math.inf
    for _ in range(2):
        running.update(*on(in_memory, (rewards, ends, mask)))
    n = 2 * int(ends.sum())
    with pytest.raises(ValueError, match=rf"expected finite rewards at .* got 2 of {n} that are"):
        running.state_dict()
    assert running.state_dict() == before
    running.check()


@pytest.mark.parametrize(
    ("moments", "error", "message"),
    [
        ("no segment", RuntimeError, r"no segment to fit to; call update\("),
        ("no spread", ValueError, "min_std: .* a tenth of std_intercept = 0.0; pass min_std="),
    ],
)
def test_running_keeps_its_curve_when_a_fit_cannot_be_applied(in_memory, moments, error, message):
    running = RunningLocationNormalizer()
    rewards, ends, mask = on(in_memory, test_normalizer.batch_of(0))
    constant = torch.full_like(rewards, 2.0)
    never = torch.zeros_like(ends)
    bad = (constant, ends, mask) if moments == "no spread" else (rewards, never, mask)
    running.update(*bad)
    fit = running.refit()
    paid = scatter_segment_rewards(rewards, ends, mask, normalizer=running)
    assert paid[(ends & mask)].isnan().all()  # no fit was ever applied
    for look in (lambda: fit.line, running.check):
        with pytest.raises(error, match=message):
            look()
    with pytest.raises(RuntimeError, match="never fitted"):
        running.mean(torch.ones(1))

    fine = RunningLocationNormalizer()
    fine.update(rewards, ends, mask)
    fine.refit()
    before = fine.curve
    fine.load_state_dict({**fine.state_dict(), "past": running.state_dict()["past"]})
    fine.refit()
    with pytest.raises(error, match=message):
        fine.check()
    assert fine.curve == before


def test_running_takes_one_launch_for_moments_and_one_for_the_fit(host_as_gpu):
    running = RunningLocationNormalizer()
    on_host().launches()
    running.update(*test_normalizer.batch_of(0))
    assert on_host().launches() == 1
    running.refit()
    assert on_host().launches() == 1


# All of them


def learnt(rewards, ends, mask, *, cu_seqlens, backend):
    """What a running normaliser collects, and its fit."""
    moments, not_finite = location_moments(rewards, ends, mask, cu_seqlens, 100)
    return moments, not_finite, *fit_location(moments, 1.35, 0.1)


def everything(device, case, dtype=torch.float32):
    """Every op on one case, flat where there are rows."""
    flat = {"cu_seqlens": case.cu_seqlens}
    rewards, ends, logprobs, ref_logprobs, values, mask = draw(case, dtype)
    entropy = test_segments.draw_entropy(case, dtype)
    pairs = test_bradley_terry.draw(case, dtype)
    stream = rewards, ends, logprobs, ref_logprobs, values, mask
    line = NORMALIZERS["line"][0]
    results = {
        "segment_ends": [device.run(segment_ends, (entropy, mask, 1.0), **flat)],
        "segment_scores": device.run(slopes(segment_scores), (*pairs, mask), **flat),
        "scatter": [device.run(scatter_segment_rewards, (*stream[:2], mask), **flat)],
        "gae": device.run(gae, (rewards, values, mask), **flat),
        "advantages": device.run(segment_advantages, stream, normalizer=line, **flat),
        "at once": device.run(
            segment_ends_and_advantages, (entropy, rewards, *stream[2:], 1.0), **flat
        ),
        "whiten": [device.run(whiten, (values, mask))],
        "running": device.run(learnt, (rewards, ends, mask), **flat),
    }
    if len(case.lengths) % 2 == 0:
        op = slopes(segment_bradley_terry)
        results["bradley_terry"] = device.run(op, (*pairs, mask), **flat)
    for name, loss_of in LOSSES.items():
        args = test_ppo_loss.draw(case, dtype)
        results[name] = device.run(slopes(loss_of), args, **flat)
    args = *test_ppo_loss.draw(case, dtype), *test_ppo_loss.draw_more(case, dtype)
    results["policy, all terms"] = device.run(test_ppo_loss.whole, args, **flat)
    return results


def assert_identical(left, right):
    for op, results in left.items():
        for a, b in zip(results, right[op], strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), op
            assert torch.equal(a.isnan(), b.isnan()), op


@pytest.mark.parametrize("name", ["holes", "giant", *TILES])
def test_reruns_are_identical_in_whatever_order_the_threads_run(device, name):
    first, *others = [everything(device, EVERY[name]) for _ in device.orders()]
    for other in others:
        assert_identical(first, other)


@pytest.mark.parametrize("name", ["holes", "uneven long rows"])
@storage
def test_memory_that_is_not_aligned(device, name, dtype):
    """Streams that start at the second element of their storage cannot be read in vectors."""
    case = EVERY[name]
    shifted = Case([1, *case.lengths], torch.cat([torch.zeros(1, dtype=torch.bool), case.mask]))

    def drop_first(op):
        def run(*args, **options):
            args = [x[1:] if isinstance(x, torch.Tensor) and x.dim() == 1 else x for x in args]
            return op(*args, **options)

        return run

    args = draw(shifted, dtype)
    flat = {"cu_seqlens": case.cu_seqlens}
    aligned = device.run(segment_advantages, [x[1:].clone() for x in args], **flat)
    for a, b in zip(device.run(drop_first(segment_advantages), args, **flat), aligned, strict=True):
        assert torch.equal(a, b)
    entropy = test_segments.draw_entropy(shifted, dtype)
    streams = entropy, args[0], *args[2:], 1.0
    aligned = [x[1:].clone() if isinstance(x, torch.Tensor) else x for x in streams]
    assert_same_bits(
        device.run(drop_first(segment_ends_and_advantages), streams, **flat),
        device.run(segment_ends_and_advantages, aligned, **flat),
    )
    ends = device.run(drop_first(segment_ends), (entropy, shifted.mask, 1.0), **flat)
    expected = segment_ends(entropy[1:], case.mask, 1.0, backend="reference", **flat)
    assert torch.equal(ends, expected)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (2, 4)])
def test_nothing(device, shape):
    none, nan = torch.zeros(shape, dtype=torch.bool), torch.full(shape, NAN)
    out = [device.run(segment_ends, (nan, none, 1.0))]
    out += [device.run(scatter_segment_rewards, (nan, none, none))]
    out += device.run(gae, (nan, nan, none))
    out += device.run(segment_advantages, (nan, none, nan, nan, nan, none))
    out += device.run(segment_ends_and_advantages, (nan, nan, nan, nan, nan, none, 1.0))
    out += [device.run(whiten, (nan, none))]
    for x in out:
        assert x.shape == shape
        assert not x.any()
    scores, gradient = device.run(slopes(segment_scores), (nan, none, none))
    assert torch.equal(scores, torch.zeros(shape[0]))
    assert torch.equal(gradient, torch.zeros(shape))
    for loss_of in LOSSES.values():
        loss, gradient = device.run(slopes(loss_of), (nan, nan, nan, none))
        assert loss == 0
        assert torch.equal(gradient, torch.zeros(shape))


def test_a_nan_stays_in_its_row(device):
    case = EVERY["uneven long rows"]
    rewards, ends, *rest = draw(case)
    poisoned = rewards.clone()
    poisoned[(case.mask & ends).nonzero()[-1]] = NAN
    flat = {"cu_seqlens": case.cu_seqlens}
    clean = device.run(segment_advantages, (rewards, ends, *rest), **flat)
    dirty = device.run(segment_advantages, (poisoned, ends, *rest), **flat)
    others = sum(case.lengths[:-1])
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[:others], b[:others])
    expected = segment_advantages(poisoned, ends, *rest, backend="reference", **flat)
    for a, b in zip(dirty, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan())


def test_whiten_says_so_where_there_is_no_variance(device):
    x = torch.tensor([[1.0, float("inf"), NAN], [2.0, 3.0, NAN]])
    mask = torch.tensor([[True, True, False]] * 2)
    assert torch.equal(device.run(whiten, (x, mask)).isnan(), mask)
    constant = torch.full((2, 3), 3.0)
    assert not device.run(whiten, (constant, mask)).any()


def test_each_op_is_one_launch_each_way(monkeypatch):
    device = Device("host")
    monkeypatch.setattr(native, "kernels", lambda tensor: on_host())
    monkeypatch.setattr(native, "executor", lambda tensor: (0, 0))
    case = CASES["response"]
    flat = {"cu_seqlens": case.cu_seqlens}
    rewards, ends, logprobs, ref_logprobs, values, mask = draw(case)
    stream = rewards, ends, logprobs, ref_logprobs, values, mask
    new = test_ppo_loss.draw(case)
    ops = [
        (1, segment_ends, (values, mask, 1.0)),
        (2, slopes(segment_scores), (rewards, ends, mask)),
        (2, slopes(segment_bradley_terry), (rewards, ends, mask)),
        (1, scatter_segment_rewards, (rewards, ends, mask)),
        (1, gae, (rewards, values, mask)),
        (1, segment_advantages, stream),
        (1, segment_ends_and_advantages, (values, rewards, *stream[2:], 1.0)),
        *((2, slopes(loss_of), new) for loss_of in LOSSES.values()),
        (2, test_ppo_loss.whole, (*new, *test_ppo_loss.draw_more(case))),
    ]
    for launches, op, args in ops:
        on_host().launches()
        device.run(op, args, **flat)
        assert on_host().launches() == launches
    device.run(whiten, (values, mask))
    assert on_host().launches() == 2  # the moments, which ranks exchange, and their use


def test_too_many_knots():
    x = torch.zeros(1, 4)
    packed = torch.full((4 + 3 * 65,), 65.0)
    with pytest.raises(ValueError, match="expected at most 64 knots, got 65; merge neighbouring"):
        on_host().scatter_segment_rewards_fwd(
            rewards=native.floats(x),
            ends=0,
            mask=0,
            rows=(1, 4, 0),
            curve=curve_address(packed),
            spread=0,
            mean=False,
            clip=1.0,
            out=native.ptr(x),
            executor=(0, 0),
        )


# What only a GPU can show


@pytest.fixture
def gpu():
    assert native.cuda_extension is not None, native.cuda_missing
    return torch.device("cuda")


def stream_of(case, device):
    return [x.to(device) for x in draw(case)]


@pytest.mark.gpu
def test_gpu_graph_capture(gpu):
    case = EVERY["uneven long rows"]
    rewards, _, logprobs, ref_logprobs, values, mask = stream_of(case, gpu)
    entropy = test_segments.draw_entropy(case).to(gpu)
    cu_seqlens = case.cu_seqlens.to(gpu)

    def path():
        ends, *out = segment_ends_and_advantages(
            *(entropy, rewards, logprobs, ref_logprobs, values, mask, 1.0),
            cu_seqlens=cu_seqlens,
            normalizer=NORMALIZERS["table"][0],
        )
        loss = segment_bradley_terry(rewards, ends, mask, cu_seqlens=cu_seqlens).loss
        return *out, whiten(out[0], mask), loss

    with torch.cuda.stream(torch.cuda.Stream()):
        path()  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = path()
    for shift in (0.0, 1.0):
        entropy += shift
        rewards += shift
        graph.replay()
        for a, b in zip(captured, path(), strict=True):
            assert torch.equal(a, b)


def learning_rollouts(gpu):
    """(a step that learns from a rollout and uses what it learnt, its normaliser, its inputs)."""
    case = EVERY["uneven long rows"]
    stream = stream_of(case, gpu)
    cu_seqlens = case.cu_seqlens.to(gpu)
    running = RunningLocationNormalizer(decay=0.9)

    def step():
        running.update(stream[0], stream[1], stream[5], cu_seqlens=cu_seqlens)
        running.refit()
        return segment_advantages(*stream, cu_seqlens=cu_seqlens, normalizer=running)

    return step, running, stream[0]


@pytest.mark.gpu
def test_gpu_graph_holds_update_refit_and_advantages(gpu):
    (captured_step, captured, rewards), (step, running, same_rewards) = (
        learning_rollouts(gpu) for _ in range(2)
    )
    with torch.cuda.stream(torch.cuda.Stream()):
        captured_step()  # loads the kernels, and takes the state to the GPU
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured_step()
    for shift in (0.0, 1.0, 3.0):
        rewards.mul_(1 + shift)
        same_rewards.mul_(1 + shift)
        graph.replay()
        for a, b in zip(out, step(), strict=True):
            assert torch.equal(a, b)
        assert captured == running
    captured.load_state_dict(RunningLocationNormalizer(decay=0.9).state_dict())
    running.load_state_dict(captured.state_dict())
    graph.replay()
    for a, b in zip(out, step(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_learns_without_being_waited_for(gpu):
    step, running, _ = learning_rollouts(gpu)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        running.all_reduce()
        fit = running.refit()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert fit.best == RunningLocationNormalizer.from_state_dict(running.state_dict())._applied


@pytest.mark.gpu
def test_gpu_compiles(gpu):
    case = EVERY["uneven long rows"]
    *stream, mask = stream_of(case, gpu)
    entropy = test_segments.draw_entropy(case).to(gpu)

    def step(entropy, rewards, logprobs, ref_logprobs, values, mask, cu_seqlens):
        ends = segment_ends(entropy, mask, 1.0, cu_seqlens=cu_seqlens)
        loss = segment_bradley_terry(rewards, ends, mask, cu_seqlens=cu_seqlens).loss
        advantages, returns, _, _ = segment_advantages(
            *(rewards, ends, logprobs, ref_logprobs, values, mask), cu_seqlens=cu_seqlens
        )
        return loss, whiten(advantages, mask), returns

    rewards, _, *rest = stream
    rewards = rewards.requires_grad_()
    args = entropy, rewards, *rest, mask, case.cu_seqlens.to(gpu)
    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        loss, *out = run(*args)
        results.append([loss.detach(), *out, *torch.autograd.grad(loss, rewards)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_is_not_waited_for(gpu):
    device = Device("gpu")
    case = EVERY["giant"]
    everything(device, case)
    stream = stream_of(case, gpu)
    cu_seqlens = case.cu_seqlens.to(gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        segment_ends(stream[4], stream[5], 1.0, cu_seqlens=cu_seqlens)
        out = segment_advantages(*stream, cu_seqlens=cu_seqlens)
        segment_ends_and_advantages(
            *(stream[4], stream[0], *stream[2:], 1.0), cu_seqlens=cu_seqlens
        )
        whiten(out[0], stream[5])
        rewards = stream[0].requires_grad_()
        segment_bradley_terry(rewards, *stream[1:2], cu_seqlens=cu_seqlens).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_works_on_the_current_stream(gpu):
    x = torch.ones(64, 4096, device=gpu)
    mask = torch.ones_like(x, dtype=torch.bool)
    expected = whiten(2 * x.cumsum(1), mask)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # a kernel on another stream would overtake what follows
        late = 2 * x.cumsum(1)
        got = whiten(late, mask)
    side.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.gpu
def test_gpu_finds_nan_in_debug_mode(gpu, monkeypatch):
    entropy = torch.zeros(3, 4, device=gpu)
    entropy[1, 2] = NAN
    mask = torch.ones(3, 4, dtype=torch.bool, device=gpu)
    monkeypatch.delenv("SEGKERNELS_DEBUG", raising=False)
    segment_ends(entropy, mask, 1.0, backend="native")
    monkeypatch.setenv("SEGKERNELS_DEBUG", "1")
    zeros = [torch.zeros_like(entropy)] * 4
    with pytest.raises(ValueError, match="got NaN at row 1, position 2"):
        segment_ends(entropy, mask, 1.0, backend="native")
    with pytest.raises(ValueError, match="got NaN at row 1, position 2"):
        segment_ends_and_advantages(entropy, *zeros, mask, 1.0, backend="native")


@pytest.mark.gpu
def test_gpu_of_the_tensors_and_not_the_current_one(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    x = torch.rand(4, 100, device="cuda:1")
    mask = torch.ones_like(x, dtype=torch.bool)
    with torch.cuda.device(0):
        got = whiten(x, mask, backend="native")
        assert torch.cuda.current_device() == 0
    assert got.device == x.device
    torch.testing.assert_close(got, whiten(x, mask, backend="reference"))


@pytest.mark.gpu
def test_gpu_rows_of_a_million_tokens(gpu):
    g = torch.Generator().manual_seed(0)
    lengths = [1_000_000, 0, 7, GIANT]
    case = Case(lengths, torch.rand(sum(lengths), generator=g) < 0.9)
    args = draw(case)
    names = "advantages", "returns", "token_rewards", "kl"
    check(Device("gpu"), case, segment_advantages, args, names, normalizer=NORMALIZERS["line"][0])
