import math

import numpy as np
import pytest
import torch
from backends import NATIVE, REFERENCE, TRITON
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

from segkernels import entropy_from_logits, logprobs_and_entropy, native
from segkernels.backend import BackendError
from segkernels.native import vocab
from segkernels.token_stats import _token_stats_bwd, _token_stats_bwd_, _token_stats_fwd
from segkernels.vocab import Rows

KERNELS = (NATIVE, *TRITON)
BACKENDS = (REFERENCE, *KERNELS)
STORAGE = (torch.float32, torch.bfloat16, torch.float16)
VOCABS = (1, 2, 3, 31, 33, 1023, 1025, 5000, 32064)
NAN, INF = float("nan"), float("inf")

backends = pytest.mark.parametrize("backend", BACKENDS)
kernels = pytest.mark.parametrize("backend", KERNELS)
# Without Triton's interpreter, which takes a second for what these take a millisecond for.
compiled = pytest.mark.parametrize("backend", [NATIVE, TRITON[1]])
storage = pytest.mark.parametrize("dtype", STORAGE, ids=str)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def stats_of(backend, logits, targets, temperature=1.0, mask=None):
    """(logprobs, entropy) on the CPU, wherever the backend computes them."""
    arguments = backend.place(logits, targets, temperature, mask)
    return [x.cpu() for x in logprobs_and_entropy(*arguments, backend=backend)]


def entropy_of(backend, logits):
    return entropy_from_logits(*backend.place(logits), backend=backend).cpu()


def naive(row, target, temperature):
    """(logprob, entropy, gradient of each) of one row of Python floats."""
    z = [x / temperature for x in row]
    top = max(z)
    e = [math.exp(x - top) for x in z]
    p = [x / sum(e) for x in e]
    log_p = [math.log(x) if x else -INF for x in p]
    entropy = -sum(a * b for a, b in zip(p, log_p, strict=True) if a)
    dentropy = [-a * (b + entropy) if a else 0.0 for a, b in zip(p, log_p, strict=True)]
    dlogprob = [float(v == target) - a for v, a in enumerate(p)]
    return log_p[target], entropy, dlogprob, dentropy


@backends
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_by_token(backend, temperature):
    logits = torch.randn(4, 7, generator=generator()) * 3
    logits[1, 2] = logits[1, 5] = -INF
    targets = torch.tensor([0, 3, 6, 2])
    logits.requires_grad_()
    logprobs, entropy = stats_of(backend, logits, targets, temperature)
    (dlogprobs,) = torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)
    (dentropy,) = torch.autograd.grad(entropy.sum(), logits)
    for n, row in enumerate(logits.tolist()):
        logprob, h, dlogprob, dh = naive(row, int(targets[n]), temperature)
        assert logprobs[n].item() == pytest.approx(logprob, rel=1e-5)
        assert entropy[n].item() == pytest.approx(h, rel=1e-5)
        torch.testing.assert_close(dlogprobs[n] * temperature, torch.tensor(dlogprob))
        torch.testing.assert_close(dentropy[n] * temperature, torch.tensor(dh))


def run(backend, logits, targets, temperature=1.0, mask=None, seed=0):
    """(logprobs, entropy, dlogits) with random upstream gradients."""
    logits = logits.detach().clone().requires_grad_()
    logprobs, entropy = stats_of(backend, logits, targets, temperature, mask)
    up = torch.randn(2, *entropy.shape, generator=generator(seed), dtype=torch.float64)
    up = up.to(entropy.dtype)
    (dlogits,) = torch.autograd.grad((logprobs, entropy), logits, (up[0], up[1]))
    return logprobs.detach(), entropy.detach(), dlogits


def check_against_reference(backend, logits, targets, temperature=1.0, mask=None, what=""):
    double = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    kernel = run(backend, logits, targets, temperature, mask)
    baseline = run(REFERENCE, logits, targets, temperature, mask)
    truth = run(REFERENCE, logits.double(), targets, double, mask)
    assert kernel[2].dtype == logits.dtype
    assert kernel[0].dtype == kernel[1].dtype == torch.float32
    for name, k, b, t in zip(
        ("logprobs", "entropy", "dlogits"), kernel, baseline, truth, strict=True
    ):
        assert_close(k, b, t, f"{what} {name}")


