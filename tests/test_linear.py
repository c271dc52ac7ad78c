import pytest
import torch
from backends import NATIVE, REFERENCE, TRITON, Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import multiplications, peak_bytes
from tolerance import assert_close, farthest

from segkernels import linear_logprobs_and_entropy, logprobs_and_entropy
from segkernels.backend import BackendError
from segkernels.linear import linear_bwd, linear_fwd
from segkernels.projection import WORKSPACE, HiddenRows, Space

BACKENDS = (REFERENCE, NATIVE)
DRIVERS = (NATIVE, Backend("triton"))  # with gpu_driver: the way of CPUs, the way of GPUs
STORAGE = (torch.float32, torch.bfloat16, torch.float16)
WHERE = (WORKSPACE["native"], "native")
NAN = float("nan")

backends = pytest.mark.parametrize("backend", BACKENDS)
drivers = pytest.mark.parametrize("backend", DRIVERS)
keeping = pytest.mark.parametrize("keep_logits", [False, True])
storage = pytest.mark.parametrize("dtype", STORAGE, ids=str)


@pytest.fixture
def small_buffers(monkeypatch):
    """Many token blocks and vocabulary slices, none of which divides its range."""
    for backend in WORKSPACE:
        monkeypatch.setitem(WORKSPACE, backend, 16 * 4 * 49)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(shape, vocab, size, dtype, seed=0):
    """hidden, weight, bias, targets."""
    g = generator(seed)
    hidden = torch.randn(*shape, size, generator=g).to(dtype)
    weight = torch.randn(vocab, size, generator=g).to(dtype) * (2 / size**0.5)
    bias = torch.randn(vocab, generator=g).to(dtype)
    return hidden, weight, bias, torch.randint(0, vocab, shape, generator=g)


def run(backend, hidden, weight, bias, targets, temperature=1.0, mask=None, seed=0):
    """(logprobs, entropy, dhidden, dweight, dbias) with random upstream gradients."""
    inputs = [t.detach().requires_grad_() for t in backend.place(hidden, weight, bias)]
    targets, temperature, mask = backend.place(targets, temperature, mask)
    logprobs, entropy = linear_logprobs_and_entropy(
        inputs[0], inputs[1], targets, inputs[2], temperature, mask, backend=backend
    )
    up = torch.randn(2, *entropy.shape, generator=generator(seed), dtype=torch.float64)
    up = up.to(entropy)
    grads = torch.autograd.grad((logprobs, entropy), inputs, (up[0], up[1]))
    return tuple(x.detach().cpu() for x in (logprobs, entropy, *grads))


def check_close(kernel, baseline, truth, inputs, what=""):
    names = ("logprobs", "entropy", "dhidden", "dweight", "dbias")
    for name, like, k, b, t in zip(
        names, (None, None, *inputs), kernel, baseline, truth, strict=True
    ):
        assert k.dtype == (torch.float32 if like is None else like.dtype)
        assert_close(k, b, t, f"{what} {name}")


def check_against_reference(hidden, weight, bias, targets, temperature=1.0, mask=None, what=""):
    inputs = (hidden, weight, bias)
    double = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    kernel = run(NATIVE, *inputs, targets, temperature, mask)
    baseline = run(REFERENCE, *inputs, targets, temperature, mask)
    truth = run(REFERENCE, *(t.double() for t in inputs), targets, double, mask)
    check_close(kernel, baseline, truth, inputs, what)


@backends
def test_by_hand(backend):
    """Two tokens of a vocabulary of two: z = (h, 0), so p = sigmoid(h)."""
    hidden = torch.tensor([[0.0], [2.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]])
    logprobs, entropy = linear_logprobs_and_entropy(
        hidden, weight, torch.tensor([0, 1]), backend=backend
    )
    p = torch.tensor([0.5, 0.8807970779778823])
    torch.testing.assert_close(logprobs, torch.stack([p[0], 1 - p[1]]).log())
    torch.testing.assert_close(entropy, -(p * p.log() + (1 - p) * (1 - p).log()))
    (grad,) = torch.autograd.grad(logprobs.sum(), hidden)
    torch.testing.assert_close(grad[:, 0], torch.tensor([0.5, -0.8807970779778823]))


