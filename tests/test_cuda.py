"""The CUDA kernels: on the host, where a small stand-in for CUDA runs them, and on a GPU."""

import functools

import pytest
import test_advantages
import test_bradley_terry
import test_ppo_loss
import test_segments
import torch
from layouts import CASES, GIANT, Case, _case
from on_host import build
from test_ppo_loss import AGGREGATIONS, LOSSES
from test_rewards import CREDITS, NORMALIZERS
from tolerance import assert_close

from segkernels import (
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
from segkernels.native.rewards import curve_address

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
        monkeypatch.setattr(native, "threads_or_stream", lambda tensor: 0)
    else:
        assert native.cuda_extension is not None, native.cuda_missing
    monkeypatch.setattr(native, "empty", device.empty)
    yield device
    device.check_guards()


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
    rewards, ends, *_ = test_advantages.draw(case)
    for credit in CREDITS:
        args = rewards, ends, case.mask
        names = ["token rewards"]
        check(device, case, scatter_segment_rewards, args, names, normalizer=fitted, **credit)


@case_names
@storage
def test_gae(device, case, dtype):
    rewards, _, _, _, values, mask = test_advantages.draw(case, dtype)
    for gamma, lam in test_advantages.DISCOUNTS:
        names = "advantages", "returns"
        check(device, case, gae, (rewards, values, mask), names, gamma=gamma, lam=lam)


@case_names
@storage
def test_advantages_of_segments(device, case, dtype):
    args = test_advantages.draw(case, dtype)
    names = "advantages", "returns", "token_rewards", "kl"
    for normalizer, credit in zip(("none", "line", "table"), CREDITS, strict=True):
        fitted = NORMALIZERS[normalizer][0]
        check(device, case, segment_advantages, args, names, normalizer=fitted, **credit)


def test_advantages_of_ends_far_apart(device):
    """Segments over several tiles, rows whose first or last tile has no end, and no end at all."""
    case = _case([9000, 9000, 9000, 9000], "holes", 6)
    args = list(test_advantages.draw(case))
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
    test_advantages.assert_same_bits(packed, device.run(in_two, streams, **flat))
    padded = grids(case, streams)
    test_advantages.assert_same_bits(device.run(at_once, padded), device.run(in_two, padded))


@storage
def test_ends_and_advantages_of_stored_halves_and_of_a_mixture(device, dtype):
    for name in ("holes", "uneven long rows"):
        flat = {"cu_seqlens": EVERY[name].cu_seqlens}
        streams = list(test_advantages.draw_with_entropy(EVERY[name], dtype))

        def at_once(*args, **more):
            return segment_ends_and_advantages(*args, 1.0, **more)

        for _ in range(2):
            expected = device.run(test_advantages.one_after_the_other, streams, **flat)
            test_advantages.assert_same_bits(device.run(at_once, streams, **flat), expected)
            streams[0], streams[2] = streams[0].float(), streams[2].float()


def test_ends_and_advantages_of_rows_with_one_action_token_in_any_tile(device):
    mask = torch.zeros(6, 9000, dtype=torch.bool)
    mask[range(6), [0, 1, 4095, 4096, 8999, 5000]] = True
    streams = *(torch.where(mask, 2.0, NAN) for _ in range(5)), mask
    for threshold in (1.0, 3.0):
        ends, *out = device.run(segment_ends_and_advantages, (*streams, threshold))
        assert torch.equal(ends, mask)
        expected = segment_advantages(*streams[1:2], ends, *streams[2:], backend="reference")
        test_advantages.assert_same_bits(out, expected)


@case_names
@storage
@pytest.mark.parametrize("center", [True, False])
def test_whiten(device, case, dtype, center):
    x = test_advantages.draw(case, dtype)[0] + 5
    truth = whiten(x.double(), case.mask, center=center)
    baseline = whiten(x, case.mask, center=center, backend="reference")
    assert_close(device.run(whiten, (x, case.mask), center=center), baseline, truth)
    padded = device.run(whiten, grids(case, (x, case.mask)), center=center)
    assert_close(case.flat(padded), baseline, truth)


# All of them


def everything(device, case, dtype=torch.float32):
    """Every op on one case, flat where there are rows."""
    flat = {"cu_seqlens": case.cu_seqlens}
    rewards, ends, logprobs, ref_logprobs, values, mask = test_advantages.draw(case, dtype)
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
    }
    if len(case.lengths) % 2 == 0:
        op = slopes(segment_bradley_terry)
        results["bradley_terry"] = device.run(op, (*pairs, mask), **flat)
    for name, loss_of in LOSSES.items():
        args = test_ppo_loss.draw(case, dtype)
        results[name] = device.run(slopes(loss_of), args, **flat)
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

    args = test_advantages.draw(shifted, dtype)
    flat = {"cu_seqlens": case.cu_seqlens}
    aligned = device.run(segment_advantages, [x[1:].clone() for x in args], **flat)
    for a, b in zip(device.run(drop_first(segment_advantages), args, **flat), aligned, strict=True):
        assert torch.equal(a, b)
    entropy = test_segments.draw_entropy(shifted, dtype)
    streams = entropy, args[0], *args[2:], 1.0
    aligned = [x[1:].clone() if isinstance(x, torch.Tensor) else x for x in streams]
    test_advantages.assert_same_bits(
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
    rewards, ends, *rest = test_advantages.draw(case)
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
    monkeypatch.setattr(native, "threads_or_stream", lambda tensor: 0)
    case = CASES["response"]
    flat = {"cu_seqlens": case.cu_seqlens}
    rewards, ends, logprobs, ref_logprobs, values, mask = test_advantages.draw(case)
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
            executor=0,
        )


# What only a GPU can show


@pytest.fixture
def gpu():
    assert native.cuda_extension is not None, native.cuda_missing
    return torch.device("cuda")


def stream_of(case, device):
    return [x.to(device) for x in test_advantages.draw(case)]


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
    args = test_advantages.draw(case)
    names = "advantages", "returns", "token_rewards", "kl"
    check(Device("gpu"), case, segment_advantages, args, names, normalizer=NORMALIZERS["line"][0])