def draw(rows, vocab, dtype, scale=3.0, seed=0):
    logits = (torch.randn(rows, vocab, generator=generator(seed)) * scale).to(dtype)
    return logits, torch.randint(0, vocab, (rows,), generator=generator(seed + 1))


def check_random(backend, dtype, vocab):
    rows = 5 if vocab < 10_000 else 2
    logits, targets = draw(rows, vocab, dtype)
    temperatures = torch.rand(rows, generator=generator(3)) + 0.5
    check_against_reference(backend, logits, targets, what=f"{dtype} {vocab}")
    check_against_reference(backend, logits, targets, 0.7, what=f"{dtype} {vocab} at 0.7")
    check_against_reference(backend, logits, targets, temperatures, what=f"{dtype} {vocab} per row")


@kernels
@storage
@pytest.mark.parametrize("vocab", VOCABS)
def test_kernels_equal_reference(backend, dtype, vocab):
    check_random(backend, dtype, vocab)


def hard_rows(dtype, vocab=1000):
    """Named rows at the limits of the arithmetic; every one has a distribution."""
    base = torch.randn(vocab, generator=generator(7))
    banned = base.clone()
    banned[torch.arange(vocab) % 3 > 0] = -INF
    only = torch.full((vocab,), -INF)
    only[vocab // 2] = 2.0
    late = torch.full((vocab,), -INF)
    late[-1], late[-2] = 1.0, 0.5
    peaked = base.clone()
    peaked[17] = 80.0
    rows = {
        "banned": banned,
        "one allowed": only,
        "allowed at the end": late,
        "peaked": peaked,
        "far below zero": base - 3e4,
        "far above zero": base + 3e4,
        "wide": base * 1e4,
        "tails": torch.linspace(-200, 0, vocab),
        "rising": torch.linspace(0, 100, vocab),
        "subnormal": base * 1e-41,
    }
    return {name: row.to(dtype) for name, row in rows.items()}


def check_hard(backend, dtype, vocab=1000):
    for name, row in hard_rows(dtype, vocab).items():
        targets = torch.tensor([int(row.double().argmax())])
        check_against_reference(backend, row[None], targets, what=f"{dtype} {name}")
        check_against_reference(backend, row[None], targets, 0.5, what=f"{dtype} {name} at 0.5")


@kernels
@storage
def test_hard_rows(backend, dtype):
    check_hard(backend, dtype)


@compiled
@storage
def test_hard_rows_of_several_spans(backend, dtype):
    check_hard(backend, dtype, 40_001)


@backends
@storage
@pytest.mark.parametrize("vocab", VOCABS)
def test_equal_logits_give_log_vocab(backend, dtype, vocab):
    logits = torch.tensor([-3e4, -1.0, 0.0, 2.0]).to(dtype)[:, None].expand(4, vocab)
    logprobs, entropy = stats_of(backend, logits, torch.zeros(4, dtype=torch.long))
    log_vocab = torch.tensor(math.log(vocab), dtype=torch.float32)
    torch.testing.assert_close(entropy, log_vocab.expand(4), rtol=1.2e-7, atol=0)
    torch.testing.assert_close(logprobs, -log_vocab.expand(4), rtol=1.2e-7, atol=0)


@backends
@storage
def test_banned_tokens_add_exactly_nothing(backend, dtype):
    """The same row with and without its banned tokens, in any place."""
    kept, targets = draw(3, 37, dtype)
    wide = torch.full((3, 1037), -INF, dtype=dtype)
    columns = torch.randperm(1037, generator=generator(5))[:37].sort().values
    wide[:, columns] = kept
    few = run(backend, kept, targets)
    many = run(backend, wide, columns[targets])
    assert (many[2].index_fill(1, columns, 0) == 0).all()
    for a, b in ((few[0], many[0]), (few[1], many[1]), (few[2], many[2][:, columns])):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
    certain = torch.full((1, 1037), -INF, dtype=dtype)
    certain[0, 700] = -5.0
    logprobs, entropy, dlogits = run(backend, certain, torch.tensor([700]))
    assert logprobs.item() == 0
    assert entropy.item() == 0
    assert (dlogits == 0).all()


@backends
@storage
@pytest.mark.parametrize("place", [0, 5, 999])
def test_no_distribution_gives_nan(backend, dtype, place):
    check_no_distribution(backend, dtype, 1000, place)


@compiled
@storage
def test_no_distribution_in_the_last_of_several_spans(backend, dtype):
    check_no_distribution(backend, dtype, 40_001, 40_000)


def check_no_distribution(backend, dtype, vocab, place):
    logits = torch.randn(4, vocab, generator=generator()).to(dtype)
    logits[0, place] = NAN
    logits[1, place] = INF
    logits[2] = -INF
    logprobs, entropy, dlogits = run(backend, logits, torch.tensor([1, 2, 3, 4]))
    assert logprobs[:3].isnan().all()
    assert entropy[:3].isnan().all()
    assert dlogits[:3].isnan().all()
    assert logprobs[3].isfinite()
    assert entropy[3].isfinite()
    assert dlogits[3].isfinite().all()


@kernels
def test_every_nan_stays_nan(backend):
    bits = torch.tensor([0x7FC00000, 0x7FC00001, 0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32)
    logits = torch.zeros(5, 40)
    logits[:, 33] = bits.view(torch.float32)
    assert entropy_of(backend, logits).isnan().all()


@backends
def test_masked_rows_are_transparent(backend):
    logits, targets = draw(20, 100, torch.float32)
    mask = torch.rand(20, generator=generator(2)) < 0.6
    temperatures = torch.rand(20, generator=generator(3)) + 0.5
    poisoned = logits.masked_fill(~mask[:, None], NAN)
    garbage = targets.masked_fill(~mask, 10**12)
    hot = temperatures.masked_fill(~mask, NAN)
    got = run(backend, poisoned, garbage, hot, mask)
    alone = run(backend, logits, targets, temperatures)
    for values in got:
        assert (values[~mask] == 0).all()
    for a, b in zip(got[:2], alone[:2], strict=True):
        assert torch.equal(a[mask], b[mask])
    assert torch.equal(got[2][mask], alone[2][mask])
    nothing = run(backend, poisoned, garbage, 1.0, torch.zeros_like(mask))
    assert all((values == 0).all() for values in nothing)


@backends
def test_ignored_targets(backend):
    logits, targets = draw(6, 50, torch.float32)
    targets[::2] = -100
    logits.requires_grad_()
    logprobs, entropy = stats_of(backend, logits, targets)
    assert (logprobs[::2] == 0).all()
    assert torch.equal(entropy, entropy_of(backend, logits))
    (dlogits,) = torch.autograd.grad(logprobs.sum(), logits)
    assert (dlogits[::2] == 0).all()
    assert (dlogits[1::2] != 0).all()


@kernels
def test_rows_without_upstream_gradient_are_not_read(backend):
    """Their logits are destroyed between the passes; their gradient is 0, not NaN."""
    logits, targets = backend.place(*draw(8, 50, torch.float32))
    _, entropy, stats = _token_stats_fwd(logits, targets, 1.0, None, None, False, backend)
    up = torch.zeros_like(entropy)
    up[3] = 2.0
    logits[torch.arange(8) != 3] = NAN
    dlogits = _token_stats_bwd(logits, targets, 1.0, None, stats, None, up, backend)
    assert (dlogits[3] != 0).all()
    dlogits[3] = 0
    assert (dlogits == 0).all()


@backends
@pytest.mark.parametrize("needs", ["logprobs", "entropy"])
def test_partial_gradients(backend, needs):
    logits, targets = draw(5, 33, torch.float64)
    grads = []
    for name, dtype in ((backend, torch.float32), (REFERENCE, torch.float64)):
        x = logits.to(dtype).requires_grad_()
        outputs = stats_of(name, x, targets)
        grads.append(torch.autograd.grad(outputs[needs == "entropy"].sum(), x)[0])
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, "tensor"])
def test_gradcheck_of_the_reference(temperature):
    logits, targets = draw(4, 6, torch.float64)
    logits[0, 2] = -INF
    targets[0] = 1
    targets[3] = -100
    mask = torch.tensor([True, True, False, True])
    if temperature == "tensor":
        temperature = torch.tensor([0.5, 1.0, NAN, 2.0], dtype=torch.float64)
    finite = logits.isfinite()

    def stats(x):
        full = torch.full_like(logits, -INF).masked_scatter(finite, x)
        return logprobs_and_entropy(full, targets, temperature, mask)

    assert torch.autograd.gradcheck(stats, logits[finite].requires_grad_())