@storage
@pytest.mark.parametrize("shape", [(5,), (3, 17), (1, 1)])
@pytest.mark.parametrize("vocab", [1, 3, 33, 1000])
def test_native_equals_reference(dtype, shape, vocab):
    arguments = draw(shape, vocab, 16, dtype)
    mask = torch.rand(shape, generator=generator(1)) < 0.7
    temperatures = torch.rand(shape, generator=generator(2)) + 0.5
    check_against_reference(*arguments, what=f"{dtype}")
    check_against_reference(*arguments, temperatures, mask, what=f"{dtype} masked")


@storage
def test_many_tiles(dtype, small_buffers):
    arguments = draw((4, 11), 100, 16, dtype)
    mask = torch.rand(4, 11, generator=generator(1)) < 0.7
    check_against_reference(*arguments, 0.7, what="tiles")
    check_against_reference(*arguments, 0.7, mask, what="tiles masked")


def through_logits(hidden, weight, bias, targets, temperature, mask, seed=0):
    """What ``run`` gives, from logits that a model computes in its own dtype."""
    inputs = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    logits = torch.nn.functional.linear(*inputs)
    logprobs, entropy = logprobs_and_entropy(
        logits, targets, temperature, mask, backend="reference"
    )
    up = torch.randn(2, *entropy.shape, generator=generator(seed), dtype=torch.float64).float()
    grads = torch.autograd.grad((logprobs, entropy), inputs, (up[0], up[1]))
    return logprobs.detach(), entropy.detach(), *grads


@storage
@pytest.mark.parametrize("workspace", [16 * 2 * 60, None])
@pytest.mark.parametrize("backend", TRITON)
def test_triton_equals_the_form_from_logits(backend, dtype, workspace, monkeypatch):
    """Held to the model's own rounding of logits and of their gradient."""
    monkeypatch.setitem(WORKSPACE, "triton", workspace or WORKSPACE["triton"])
    *inputs, targets = draw((3, 7), 75, 16, dtype)
    mask = torch.rand(3, 7, generator=generator(1)) < 0.7
    kernel = run(backend, *inputs, targets, 0.7, mask)
    baseline = through_logits(*inputs, targets, 0.7, mask)
    truth = run(REFERENCE, *(t.double() for t in inputs), targets, 0.7, mask)
    check_close(kernel, baseline, truth, inputs)


def baseline_of(backend, hidden, weight, bias, targets, temperature=1.0, mask=None):
    """The reference, or for the way of GPUs the form from logits of the dtype of hidden."""
    if backend != "triton":
        return run(REFERENCE, hidden, weight, bias, targets, temperature, mask)
    return through_logits(hidden.nan_to_num(), weight, bias, targets, temperature, mask)


@storage
@drivers
def test_no_host_synchronisation(backend, dtype, gpu_driver, capturing, small_buffers):
    """Rows that cannot be left out are passed over: whatever stands there shows nowhere."""
    hidden, weight, bias, targets = draw((6, 9), 40, 16, dtype)
    mask = torch.rand(6, 9, generator=generator(2)) < 0.6
    poisoned = hidden.masked_fill(~mask[..., None], NAN)
    rest = (weight, bias, targets.masked_fill(~mask, 10**12), 0.8, mask)
    truth = run(REFERENCE, poisoned.double(), *(t.double() for t in rest[:2]), *rest[2:])
    baseline = baseline_of(backend, poisoned, *rest)
    for x in (poisoned, torch.cat([poisoned, poisoned[:, :1]], 1)[:, :-1]):
        got = run(backend, x, *rest)
        check_close(got, baseline, truth, (hidden, weight, bias))
        assert (got[2][~mask] == 0).all()


@storage
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("workspace", [None, 20_000])
@pytest.mark.parametrize("backend", [Backend("triton"), *TRITON[1:]])
def test_vocabularies_that_no_vector_divides(backend, workspace, masked, dtype, gpu_driver):
    """Rows of logits are apart by more than the vocabulary: kept, in one tile, and in slices."""
    *inputs, targets = draw((40,), 331, 16, dtype)
    mask = torch.rand(40, generator=generator(1)) < 0.7 if masked else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORKSPACE, "triton", workspace or WORKSPACE["triton"])
        kernel = run(backend, *inputs, targets, 0.7, mask)
    baseline = through_logits(*inputs, targets, 0.7, mask)
    truth = run(REFERENCE, *(t.double() for t in inputs), targets, 0.7, mask)
    check_close(kernel, baseline, truth, inputs)


