"""The four kernels of ``segkernels.vocab`` called directly, as the ops over slices call them."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backends import NATIVE, REFERENCE, TRITON
from test_token_stats import STORAGE, draw, generator, run
from tolerance import assert_close

from segkernels import vocab
from segkernels.backend import BackendError, choose, explain, row_kernels

INF = float("inf")
kernels_of = pytest.mark.parametrize("backend", [NATIVE, *TRITON])
in_triton = pytest.mark.parametrize("backend", TRITON)


def outputs(logits):
    rows = logits.shape[0]
    names = {"device": logits.device, "dtype": torch.float32}
    return [torch.full(shape, 7.0, **names) for shape in ((rows,), (rows,), (rows, 3))]


def whole(backend, logits, targets, temperature=1.0, temperatures=None, mask=None):
    """logprobs, entropy, stats of forward."""
    logits, targets, temperatures, mask = backend.place(logits, targets, temperatures, mask)
    out = outputs(logits)
    rows = vocab.Rows(logits, targets, temperature, temperatures)
    row_kernels(backend).forward(rows, mask, *out)
    return [x.cpu() for x in out]


def gradient(backend, logits, targets, stats, up, **how):
    """dlogits of whole rows, or of the slice that begins with column ``first``."""
    logits, targets, stats, *up = backend.place(logits.clone(), targets, stats, *up)
    dlogits = logits if how.pop("in_place", False) else torch.empty_like(logits)
    rows = vocab.Rows(logits, targets, 1.0, **how)
    row_kernels(backend).backward(rows, stats, *up, dlogits)
    return dlogits.cpu()


def sliced(backend, logits, targets, widths, temperatures, mask):
    """The same as ``whole``, one slice of columns after another."""
    logits, targets, temperatures, mask = backend.place(logits, targets, temperatures, mask)
    kernels = row_kernels(backend)
    states = torch.full((logits.shape[0], 4), float("nan"), dtype=torch.float64)
    states = states.to(logits.device)
    first = 0
    for width in widths:
        # Slices are computed one at a time, so each is memory of its own.
        part = logits[:, first : first + width].contiguous()
        rows = vocab.Rows(part, targets, 1.0, temperatures, first)
        kernels.accumulate(rows, mask, states)
        first += width
    assert first == logits.shape[1]
    out = outputs(logits)
    kernels.finish(rows, mask, states, *out)
    return [x.cpu() for x in out]


@kernels_of
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_slices_give_what_whole_rows_give(backend, dtype):
    """Also where the maximum, the target or every finite logit lies in one slice."""
    logits, targets = draw(6, 2500, dtype)
    logits[0, 2400], logits[1, 3], logits[2, :1100] = 60.0, 60.0, -INF
    logits[3, 1024:] = -INF
    logits[4, 2499] = float("nan")
    targets[0], targets[1], targets[5] = 5, 2499, -100
    temperatures = torch.rand(6, generator=generator(3)) + 0.5
    mask = torch.tensor([True] * 5 + [False])
    got = sliced(backend, logits, targets, (1, 1023, 1025, 451), temperatures, mask)
    expected = whole(NATIVE, logits, targets, 1.0, temperatures, mask)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=1e-6, equal_nan=True)


@kernels_of
@pytest.mark.parametrize("in_place", [False, True])
def test_gradient_of_slices(backend, in_place):
    """Bitwise that of the whole rows, also into the logits' own memory."""
    logits, targets = draw(4, 2500, torch.float32)
    targets[:] = torch.tensor([0, 1023, 1024, 2499])
    stats = whole(NATIVE, logits, targets)[2]
    up = torch.randn(2, 4, generator=generator(1))
    expected = gradient(backend, logits, targets, stats, up)
    first = 0
    for width in (1, 1023, 1025, 451):
        part = logits[:, first : first + width].contiguous()
        got = gradient(backend, part, targets, stats, up, first=first, in_place=in_place)
        assert torch.equal(got, expected[:, first : first + width])
        first += width


@in_triton
def test_rows_of_several_spans(backend):
    """A span is a program: maxima, targets and -inf in each, and a row of one program beside."""
    logits, targets = draw(3, 70_001, torch.bfloat16)
    logits[0, 69_999], targets[0] = 40.0, 1
    logits[1, :40_000], targets[1] = -INF, 70_000
    logits[2, 40_000:], targets[2] = -INF, 39_999
    truth = run(REFERENCE, logits.double(), targets)
    baseline = run(REFERENCE, logits, targets)
    for name, k, b, t in zip(
        ("logprobs", "entropy", "dlogits"),
        run(backend, logits, targets),
        baseline,
        truth,
        strict=True,
    ):
        assert_close(k, b, t, name)