@st.composite
def views(draw_from):
    """Logits of any leading shape, often a view with gaps."""
    shape = draw_from(st.sampled_from([(), (4,), (0,), (3, 5), (2, 3, 4), (1, 6), (0, 3)]))
    vocab = draw_from(st.sampled_from([1, 3, 33, 100]))
    how = draw_from(st.sampled_from(["plain", "shifted", "transposed", "columns", "expanded"]))
    dtype = draw_from(st.sampled_from(STORAGE))
    g = generator(draw_from(st.integers(0, 1000)))
    if how == "shifted" and len(shape) >= 2:
        wide = torch.randn(*shape[:-1], shape[-1] + 2, vocab, generator=g)
        logits = wide.to(dtype)[..., 1:-1, :]
    elif how == "transposed" and len(shape) >= 2:
        logits = torch.randn(*shape[::-1], vocab, generator=g).to(dtype)
        logits = logits.permute(*range(len(shape))[::-1], len(shape))
    elif how == "columns":
        logits = torch.randn(*shape, 2 * vocab + 1, generator=g).to(dtype)[..., 1::2]
    elif how == "expanded" and len(shape) == 2:
        logits = torch.randn(shape[0], 1, vocab, generator=g).to(dtype).expand(*shape, vocab)
    else:
        logits = torch.randn(*shape, vocab, generator=g).to(dtype)
    targets = torch.randint(0, vocab, shape, generator=g)
    mask = torch.rand(shape, generator=g) < 0.7 if draw_from(st.booleans()) else None
    return logits, targets, mask


