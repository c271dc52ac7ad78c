import importlib.util
import os
import re
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import segkernels as sk
from segkernels import backend, native, segment_bradley_terry, segment_ends, segment_scores
from segkernels.backend import BackendError, BackendWarning, choose, explain
from segkernels.layout import (
    check_bools,
    check_floats,
    check_like,
    layout_of,
    values_may_be_checked,
)

FLAT = torch.zeros(7)
GRID = torch.zeros(2, 3)
CPU_ONLY = torch.device("cpu")


def cu(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_layout_of_a_grid():
    layout = layout_of("x", GRID, None)
    assert (layout.n_rows, layout.row_len, layout.n_tokens) == (2, 3, 6)
    assert layout.cu_seqlens is None
    assert layout.row_ids(CPU_ONLY).tolist() == [0, 0, 0, 1, 1, 1]
    assert layout.position(5) == "row 1, position 2"


def test_layout_of_a_flat_stream():
    layout = layout_of("x", FLAT, torch.tensor([0, 0, 4, 4, 7]))
    assert (layout.n_rows, layout.row_len, layout.n_tokens) == (4, 0, 7)
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.row_ids(CPU_ONLY).tolist() == [1, 1, 1, 1, 3, 3, 3]
    assert layout.position(0) == "row 1, position 0"
    assert layout.position(6) == "row 3, position 2"


@pytest.mark.parametrize(
    ("tensor", "cu_seqlens", "error", "message"),
    [
        (FLAT, None, ValueError, "x: expected shape [rows, tokens], got [7]; for a flat stream"),
        (GRID, cu(0, 6), ValueError, "x: expected shape [tokens] because cu_seqlens is given, got"),
        (FLAT, torch.tensor([0.0, 7.0]), TypeError, "cu_seqlens: expected int32, got torch.float"),
        (FLAT, cu(), ValueError, "cu_seqlens: expected shape [rows + 1], got [0]; it starts"),
        (FLAT, cu(0, 7)[None], ValueError, "cu_seqlens: expected shape [rows + 1], got [1, 2]"),
        (FLAT, cu(0, 7).to("meta"), ValueError, "cu_seqlens: expected device cpu like x, got meta"),
        (
            FLAT,
            cu(0, 6),
            ValueError,
            "cu_seqlens: expected to run from 0 to 7, the number of tokens",
        ),
        (FLAT, cu(1, 7), ValueError, "got 1 to 7; it must cover the stream exactly"),
        (FLAT, cu(0, 5, 4, 7), ValueError, "that never decrease, got 5 then 4 at row 1; pass cum"),
        (
            torch.empty(2**31, device="meta"),
            cu(0, 7).to("meta"),
            ValueError,
            "x: expected fewer than 2^31 tokens with cu_seqlens, got 2147483648; split the stream",
        ),
    ],
)
def test_layouts_that_are_none(tensor, cu_seqlens, error, message):
    with pytest.raises(error, match=re.escape(message)):
        layout_of("x", tensor, cu_seqlens).check_rows()


def test_checks_of_arguments():
    with pytest.raises(TypeError, match=r"x: expected float32, .* got torch.int64; pass x.float"):
        check_floats("x", GRID.long())
    with pytest.raises(ValueError, match=r"y: expected shape \[2, 3\] like x, got \[7\]; pass the"):
        check_like("y", FLAT, "x", GRID)
    with pytest.raises(ValueError, match=r"y: expected device cpu like x, got meta; move it with"):
        check_like("y", GRID.to("meta"), "x", GRID)
    with pytest.raises(TypeError, match=r"y: expected bool, got torch.float32; pass y.bool\(\)"):
        check_bools("y", GRID, "x", GRID)


@pytest.mark.parametrize(("debug", "checked"), [(None, False), ("0", False), ("1", True)])
def test_values_off_the_cpu_are_checked_in_debug_mode_only(debug, checked, monkeypatch):
    if debug is None:
        monkeypatch.delenv("SEGKERNELS_DEBUG", raising=False)
    else:
        monkeypatch.setenv("SEGKERNELS_DEBUG", debug)
    assert values_may_be_checked(GRID.to("meta")) is checked
    assert values_may_be_checked(GRID) is True


@pytest.fixture
def no_choice(monkeypatch):
    monkeypatch.delenv("SEGKERNELS_BACKEND", raising=False)
    return monkeypatch


def test_choice_by_device_and_dtype(no_choice):
    assert choose("segment_ends", GRID) == "native"
    assert choose("segment_ends", GRID.double()) == "reference"
    assert choose("segment_bradley_terry", GRID, None, FLAT.double()) == "reference"
    assert choose("segment_ends", GRID.to("meta")) == "reference"
    assert choose("segment_offsets", GRID.bool()) == "reference"


def test_explicit_choice(no_choice):
    assert choose("segment_ends", GRID, backend="reference") == "reference"
    assert choose("segment_ends", GRID, backend="native") == "native"
    no_choice.setenv("SEGKERNELS_BACKEND", "reference")
    assert choose("segment_ends", GRID) == "reference"
    assert choose("segment_ends", GRID, backend="native") == "native"
    no_choice.setenv("SEGKERNELS_BACKEND", "")
    assert choose("segment_ends", GRID) == "native"


def test_unknown_name(no_choice):
    with pytest.raises(ValueError, match=r"backend: expected one of reference, .* got 'cuda'"):
        choose("segment_ends", GRID, backend="cuda")
    no_choice.setenv("SEGKERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"SEGKERNELS_BACKEND: expected one of .* got 'fast'"):
        segment_scores(GRID, GRID.bool())


def test_a_choice_that_cannot_run_says_why(no_choice):
    mask = GRID.bool()
    with pytest.raises(BackendError, match=r"'native' cannot run: its native .* has no float64"):
        segment_ends(GRID.double(), mask, 1.0, backend="native")
    with pytest.raises(BackendError, match="its triton implementation serves no device, the tens"):
        segment_scores(GRID, mask, backend="triton")
    with pytest.raises(BackendError, match="native implementation serves cpu and cuda, the"):
        choose("segment_scores", GRID.to("meta"), backend="native")
    no_choice.setenv("SEGKERNELS_BACKEND", "native")
    with pytest.raises(BackendError, match="segment_bradley_terry: backend 'native' cannot run"):
        segment_bradley_terry(GRID.double(), mask)


def test_a_missing_extension_never_falls_back(no_choice):
    no_choice.setattr(native, "extension", None)
    no_choice.setattr(native, "missing", "No module named '_native'")
    for chosen in ("native", None):
        with pytest.raises(BackendError, match=r"the compiled extension is missing \(No module "):
            segment_scores(GRID, GRID.bool(), backend=chosen)
    with pytest.raises(BackendError, match="or set SEGKERNELS_BACKEND=reference to run plain"):
        segment_scores(GRID, GRID.bool())
    assert segment_scores(GRID, GRID.bool(), backend="reference").tolist() == [0.0, 0.0]
    assert "extension: missing (No module named '_native')" in explain()
    assert re.search(r"segment_ends +none +segment_ends: the compiled extension is", explain())


def fake(device, dtype=torch.float32):
    """What ``choose`` looks at, of a device that may not be here."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


def test_without_the_cuda_module_the_reference_runs_and_says_so_once(no_choice):
    no_choice.setattr(native, "cuda_extension", None)
    no_choice.setattr(native, "cuda_missing", "No module named '_cuda'")
    no_choice.setattr(backend, "_warned", False)
    on_gpu, double = fake("cuda"), fake("cuda", torch.float64)
    with pytest.warns(BackendWarning, match="plain PyTorch: the CUDA module .*: No module named"):
        assert choose("gae", on_gpu) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("gae", on_gpu) == "reference"
        assert choose("gae", double) == "reference"
    with pytest.raises(BackendError, match="the CUDA module of the extension cannot be used"):
        choose("gae", on_gpu, backend="native")
    text = explain("cuda")
    assert "CUDA module: cannot be used: No module named '_cuda'" in text
    assert re.search(r"gae +reference +the CUDA module of the extension cannot be used", text)


def test_with_the_cuda_module_it_serves_cuda(no_choice):
    no_choice.setattr(native, "cuda_extension", SimpleNamespace(build_info=lambda: "built for x"))
    assert choose("gae", fake("cuda")) == "native"
    assert choose("gae", fake("cuda", torch.float64)) == "reference"
    text = explain("cuda")
    assert "CUDA module: built for x" in text
    assert re.search(r"gae +native +serves cuda", text)


def test_explain(no_choice):
    text = explain()
    assert text.startswith("device cpu; SEGKERNELS_BACKEND not set\nextension: isa ")
    assert f", {torch.get_num_threads()} threads\nCUDA module: " in text
    for op in backend.DEVICES:
        assert re.search(rf"^{op} +(native|reference) ", text, re.MULTILINE)
    assert re.search(r"segment_ends +native +serves cpu", text)
    assert re.search(r"segment_offsets +reference +no kernel serves cpu", text)
    assert re.search(r"segment_offsets +reference +no kernel serves cuda", explain("cuda"))
    no_choice.setenv("SEGKERNELS_BACKEND", "reference")
    assert explain().startswith("device cpu; SEGKERNELS_BACKEND reference\n")
    assert re.search(r"segment_ends +reference +asked for by SEGKERNELS_BACKEND", explain())
    no_choice.setenv("SEGKERNELS_BACKEND", "native")
    assert re.search(r"segment_offsets +none +segment_offsets: .* serves no device", explain())


def test_every_op_is_public():
    import segkernels

    assert set(backend.DEVICES) <= set(segkernels.__all__)
    assert all(hasattr(segkernels, name) for name in segkernels.__all__)


def test_import_stays_light():
    """Below 0.3 s beyond torch, and without the training stack."""
    program = (
        "import sys, time, torch\n"
        "before = set(sys.modules)\n"
        "start = time.process_time()\n"
        "import segkernels\n"
        "seconds = time.process_time() - start\n"
        "heavy = {'transformers', 'accelerate', 'datasets', 'sklearn', 'triton'}\n"
        "print(seconds, *heavy & (set(sys.modules) - before))\n"
    )
    root = os.path.dirname(os.path.dirname(importlib.util.find_spec("segkernels").origin))
    environment = os.environ | {"PYTHONPATH": root}
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert all(len(run) == 1 for run in runs), runs
    assert min(float(run[0]) for run in runs) < 0.3


ROWS, LENGTH = 64, 2048  # enough tokens for the pool to be used


def ends_by_native(entropy, mask, ends, threads):
    return native.extension.segment_ends(
        entropy=native.floats(entropy),
        mask=native.ptr(mask),
        rows=(ROWS, LENGTH, 0),
        boundaries=(1.0, False, 0, True),
        ends=native.ptr(ends),
        executor=(threads, -1),
    )


def test_calls_from_several_threads_at_once(two_threads):
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    inputs = [
        2 * torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(i)) for i in range(8)
    ]
    expected = [segment_ends(x, mask, 1.0, backend="reference") for x in inputs]

    def work(i):
        return all(
            torch.equal(segment_ends(inputs[i], mask, 1.0, backend="native"), expected[i])
            for _ in range(5)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork on this platform")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_has_a_pool_of_its_own():
    entropy = 2 * torch.rand(ROWS, LENGTH)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    expected, ends = torch.empty_like(mask), torch.zeros_like(mask)
    ends_by_native(entropy, mask, expected, threads=3)
    child = os.fork()
    if child == 0:
        # torch's own pool does not survive a fork, so the child compares bytes.
        signal.alarm(20)
        ends_by_native(entropy, mask, ends, threads=3)
        same = ends.numpy().tobytes() == expected.numpy().tobytes()
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    ends_by_native(entropy, mask, ends, threads=3)
    assert torch.equal(ends, expected)


def every_op():
    """Results of all ops that have kernels, with gradients."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 9, generator=g).requires_grad_()
    mask, ends = torch.ones(4, 9, dtype=torch.bool), torch.rand(4, 9, generator=g) < 0.4
    hidden = torch.randn(4, 9, 6, generator=g).requires_grad_()
    weight = torch.randn(11, 6, generator=g).requires_grad_()
    bias = torch.randn(11, generator=g).requires_grad_()
    targets = torch.randint(0, 11, (4, 9), generator=g)

    def run():
        outs = [
            *sk.logprobs_and_entropy(hidden @ weight.T, targets),
            *sk.linear_logprobs_and_entropy(hidden, weight, targets, bias=bias),
            *sk.vocab_parallel_logprobs_and_entropy(hidden @ weight.T, targets, 0),
            sk.segment_scores(x, ends, mask),
            sk.segment_bradley_terry(x, ends, mask).loss,
            sk.policy_loss(x, x.detach() - 0.1, x.detach(), mask).loss,
            sk.value_loss(x, x.detach() - 0.1, x.detach(), mask),
            sk.entropy_from_logits(hidden @ weight.T),
            *(
                sk.linear_policy_loss(
                    hidden.to(dtype), weight, targets, x.detach(), x.detach(), mask, bias=bias
                ).loss
                for dtype in (torch.float32, torch.float16)
            ),
        ]
        grads = torch.autograd.grad(sum(out.sum() for out in outs), (x, hidden, weight, bias))
        y = x.detach()
        constants = [
            sk.segment_ends(y, mask, 0.3),
            sk.scatter_segment_rewards(y, ends, mask, normalizer=sk.ScalarNormalizer(0.0, 2.0)),
            *sk.segment_advantages(y, ends, y, 0.5 * y, y, mask),
            *sk.segment_ends_and_advantages(y, y, y, 0.5 * y, y, mask, 0.3),
            *sk.gae(y, y, mask),
            sk.whiten(y, mask),
        ]
        running = sk.RunningLocationNormalizer()
        running.update(y, ends, mask)
        fit = running.refit()
        return [*outs, *grads, *constants, fit.means, fit.stds]

    return run


def test_kernels_run_without_the_reference():
    """What is plain PyTorch beside a kernel stands with the op, not with its definition."""
    program = (
        "import sys, test_layout_backend\n"
        "test_layout_backend.every_op()()\n"
        "print(*[name for name in sys.modules if name.startswith('segkernels.reference')])\n"
        "import segkernels, torch\n"
        "segkernels.gae(*torch.ones(2, 1, 3), torch.ones(1, 3) > 0, backend='reference')\n"
        "print('segkernels.reference' in sys.modules)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", program],
        cwd=os.path.dirname(__file__),
        env={k: v for k, v in os.environ.items() if k != "SEGKERNELS_BACKEND"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert out == "\nTrue\n"


@pytest.mark.parametrize("changed", ["bfloat16", "float64", "meta"])
def test_torchs_defaults_do_not_matter(changed):
    """Kernels write fp32 on the CPU, whatever a bare torch.empty would have given."""
    everything = every_op()
    before = everything()
    old = torch.get_default_dtype()
    try:
        if changed == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, changed))
        after = everything()
    finally:
        torch.set_default_dtype(old)
        torch.set_default_device(None)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