def placements(x):
    """The same columns in rows that are contiguous, that all begin on 16 bytes, that none does."""
    rows, columns = x.shape
    padded = torch.full((rows, -(-columns // 64) * 64), 7.0, dtype=x.dtype)[:, :columns]
    shifted = torch.full((rows, columns + 8), 7.0, dtype=x.dtype)[:, 3 : columns + 3]
    return x.clone(), padded.copy_(x), shifted.copy_(x)


@in_triton
@pytest.mark.parametrize("vocab_size", [5000, 5001, 5007])
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_alignment_does_not_show(backend, dtype, vocab_size):
    """16 bytes are read at a time, or one column, or one column behind the last 16 bytes."""
    logits, targets = draw(3, vocab_size, dtype)
    logits[1, vocab_size - 1], targets[1] = 40.0, vocab_size - 1
    logits[2, :4999] = -INF
    first, *others = (whole(backend, x, targets, 0.8) for x in placements(logits))
    for got in others:
        assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True))
    for n in range(3):
        one = slice(n, n + 1)
        alone = whole(backend, logits[one], targets[one], 0.8)
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, first, strict=True))


@in_triton
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_gradients_in_rows_with_padding(backend, dtype):
    """It is not written, neither with gradients nor with zeros, whatever rows the logits are in."""
    logits, targets = draw(4, 2501, dtype)
    targets[:] = torch.tensor([0, 2500, 7, -100])
    stats = whole(NATIVE, logits, targets)[2]
    up = torch.randn(2, 4, generator=generator(1))
    up[:, 2] = 0
    expected = gradient(backend, logits, targets, stats, up)
    assert expected[[0, 1, 3]].any(1).all()
    assert not expected[2].any()
    targets, stats, *up = backend.place(targets, stats, *up)

    def check(x, dlogits):
        row_kernels(backend).backward(vocab.Rows(x, targets, 1.0), stats, *up, dlogits)
        assert torch.equal(dlogits.cpu(), expected)
        memory = dlogits.fill_(7.0).new_empty(0).set_(dlogits.untyped_storage())
        assert memory.eq(7.0).all()

    for view in placements(logits):
        (x,) = backend.place(view)
        for dlogits in placements(logits):
            check(x, *backend.place(dlogits))
        check(x, x)


@in_triton
def test_gradients_at_two_distances(backend):
    x, targets, stats, up = backend.place(
        torch.zeros(2, 3, 8)[:, :2],
        torch.zeros(4, dtype=torch.long),
        torch.ones(4, 3),
        torch.ones(4),
    )
    with pytest.raises(ValueError, match=r"equally far apart, got strides \(24, 8, 1\) of shape"):
        row_kernels(backend).backward(vocab.Rows(x, targets, 1.0), stats, up, up, x)


@in_triton
@pytest.mark.parametrize(
    "config", [{"warps": 2, "unroll": 1, "unroll_backward": 4}, {"warps": 8, "span": 8192}], ids=str
)
def test_any_configuration(backend, config):
    """What benchmarks may try gives the same results but for rounding."""
    logits, targets = draw(3, 9001, torch.bfloat16)
    kernels = row_kernels(backend)
    config = kernels.Config(**config)
    expected = whole(backend, logits, targets)
    up = torch.randn(2, 3, generator=generator(1))
    expected.append(gradient(backend, logits, targets, expected[2], up))
    x, targets, *up = backend.place(logits, targets, *up)
    rows, got = vocab.Rows(x, targets, 1.0), outputs(x)
    kernels.forward(rows, None, *got, config=config)
    got.append(torch.empty_like(x))
    kernels.backward(rows, got[2], *up, got[3], config=config)
    for a, b, rtol in zip(got, expected, (3e-6, 3e-6, 3e-6, 2**-7), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=rtol, atol=1e-6)