def check_view(backend, case):
    logits, targets, mask = case
    got = stats_of(backend, logits, targets, 0.9, mask)
    same = stats_of(backend, logits.contiguous(), targets, 0.9, mask)
    assert torch.equal(got[0], same[0])
    assert torch.equal(got[1], same[1])
    check_against_reference(backend, logits, targets, 0.9, mask)


@settings(max_examples=40, deadline=None)
@given(views())
def test_any_shape_and_stride(case):
    check_view(NATIVE, case)


@pytest.mark.parametrize("backend", TRITON)
@settings(max_examples=6, deadline=None)
@given(views())
def test_any_shape_and_stride_in_triton(backend, case):
    check_view(backend, case)


def test_shifted_logits_are_not_copied():
    """A view of all but the last position costs no memory of its size."""
    logits = torch.zeros(2, 9, 64)[:, :-1]
    stats = _token_stats_fwd(logits, None, 1.0, None, None, False, "native")[2]
    row = native.extension.VocabRows
    seen = []
    native_rows = native.extension.vocab_backward

    class Spy:
        VocabRows = staticmethod(lambda **kw: seen.append(kw["logits"][0]) or row(**kw))
        vocab_backward = staticmethod(native_rows)

    real, native.extension = native.extension, Spy
    try:
        _token_stats_bwd(logits, None, 1.0, None, stats, None, torch.ones(2, 8), "native")
    finally:
        native.extension = real
    assert seen == [logits.data_ptr()]


@storage
@pytest.mark.parametrize(("rows", "vocab"), [(97, 3001), (40, 33_001), (5, 33_001), (1, 151_936)])
def test_threads_and_reruns_are_bitwise_equal(dtype, rows, vocab, two_threads):
    """Few long rows are shared out by columns, many by rows."""
    logits, targets = draw(rows, vocab, dtype)
    first = run(NATIVE, logits, targets, 0.8)
    for threads in (2, 1):
        torch.set_num_threads(threads)
        for a, b in zip(run(NATIVE, logits, targets, 0.8), first, strict=True):
            assert torch.equal(a, b)


