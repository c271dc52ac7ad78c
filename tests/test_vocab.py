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


@in_triton
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_alignment_does_not_show(backend, dtype):
    """Rows that begin on 16 bytes are read 16 bytes at a time, others not; results are equal."""
    aligned, targets = draw(3, 5001, dtype)
    wide = torch.zeros(3, 5008, dtype=dtype)
    wide[:, :5001] = aligned
    shifted = torch.zeros(3, 5009, dtype=dtype)
    shifted[:, 3:5004] = aligned
    results = [
        whole(backend, view, targets, 0.8)
        for view in (aligned, wide[:, :5001], shifted[:, 3:5004], aligned[:1], aligned[1:2])
    ]
    for got in results[1:3]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))
    for n, got in enumerate(results[3:]):
        assert torch.equal(got[1], results[0][1][n : n + 1])


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
def test_what_exceeds_a_budget():
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
"""
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [
        "",
        "",
        "sm_90 k: 56 registers, the budget is 40",
        "sm_90 k: 9 bytes of shared memory, the budget is 8",
        "sm_90 k: has no budget; run with --update",
    ]