@pytest.mark.parametrize(
    ("tokens", "size", "vocab", "columns", "chunk"),
    [
        (8192, 4096, 131_072, 16_896, 1024),
        (8192, 4096, 128_256, 16_896, 1024),
        (8192, 8192, 131_072, 16_896, 1024),
        (300, 4096, 131_072, 131_072, 300),
        (8192, 1024, 32_001, 16_896, 4224),
    ],
)
def test_tiles_fill_the_processors_of_a_gpu(tokens, size, vocab, columns, chunk):
    """Of an H100: 132 blocks of a product are computed at once, which the numbers nearly divide."""
    hidden = torch.empty(tokens, size, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(vocab, size, dtype=torch.bfloat16, device="meta")
    space = Space.of("triton", None, hidden)
    rows = HiddenRows(hidden, None, torch.bfloat16)
    height = space.height(rows)
    assert (height, space.columns(height, rows, weight)) == (tokens, columns)
    row = 2 * space.row_stride(vocab) + 12 * size
    assert space.chunk(tokens, 0, (512 << 20) * 7 // 8 // row, size) == chunk


@st.composite
def problems(draw_from):
    shape = draw_from(st.sampled_from([(), (0,), (1,), (33,), (2, 7), (0, 3), (2, 3, 4)]))
    vocab = draw_from(st.sampled_from([1, 2, 31, 70]))
    dtype = draw_from(st.sampled_from(STORAGE))
    seed = draw_from(st.integers(0, 1000))
    hidden, weight, bias, targets = draw(shape, vocab, 8, dtype, seed)
    if len(shape) >= 2 and draw_from(st.booleans()):
        wide = torch.cat([hidden, torch.full_like(hidden[:, :1], NAN)], 1)
        hidden = wide[:, :-1]
    keep = draw_from(st.sampled_from([0.0, 0.6, 1.0]))
    mask = torch.rand(shape, generator=generator(seed)) < keep
    ignored = torch.rand(shape, generator=generator(seed + 1)) < 0.2
    return hidden, weight, bias, targets.masked_fill(ignored, -100), mask


def other_orders(weight, count=4):
    """The weight with each entry one fp32 rounding up or down: what another order of summation
    does to the logits, and a lucky baseline of one token does not show."""
    signs = torch.randint(0, 2, (count, *weight.shape), generator=generator()) * 2 - 1
    return weight.double() * (1 + torch.finfo(torch.float32).eps * signs)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_any_shape(problem):
    hidden, weight, bias, targets, mask = problem
    wide = (hidden.double(), bias.double(), targets)
    truth, *moved = (
        run(REFERENCE, wide[0], w, *wide[1:], 0.9, mask)
        for w in (weight.double(), *other_orders(weight))
    )
    baseline = run(REFERENCE, hidden, weight, bias, targets, 0.9, mask)
    kernel = run(NATIVE, hidden, weight, bias, targets, 0.9, mask)
    worst = [farthest(each, t) for *each, t in zip(baseline, *moved, truth, strict=True)]
    check_close(kernel, worst, truth, (hidden, weight, bias))


@backends
def test_equals_the_form_from_logits(backend):
    hidden, weight, bias, targets = draw((6, 5), 50, 12, torch.float32)
    logprobs, entropy = linear_logprobs_and_entropy(hidden, weight, targets, bias, backend=backend)
    plain = logprobs_and_entropy(hidden @ weight.T + bias, targets, backend=backend)
    torch.testing.assert_close(logprobs, plain[0])
    torch.testing.assert_close(entropy, plain[1])


@backends
def test_without_targets_and_bias(backend):
    hidden, weight, _, targets = draw((7,), 40, 12, torch.float32)
    nothing, entropy = linear_logprobs_and_entropy(hidden, weight, backend=backend)
    assert nothing is None
    both = linear_logprobs_and_entropy(hidden, weight, targets, backend=backend)
    assert torch.equal(entropy, both[1])


@backends
@storage
def test_masked_rows_are_transparent(backend, dtype, small_buffers):
    hidden, weight, bias, targets = draw((6, 9), 40, 16, dtype)
    mask = torch.rand(6, 9, generator=generator(2)) < 0.6
    temperatures = torch.rand(6, 9, generator=generator(3)) + 0.5
    poisoned = (
        hidden.masked_fill(~mask[..., None], NAN),
        weight,
        bias,
        targets.masked_fill(~mask, 10**12),
        temperatures.masked_fill(~mask, NAN),
        mask,
    )
    logprobs, entropy, dhidden, dweight, dbias = run(backend, *poisoned)
    for values in (logprobs, entropy, dhidden):
        assert (values[~mask] == 0).all()
    up = torch.randn(2, 6, 9, generator=generator(), dtype=torch.float64)[:, mask]

    def alone(*inputs):
        """The same from the rows in the mask alone, by the reference."""
        inputs = [t.clone().requires_grad_() for t in inputs]
        kept = (targets[mask], inputs[2], temperatures[mask].to(inputs[0].dtype))
        stats = linear_logprobs_and_entropy(*inputs[:2], *kept, backend="reference")
        grads = torch.autograd.grad(stats, inputs, tuple(up.to(stats[0])))
        return *(x.detach() for x in stats), *grads

    inputs = (hidden[mask], weight, bias)
    same = (logprobs[mask], entropy[mask], dhidden[mask], dweight, dbias)
    check_close(same, alone(*inputs), alone(*(t.double() for t in inputs)), inputs)
    nothing = run(backend, *poisoned[:-1], torch.zeros_like(mask))
    assert all((values == 0).all() for values in nothing)


@keeping
def test_rows_without_upstream_gradient_take_no_part(keep_logits):
    """Their hidden states are destroyed between the passes; every gradient stays a number."""
    hidden, weight, bias, targets = draw((8,), 30, 16, torch.float32)
    targets[0] = -100
    _, entropy, *saved = linear_fwd(
        hidden, weight, targets, bias, 1.0, None, None, keep_logits, *WHERE
    )
    up = torch.zeros_like(entropy)
    up[[0, 3]] = 2.0
    expected = linear_bwd(
        hidden, weight, targets, bias, 1.0, None, *saved, up, None, [True] * 3, *WHERE
    )
    hidden[torch.arange(8) != 3] = NAN
    got = linear_bwd(hidden, weight, targets, bias, 1.0, None, *saved, up, None, [True] * 3, *WHERE)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert (got[0][torch.arange(8) != 3] == 0).all()
    assert (got[0][3] != 0).all()


@backends
@storage
@pytest.mark.parametrize("needs", ["hidden", "weight", "bias"])
def test_partial_gradients(backend, dtype, needs):
    inputs = dict(
        zip(("hidden", "weight", "bias", "targets"), draw((9,), 33, 8, dtype), strict=True)
    )
    inputs[needs].requires_grad_()
    logprobs, entropy = linear_logprobs_and_entropy(**inputs, backend=backend)
    (logprobs.sum() - entropy.sum()).backward()
    for name in ("hidden", "weight", "bias"):
        assert (inputs[name].grad is not None) == (name == needs)
    everything = [inputs[n].detach().requires_grad_() for n in ("hidden", "weight", "bias")]
    logprobs, entropy = linear_logprobs_and_entropy(
        everything[0], everything[1], inputs["targets"], everything[2], backend=backend
    )
    (logprobs.sum() - entropy.sum()).backward()
    position = ("hidden", "weight", "bias").index(needs)
    assert torch.equal(inputs[needs].grad, everything[position].grad)


@drivers
@storage
@pytest.mark.parametrize("masked", [False, True])
def test_kept_logits_give_the_same_gradients(backend, dtype, masked, gpu_driver):
    """As those computed again do, and once more after the first backward pass."""
    hidden, weight, bias, targets = draw((4, 10), 50, 8, dtype)
    mask = torch.rand(4, 10, generator=generator()) < 0.7 if masked else None
    up = torch.randn(4, 10, generator=generator())
    up[1] = 0
    size = 40 * 50 * (4 if backend == NATIVE else dtype.itemsize)

    def gradients(backend, *inputs, workspace=None):
        inputs = [t.clone().requires_grad_() for t in inputs]
        logprobs, _ = linear_logprobs_and_entropy(
            *inputs[:2], targets, inputs[2], 0.7, mask, workspace=workspace, backend=backend
        )
        return [
            torch.autograd.grad(logprobs, inputs, up.to(logprobs), retain_graph=True)
            for _ in range(2)
        ]

    inputs = (hidden, weight, bias)
    truth = gradients(REFERENCE, *(t.double() for t in inputs))[0]
    baseline = gradients(REFERENCE, *inputs)[0]
    if backend == "triton":
        leaves = [t.clone().requires_grad_() for t in inputs]
        logits = torch.nn.functional.linear(*leaves)
        logprobs, _ = logprobs_and_entropy(logits, targets, 0.7, mask, backend="reference")
        baseline = torch.autograd.grad(logprobs, leaves, up)
    for workspace in (2 * size, 2 * size - 1):
        for got in gradients(backend, *inputs, workspace=workspace):
            for name, *each in zip(
                ("dhidden", "dweight", "dbias"), got, baseline, truth, strict=True
            ):
                assert_close(*each, name)


def test_kept_logits_depend_on_the_shape_in_one_graph():
    """Few tokens keep their logits, many do not; a compiled function takes both."""
    weight = draw((), 50, 8, torch.float32)[1].requires_grad_()

    def loss(hidden):
        _, entropy = linear_logprobs_and_entropy(
            hidden, weight, workspace=2 * 20 * 50 * 4, backend="native"
        )
        return entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (10, 20, 21, 30):
        hidden = draw((tokens,), 50, 8, torch.float32)[0].requires_grad_()
        plain, traced = (torch.autograd.grad(f(hidden), (hidden, weight)) for f in (loss, compiled))
        for a, b in zip(traced, plain, strict=True):
            torch.testing.assert_close(a, b)


@backends
def test_mixed_dtypes(backend):
    hidden, weight, bias, targets = draw((9,), 33, 8, torch.float32)
    half = hidden.bfloat16()
    got = run(backend, half, weight, bias.half(), targets)
    assert [t.dtype for t in got[2:]] == [torch.bfloat16, torch.float32, torch.float16]
    expected = run(backend, half.float(), weight, bias.half().float(), targets)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype))