@kernels
def test_a_row_does_not_depend_on_its_neighbours(backend):
    logits, targets = draw(9, 257, torch.float32)
    order = torch.randperm(9, generator=generator(9))
    up = torch.randn(9, generator=generator(10))

    def gradient(x, y, u):
        x = x.clone().requires_grad_()
        logprobs, entropy = stats_of(backend, x, y)
        return logprobs, entropy, torch.autograd.grad((logprobs * u + entropy).sum(), x)[0]

    for a, b in zip(
        gradient(logits, targets, up),
        gradient(logits[order], targets[order], up[order]),
        strict=True,
    ):
        assert torch.equal(a[order], b)
    for n in range(3):
        alone = gradient(logits[n : n + 1], targets[n : n + 1], up[n : n + 1])
        for a, b in zip(gradient(logits, targets, up), alone, strict=True):
            assert torch.equal(a[n : n + 1], b)


def test_a_row_of_many_is_the_row_alone():
    """40 rows are shared out by rows, one by columns."""
    logits, targets = draw(40, 33_001, torch.float32)
    up = torch.randn(40, generator=generator(10))
    _, entropy, stats = _token_stats_fwd(logits, targets, 0.9, None, None, False, "native")
    together = _token_stats_bwd(logits, targets, 0.9, None, stats, up, up, "native")
    for n in (0, 39):
        one = slice(n, n + 1)
        alone = _token_stats_fwd(logits[one], targets[one], 0.9, None, None, False, "native")
        assert torch.equal(alone[1], entropy[one])
        gradient = _token_stats_bwd(
            logits[one], targets[one], 0.9, None, alone[2], up[one], up[one], "native"
        )
        assert torch.equal(gradient, together[one])


def check_large_gradients():
    """Those of 32 MiB and more go past the caches, from the first aligned column of every row."""
    for dtype in STORAGE:
        logits, targets = draw(64, 16_385, dtype)
        up = torch.randn(2, 64, generator=generator(11))
        stats = _token_stats_fwd(logits, targets, 0.9, None, None, False, "native")[2]
        times = 2**25 // logits.nbytes + 1

        rows = torch.arange(64).repeat(times)
        small = _token_stats_bwd(logits, targets, 0.9, None, stats, *up, "native")
        large = _token_stats_bwd(
            *(logits[rows], targets[rows], 0.9, None, stats[rows], *up[:, rows], "native")
        )
        assert torch.equal(large, small[rows])


def test_large_gradients():
    check_large_gradients()


def test_new_and_old_memory_get_the_same_gradient():
    """Memory that the system has yet to hand out is fetched first, and not written past the caches;
    memory of which it has some pages is, in part."""
    logits, targets = draw(512, 16_385, torch.float32)
    stats = _token_stats_fwd(logits, targets, 0.9, None, None, False, "native")[2]
    upstream = torch.randn(2, 512, generator=generator(11))
    new, old, mixed = (torch.empty_like(logits) for _ in range(3))
    assert new.nbytes >= 32 << 20
    old.fill_(float("nan"))
    mixed[::2].fill_(float("nan"))
    for memory in (new, old, mixed):
        vocab.backward(Rows(logits, targets, 0.9), stats, *upstream, memory)
    assert new.isfinite().all()
    assert torch.equal(old, new)
    assert torch.equal(mixed, new)


# exp(x) is 0 from -125.5 ln 2 on.
VANISHED = np.float32(-86.98997)