@in_triton
def test_strided_rows_have_the_gradient_of_contiguous_ones(backend):
    logits, targets = draw(12, 1030, torch.bfloat16)
    stats = whole(NATIVE, logits, targets)[2]
    up = torch.randn(2, 12, generator=generator(1))
    expected = gradient(backend, logits, targets, stats, up)
    grid = torch.zeros(3, 5, 1030, dtype=torch.bfloat16)
    grid[:, :-1] = logits.view(3, 4, 1030)
    view, *rest = backend.place(grid[:, :-1], targets, stats, *up)
    dlogits = torch.empty_like(backend.place(logits)[0])
    rows = vocab.Rows(view, rest[0], 1.0)
    row_kernels(backend).backward(rows, *rest[1:], dlogits)
    assert torch.equal(dlogits.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.triton
def test_sizes_compile_nothing_new():
    from segkernels.triton.vocab import accumulate_kernel, backward_kernel, finish_kernel

    def count():
        kernels = (accumulate_kernel, finish_kernel, backward_kernel)
        return [sum(len(cache[0]) for cache in k.device_caches.values()) for k in kernels]

    backend = TRITON[1].values[0]
    run(backend, *draw(2, 1024, torch.bfloat16))
    before = count()
    for rows, columns in ((1, 64), (3, 4096), (16, 1000), (100, 32_000)):
        run(backend, *draw(rows, columns, torch.bfloat16))
    assert count() == before


def test_choice(monkeypatch):
    monkeypatch.delenv("SEGKERNELS_BACKEND", raising=False)
    logits = torch.zeros(2, 3)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="its triton implementation serves cuda, the tensors "):
        choose("entropy_from_logits", logits, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("segkernels.backend.TRITON_INSTALLED", True)
    assert choose("entropy_from_logits", logits, backend="triton") == "triton"
    assert choose("entropy_from_logits", logits) == "native"
    with pytest.raises(BackendError, match="its triton implementation has no float64"):
        choose("entropy_from_logits", logits.double(), backend="triton")
    monkeypatch.setattr("segkernels.backend.TRITON_INSTALLED", False)
    with pytest.raises(BackendError, match=r'not installed; run .pip install "segkernels\[gpu\]"'):
        choose("entropy_from_logits", logits, backend="triton")
    assert "triton: not installed" in explain()


@pytest.mark.parametrize(
    ("major", "hip", "chosen"),
    [(8, None, "triton"), (7, None, "reference"), (9, "6.2", "reference")],
)
@pytest.mark.parametrize("op", ["entropy_from_logits", "gae"])
def test_choice_by_gpu(monkeypatch, op, major, hip, chosen):
    class GPU:
        name = "Some GPU"

    GPU.major = major
    monkeypatch.delenv("SEGKERNELS_BACKEND", raising=False)
    monkeypatch.setattr("segkernels.backend.TRITON_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: GPU)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr("segkernels.native.cuda_extension", SimpleNamespace(build_info=str))
    served = chosen != "reference"
    why = "serves cuda" if served else "serves NVIDIA GPUs from sm_80 on, not Some GPU"
    line = next(x for x in explain("cuda").splitlines() if x.startswith(f"{op} "))
    assert line.split()[1] == ("native" if op == "gae" and served else chosen)
    assert line.endswith(why)


def python(*arguments):
    """Of a process that compiles kernels, which one that interprets them cannot."""
    here = Path(__file__).parent
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": f"{here.parent}:{here}"},
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.triton
def test_kernels_stay_within_their_budget():
    """Those that matter most; ``make kernels`` holds all of them to it."""
    done = python("kernel_budget.py", "--sm", "90", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.triton
def test_what_fails_a_kernel():
    program = """
import kernel_budget as k
def excesses(used, **budgets):
    versions = {n.replace("ours", k.VERSION): {"k": {"sm_90": b}} for n, b in budgets.items()}
    print(*k.excesses({"k": {"sm_90": used}}, versions))
excesses([56, 0], ours=[56, 0])
excesses([56, 0], other=[40, 0], another=[56, 0])
excesses([56, 0], ours=[40, 0], other=[56, 0])
excesses([57, 9], other=[57, 0], another=[56, 8])
excesses([56, 0])
wide = "LDG.E.128 R4, [R2.64] ;\\n" * 3 + "@!P0 STG.E.128 [R2.64], R4 ;\\n" * 2
narrow = "@P1 LDG.E.U16.CONSTANT R4, [R2.64] ;\\n LDG.E R5, [R2.64] ;\\n"
print(*k.narrow_or_missing("backward bfloat16, aligned rows, logits only", wide + narrow))
"""
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [
        "",
        "",
        "sm_90 k: 56 registers, the budget is 40",
        "sm_90 k: 9 bytes of shared memory, the budget is 8",
        "sm_90 k: has no budget; run with --update",
        "1 LDG of 2 bytes, expected 0 or fewer 2 STG of 16 bytes, expected 3 or more",
    ]