@backends
def test_banned_tokens_and_rows_without_a_distribution(backend):
    hidden, weight, bias, targets = draw((4,), 20, 8, torch.float32)
    bias[3] = bias[11] = -torch.inf
    targets[:] = 5
    logprobs, entropy, dhidden, dweight, dbias = run(backend, hidden, weight, bias, targets)
    assert all(t.isfinite().all() for t in (logprobs, entropy, dhidden, dweight, dbias))
    assert (dweight[[3, 11]] == 0).all()
    assert (dbias[[3, 11]] == 0).all()
    hidden[2, 0] = NAN
    logprobs, entropy, dhidden, *_ = run(backend, hidden, weight, bias, targets)
    for values in (logprobs, entropy, dhidden[:, 0]):
        assert values.isnan().tolist() == [False, False, True, False]


def test_gradcheck_of_the_reference():
    hidden, weight, bias, targets = draw((2, 2), 5, 3, torch.float64)
    targets[0, 1] = -100
    mask = torch.tensor([[True, True], [False, True]])
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]

    def stats(h, w, b):
        return linear_logprobs_and_entropy(h, w, targets, b, 0.8, mask)

    assert torch.autograd.gradcheck(stats, inputs)


@storage
def test_threads_and_reruns_are_bitwise_equal(dtype, two_threads):
    arguments = draw((60,), 700, 16, dtype)
    first = run(NATIVE, *arguments)
    for a, b in zip(run(NATIVE, *arguments), first, strict=True):
        assert torch.equal(a, b)