def test_exp_over_the_whole_range():
    """At most 1.1 ulp with fused multiply-add, 1.4 without; 0 below -125.5 ln 2, NaN from NaN."""
    bits = [
        np.arange(0x80000000, int(VANISHED.view(np.uint32)), 1009, dtype=np.uint32),
        np.arange(0x80000000, 0x80001000, dtype=np.uint32),  # -0 and the smallest subnormals
        np.arange(0x807FF000, 0x80801000, dtype=np.uint32),  # around the smallest normal number
        VANISHED.view(np.uint32) - np.arange(1, 4096, dtype=np.uint32),
    ]
    # Where n changes, at odd multiples of ln 2 / 2, the argument of the polynomial is largest.
    odd = np.arange(1, 251, 2) * -np.log(2) / 2
    around = odd.astype(np.float32).view(np.uint32)[:, None] + np.arange(-8, 8)
    bits.append(around.astype(np.uint32).ravel())
    x = np.concatenate([np.concatenate(bits).view(np.float32), [np.float32(0)]])
    x = np.concatenate([x, np.linspace(VANISHED, 0, 400_003, dtype=np.float32)])
    x = x[x > VANISHED]
    out = np.empty_like(x)
    native.extension.vocab_exp(x.ctypes.data, out.ctypes.data, len(x))
    truth = np.exp(x.astype(np.longdouble))
    ulps = np.abs(out - truth) / np.spacing(truth.astype(np.float32))
    assert ulps.max() <= (1.4 if "scalar" in native.extension.build_info() else 1.1)
    assert (out[x == 0] == 1).all()

    rest = np.array([-86.990, -87.0, -87.5, -88.0, -104.0, -1e4, -3e38, -INF], np.float32)
    native.extension.vocab_exp(rest.ctypes.data, out.ctypes.data, len(rest))
    assert (out[: len(rest)] == 0).all()
    quiet = np.array([0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    native.extension.vocab_exp(quiet.ctypes.data, out.ctypes.data, len(quiet))
    assert np.isnan(out[: len(quiet)]).all()


def check_half_storage():
    """Every bf16 and fp16 value is read exactly, and gradients are rounded to the nearest even."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        every = every[every.isfinite()]
        pairs = torch.stack([every, torch.zeros_like(every)], 1)
        logprobs, entropy = logprobs_and_entropy(
            pairs, torch.ones(len(pairs), dtype=torch.long), backend="native"
        )
        truth = logprobs_and_entropy(pairs.double(), torch.ones(len(pairs), dtype=torch.long))
        rounding = torch.finfo(torch.float32).eps
        for kernel, exact in zip((logprobs, entropy), truth, strict=True):
            torch.testing.assert_close(kernel.double(), exact, rtol=2 * rounding, atol=rounding)
        # One certain token of two equal ones: the gradient of its log-probability is up / 2.
        up = torch.randint(-(2**31), 2**31, (100_000,), generator=generator()).int()
        up = up.view(torch.float32)
        up = torch.cat([up, every.float() * 2, every.float() * 2.002, torch.tensor([NAN])])
        up = up[~up.isinf()]
        logits = torch.zeros(len(up), 2, dtype=dtype)
        targets = torch.zeros(len(up), dtype=torch.long)
        stats = _token_stats_fwd(logits, targets, 1.0, None, None, False, "native")[2]
        dlogits = _token_stats_bwd(logits, targets, 1.0, None, stats, up, None, "native")
        torch.testing.assert_close(
            dlogits[:, 0], (up * 0.5).to(dtype), rtol=0, atol=0, equal_nan=True
        )


def test_half_storage():
    check_half_storage()


OPCHECK_LOGITS = torch.randn(3, 4, 17, generator=generator())


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    logits = OPCHECK_LOGITS.clone().requires_grad_()
    targets = torch.randint(0, 17, (3, 4), generator=generator())
    mask = torch.rand(3, 4, generator=generator()) < 0.5 if masked else None
    temperatures = torch.full((3, 4), 0.7) if masked else None
    full = (logits, targets, 1.0, temperatures, mask, False, "native")
    torch.library.opcheck(_token_stats_fwd, full)
    torch.library.opcheck(_token_stats_fwd, (logits, None, 0.5, None, mask, False, "native"))
    stats = _token_stats_fwd(*full)[2].detach()
    up = torch.randn(3, 4, generator=generator())
    rest = logits.detach(), targets, 1.0, temperatures, stats, up, None, "native"
    torch.library.opcheck(_token_stats_bwd, rest)
    torch.library.opcheck(_token_stats_bwd_, rest)


@kernels
def test_compiles_in_one_graph(backend):
    mask = torch.arange(6) % 3 > 0
    logits, targets, mask = backend.place(*draw(6, 100, torch.float32), mask)

    name = str(backend)

    def loss(x):
        logprobs, entropy = logprobs_and_entropy(x, targets, 0.8, mask, backend=name)
        return (logprobs * 2 + entropy + entropy_from_logits(x, backend=name)).sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = logits.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(x), x)[0])
    assert torch.equal(*grads)


def projected(seed=0):
    """(hidden, weight, targets) of 6 rows of 100 logits."""
    g = generator(seed)
    hidden = torch.randn(6, 8, generator=g).requires_grad_()
    weight = torch.randn(100, 8, generator=g).requires_grad_()
    return hidden, weight, torch.randint(0, 100, (6,), generator=g)


def inplace_loss(hidden, weight, targets, inplace):
    logits = hidden @ weight.t()
    logprobs, entropy = logprobs_and_entropy(
        logits, targets, 0.8, inplace_backward=inplace, backend="native"
    )
    return (2 * logprobs + entropy).sum()


@pytest.mark.parametrize("compiler", [None, "aot_eager", "inductor"])
def test_inplace_backward(compiler):
    hidden, weight, targets = projected()
    loss = inplace_loss
    if compiler:
        loss = torch.compile(loss, fullgraph=True, backend=compiler)
    grads = [
        torch.autograd.grad(one(hidden, weight, targets, inplace), (hidden, weight))
        for one, inplace in ((inplace_loss, False), (loss, True))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0 if compiler != "inductor" else 1e-5, atol=1e-6)


@storage
def test_inplace_backward_is_bitwise_the_other(dtype):
    logits, targets = draw(5, 33_001, dtype)
    want = run(NATIVE, logits, targets, 0.7)
    leaf = logits.requires_grad_()
    copy = leaf.clone()
    got = logprobs_and_entropy(copy, targets, 0.7, inplace_backward=True, backend="native")
    up = torch.randn(2, 5, generator=generator(), dtype=torch.float64).float()
    (dlogits,) = torch.autograd.grad(got, leaf, (up[0], up[1]))
    for a, b in zip((*got, dlogits, copy), (*want, want[2]), strict=True):
        assert torch.equal(a, b)


def test_inplace_backward_allocates_no_gradient():
    """Both passes over 8 MB of logits; the matrix product's own gradients are small."""
    hidden = torch.randn(64, 4, generator=generator()).requires_grad_()
    weight = torch.randn(32_768, 4, generator=generator())
    largest = {}
    for inplace in (False, True):
        logits = hidden @ weight.t()
        entropy = entropy_from_logits(logits, inplace_backward=inplace, backend="native").sum()
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            entropy.backward()
        largest[inplace] = max(event.cpu_memory_usage for event in profile.function_events)
    assert largest[False] >= logits.nbytes
    assert largest[True] < logits.nbytes // 8


def test_inplace_backward_destroys_the_logits():
    hidden, weight, _ = projected()
    modified = "has been modified by an inplace operation"

    def entropy(x):
        return entropy_from_logits(x, inplace_backward=True, backend="native").sum()

    logits = hidden @ weight.t()
    total = entropy(logits)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=modified):
        total.backward()

    logits = hidden @ weight.t()
    with pytest.raises(RuntimeError, match=modified):
        (logits.square().sum() + entropy(logits)).backward()

    logits = hidden @ weight.t()
    with pytest.raises(RuntimeError, match=modified):
        (entropy(logits) + entropy(logits)).backward()

    # The output of tanh is what its backward pass reads.
    with pytest.raises(RuntimeError, match=modified):
        entropy((hidden @ weight.t()).tanh()).backward()

    # A part of other memory: the rest of it stays.
    logits = hidden @ weight.t()
    before = logits.detach().clone()
    part = logits[2:4]
    entropy(part).backward()
    assert torch.equal(logits[:2], before[:2])
    assert torch.equal(logits[4:], before[4:])
    assert (part != before[2:4]).all()


def test_inplace_backward_errors():
    logits = torch.randn(2, 5, 7, requires_grad=True)
    with pytest.raises(
        ValueError,
        match="inplace_backward: expected logits that another op computed, got a leaf, whose "
        r"values would be lost; drop it, or pass logits.clone\(\)",
    ):
        entropy_from_logits(logits, inplace_backward=True)
    with pytest.raises(
        ValueError,
        match="inplace_backward: expected contiguous logits, got a view with strides "
        r"\[35, 7, 1\]; pass the logits of all positions with a mask, or drop it",
    ):
        entropy_from_logits(logits.clone()[:, :-1], inplace_backward=True)
    for backend, x in (("reference", logits.clone()), (None, logits.double())):
        with pytest.raises(
            ValueError,
            match="inplace_backward: expected False for the reference, whose backward pass is "
            "autograd's own, got True; drop it, or choose another backend",
        ):
            entropy_from_logits(x, inplace_backward=True, backend=backend)
    assert entropy_from_logits(logits.detach(), inplace_backward=True).shape == (2, 5)


LOGITS = torch.zeros(2, 3, 5)
TARGETS = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize("backend", [REFERENCE, NATIVE])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"logits": LOGITS.long()},
            TypeError,
            r"logits: expected float32, bfloat16, float16 or float64, got torch.int64; "
            r"pass logits.float\(\)",
        ),
        (
            {"logits": LOGITS[..., :0]},
            ValueError,
            r"logits: expected shape \[..., vocabulary\], got \[2, 3, 0\]; "
            "pass one row of at least one logit per token",
        ),
        (
            {"targets": TARGETS[:, 1:]},
            ValueError,
            r"targets: expected shape \[2, 3\] like logits\[..., 0\], got \[2, 2\]; ",
        ),
        (
            {"targets": TARGETS.float()},
            TypeError,
            r"targets: expected integer token ids, got torch.float32; pass targets.long\(\)",
        ),
        (
            {"targets": TARGETS + torch.tensor([0, 0, 5])},
            ValueError,
            r"targets: expected token ids in \[0, 5\) or -100, got 5 at \[0, 2\]; "
            "logits and targets must share one tokenizer",
        ),
        ({"targets": TARGETS - 1}, ValueError, r"targets: expected .* got -1 at \[0, 0\]; "),
        (
            {"mask": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            r"mask: expected shape \[2, 3\] like logits\[..., 0\], got \[2, 4\]; ",
        ),
        (
            {"mask": torch.ones(2, 3)},
            TypeError,
            r"mask: expected bool, got torch.float32; pass mask.bool\(\)",
        ),
        (
            {"temperature": 0.0},
            ValueError,
            "temperature: expected a positive finite number, got 0.0; "
            "1.0 leaves the logits as they are",
        ),
        ({"temperature": NAN}, ValueError, "temperature: expected a positive .* got nan; "),
        ({"temperature": INF}, ValueError, "temperature: expected a positive .* got inf; "),
        (
            {"temperature": torch.tensor([[1.0, 1.0, -2.0]] * 2)},
            ValueError,
            r"temperature: expected a positive finite number, got -2.0 at \[0, 2\]; ",
        ),
        (
            {"temperature": torch.ones(3)},
            ValueError,
            r"temperature: expected shape \[2, 3\] like logits\[..., 0\], got \[3\]; ",
        ),
        (
            {"temperature": torch.ones(2, 3, dtype=torch.long)},
            TypeError,
            "temperature: expected float32, ",
        ),
    ],
)
def test_errors(backend, change, error, message):
    arguments = {"logits": LOGITS, "targets": TARGETS, "mask": None, "temperature": 1.0}
    with pytest.raises(error, match=message):
        logprobs_and_entropy(**{**arguments, **change}, backend=backend)


def test_native_has_no_float64():
    with pytest.raises(BackendError, match="its native implementation has no float64"):
        entropy_from_logits(LOGITS.double(), backend="native")
    assert entropy_from_logits(LOGITS.double()).dtype == torch.float64