def test_bf16_autocast_changes_nothing():
    arguments = draw((9,), 40, 16, torch.float32)
    plain = run(NATIVE, *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(NATIVE, *arguments)
    for a, b in zip(plain, inside, strict=True):
        assert torch.equal(a, b)


@keeping
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked, keep_logits):
    hidden, weight, bias, targets = draw((3, 4), 17, 8, torch.float32)
    mask = torch.rand(3, 4, generator=generator()) < 0.5 if masked else None
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    how = (0.7, None, mask, keep_logits, *WHERE)
    torch.library.opcheck(linear_fwd, (inputs[0], inputs[1], targets, inputs[2], *how))
    torch.library.opcheck(linear_fwd, (inputs[0], inputs[1], None, None, *how))
    detached = [t.detach() for t in inputs]
    saved = linear_fwd(detached[0], detached[1], targets, detached[2], *how)[2:]
    up = torch.randn(3, 4, generator=generator())
    for needs in ([True, True, True], [False, True, False]):
        torch.library.opcheck(
            linear_bwd,
            (
                detached[0],
                detached[1],
                targets,
                detached[2],
                0.7,
                None,
                *saved,
                up,
                None,
                needs,
                *WHERE,
            ),
        )


def test_compiles_in_one_graph():
    hidden, weight, bias, targets = draw((6,), 100, 8, torch.float32)
    mask = torch.arange(6) % 3 > 0

    def loss(h, w, b):
        logprobs, entropy = linear_logprobs_and_entropy(
            h, w, targets, b, 0.8, mask, backend="native"
        )
        return (logprobs * 2 + entropy).sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
        grads.append(torch.autograd.grad(function(*inputs), inputs))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("backend", "workspace", "tokens", "size", "vocab"),
    [
        ("native", None, 1500, 64, 40_000),
        ("native", None, 600, 4096, 2000),
        ("native", None, 200, 64, 40_000),
        ("native", 8 << 20, 400, 64, 12_000),
        ("triton", 8 << 20, 400, 64, 12_000),
        ("triton", 8 << 20, 200, 2048, 1000),
        ("triton", 8 << 20, 100, 64, 10_000),
    ],
)
def test_extra_memory_is_bounded(backend, workspace, tokens, size, vocab, dtype, gpu_driver):
    """Forward and backward stay within the workspace, the gradients apart; 1,500 rows of 40,000
    logits would have 240 MB. (What Triton computes with is float32 here: torch converts
    half-precision operands on CPUs, and not on GPUs.)"""
    hidden, weight, _, targets = draw((tokens,), vocab, size, dtype)
    hidden = hidden.float() if backend == "triton" else hidden
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    mask = torch.rand(tokens, generator=generator()) < 0.9

    def both_passes():
        logprobs, entropy = linear_logprobs_and_entropy(
            *inputs, targets, mask=mask, workspace=workspace, backend=backend
        )
        return torch.autograd.grad((logprobs - entropy).sum(), inputs)

    peak, grads = peak_bytes(both_passes)
    gradients = sum(g.nbytes for g in grads)
    if hidden.dtype != torch.float32:
        gradients += 4 * hidden.numel()  # the sum of half-precision dhidden
    assert gradients < peak < gradients + (workspace or WORKSPACE[backend])


GPU = pytest.mark.parametrize("backend", TRITON[1:])


@GPU
def test_memory_on_a_gpu(backend):
    *inputs, targets = backend.place(*draw((3000,), 100_000, 512, torch.bfloat16))
    inputs = [t.requires_grad_() for t in inputs]

    def both_passes():
        logprobs, entropy = linear_logprobs_and_entropy(
            inputs[0], inputs[1], targets, inputs[2], workspace=64 << 20, backend=backend
        )
        return torch.autograd.grad((logprobs - entropy).sum(), inputs)

    both_passes()  # the products' own workspace is allocated once
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = both_passes()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = sum(g.nbytes for g in grads) + 4 * inputs[0].numel()
    assert gradients < peak < gradients + (64 << 20)


@GPU
def test_without_a_mask_the_host_never_waits_forward(backend):
    hidden, weight, bias, targets = backend.place(*draw((40,), 500, 64, torch.bfloat16))
    linear_logprobs_and_entropy(hidden, weight, targets, bias, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_logprobs_and_entropy(hidden, weight, targets, bias, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@GPU
def test_cuda_graph(backend):
    hidden, weight, bias, targets = draw((40,), 500, 64, torch.bfloat16)
    mask = torch.arange(40) % 3 > 0
    given = (hidden, weight, bias)
    baseline = through_logits(*given, targets, 0.8, mask)
    truth = run(REFERENCE, *(t.double() for t in given), targets, 0.8, mask)
    inputs = [t.requires_grad_() for t in backend.place(hidden * 0, weight, bias)]
    targets, mask = backend.place(targets, mask)
    up = torch.randn(2, 40, generator=generator(), dtype=torch.float64).float().cuda()

    def both_passes():
        stats = linear_logprobs_and_entropy(
            inputs[0], inputs[1], targets, inputs[2], 0.8, mask, backend=backend
        )
        return *stats, *torch.autograd.grad(stats, inputs, (up[0], up[1]))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both_passes()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both_passes()
    with torch.no_grad():
        inputs[0].copy_(hidden)
    graph.replay()
    check_close([x.detach().cpu() for x in got], baseline, truth, given)


@pytest.mark.parametrize(
    ("workspace", "products"),
    [(2 * 40 * 50 * 4, 2), (2 * 40 * 50 * 4 - 1, 3)],
    ids=["kept", "computed again"],
)
def test_masked_rows_and_rows_without_gradient_cost_no_product(workspace, products):
    """Two products in the backward pass, and the logits again where they do not fit."""
    hidden, weight, bias, targets = draw((40,), 50, 8, torch.float32)
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    mask = torch.arange(40) % 4 > 0  # 30 rows
    up = (torch.arange(40) % 5 == 0).float()  # 6 of them
    product = 50 * 8

    def forward():
        return linear_logprobs_and_entropy(
            *inputs[:2], targets, bias, mask=mask, workspace=workspace
        )

    cost, (logprobs, _) = multiplications(forward)
    assert cost == 30 * product
    cost, _ = multiplications(lambda: torch.autograd.grad(logprobs, inputs, up))
    assert cost == products * 6 * product


HIDDEN, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(5, 4)
TARGETS = torch.zeros(2, 3, dtype=torch.long)


@backends
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": HIDDEN.long()}, TypeError, "hidden: expected float32, .* got torch.int64"),
        ({"weight": WEIGHT.int()}, TypeError, "weight: expected float32, .* got torch.int32"),
        (
            {"hidden": HIDDEN[..., :0]},
            ValueError,
            r"hidden: expected shape \[..., hidden size\], got \[2, 3, 0\]; "
            "pass the last hidden state of every token",
        ),
        (
            {"weight": WEIGHT.T},
            ValueError,
            r"weight: expected shape \[vocabulary, 4\] to fit hidden, got \[4, 5\]; "
            "pass lm_head.weight",
        ),
        (
            {"weight": WEIGHT.to("meta")},
            ValueError,
            r"weight: expected device cpu like hidden, got meta; move it with .to\(hidden.device\)",
        ),
        (
            {"bias": torch.zeros(4)},
            ValueError,
            r"bias: expected shape \[5\] to fit weight, got \[4\]; pass lm_head.bias, or None",
        ),
        (
            {"bias": torch.zeros(5, device="meta")},
            ValueError,
            "bias: expected device cpu like hidden, got meta; ",
        ),
        (
            {"targets": TARGETS[:, 1:]},
            ValueError,
            r"targets: expected shape \[2, 3\] like hidden\[..., 0\], got \[2, 2\]; ",
        ),
        (
            {"targets": TARGETS + 5},
            ValueError,
            r"targets: expected token ids in \[0, 5\) or -100, got 5 at \[0, 0\]; ",
        ),
        ({"temperature": -1.0}, ValueError, "temperature: expected a positive finite number"),
        ({"workspace": 0}, ValueError, "workspace: expected a positive number of bytes, got 0; "),
        (
            {"mask": torch.ones(3, dtype=torch.bool)},
            ValueError,
            r"mask: expected shape \[2, 3\] like hidden\[..., 0\], got \[3\]; ",
        ),
    ],
)
def test_errors(backend, change, error, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS}
    with pytest.raises(error, match=message):
        linear_logprobs_and_entropy(**{**arguments, **change}, backend=backend)


def test_native_has_no_float64():
    with pytest.raises(BackendError, match="its native implementation has no float64"):
        linear_logprobs_and_entropy(HIDDEN, WEIGHT.double(), backend="native")
