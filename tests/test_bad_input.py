"""Whatever is passed, an op gives its result or a Python exception that says what to do."""

import inspect
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import segkernels as sk
from segkernels.backend import DEVICES, BackendError

VOCAB, HIDDEN = 7, 6
GRID = (4, 5)
FLAT = (20,)
CU_SEQLENS = (0, 5, 5, 13, 20)
INF, NAN = math.inf, math.nan


def generator():
    return torch.Generator().manual_seed(0)


def floats(*shape):
    return torch.randn(shape, generator=generator())


def bools(*shape):
    return torch.rand(shape, generator=generator()) < 0.6


def shard_states(given):
    """What fits the other arguments of merge_vocab_stats: their rows as the only shard."""
    names = ("logits", "targets", "temperature", "mask")
    own = {name: given[name] for name in names}
    return sk.vocab_shard_stats(**own, vocab_start=0, backend="reference")[None]


# What every tensor argument is like, for a stream of this shape with n rows.
STREAMS = (
    *("entropy", "rewards", "values", "x", "logprobs", "old_logprobs", "ref_logprobs"),
    *("advantages", "old_values", "returns"),
)
TENSORS = {
    **{name: lambda shape, n: floats(*shape) for name in STREAMS},
    "mask": lambda shape, n: bools(*shape),
    "ends": lambda shape, n: bools(*shape),
    "targets": lambda shape, n: torch.randint(0, VOCAB, shape, generator=generator()),
    "temperature": lambda shape, n: 0.5 + torch.rand(shape, generator=generator()),
    "logits": lambda shape, n: floats(*shape, VOCAB),
    "hidden": lambda shape, n: floats(*shape, HIDDEN),
    "weight": lambda shape, n: floats(VOCAB, HIDDEN),
    "bias": lambda shape, n: floats(VOCAB),
    "exclude_last": lambda shape, n: bools(n),
    "margin": lambda shape, n: floats(n // 2),
    "states": lambda shape, n: shard_states(
        {name: TENSORS[name](shape, n) for name in ("logits", "targets", "temperature", "mask")}
    ),
}
OPTIONAL = ("mask", "bias", "margin", "ref_logprobs", "cu_seqlens", "targets")

# Options: a good value, and bad ones.
TEXT = ("text", None, [1.0], floats(3), torch.zeros((), device="meta"))
CHOICE = ("text", None, 3)
OPTIONS = {
    "threshold": (0.5, NAN, *TEXT),
    "entropy_of": ("current", *CHOICE),
    "reduction": ("mean", *CHOICE),
    "spread": ("last", *CHOICE),
    "aggregation": ("seq-mean-token-mean", *CHOICE),
    "label_smoothing": (0.1, -0.1, 1.1, NAN, *TEXT),
    "center_coef": (0.1, -0.1, NAN, *TEXT),
    "clip": (0.2, 0, -1.0, NAN, *TEXT),
    "kl_coef": (0.1, NAN, INF, *TEXT),
    "entropy_coef": (0.1, NAN, -INF, *TEXT),
    "gamma": (0.9, -0.1, 1.1, NAN, *TEXT),
    "lam": (0.9, -0.1, 1.1, NAN, *TEXT),
    "normalizer": (sk.ScalarNormalizer(0.5, 2.0), "text", 3, {"type": "scalar"}),
    "vocab_start": (0, -1, 0.5, "text", None),
    "workspace": (1 << 20, 0, -1, "text", 0.5, [1]),
    "inplace_backward": (False,),
    "center": (False,),
    "group": (None,),
    "backend": (None, "text", 3),
}
# Bad values of what may also be a tensor.
NUMBERS = {
    "temperature": (0, -1.0, INF, NAN, "text", None, [1.0]),
    "exclude_last": ("text", None, 1, [True]),
}
BAD_CU_SEQLENS = {
    "decreasing": torch.tensor([0, 13, 5, 5, 20]),
    "overrun": torch.tensor([0, 5, 5, 13, 21]),
    "too short": torch.tensor([0, 5, 5, 13, 19]),
    "late": torch.tensor([1, 5, 5, 13, 20]),
    "negative": torch.tensor([-1, 5, 5, 13, 20]),
    "around 2^32": torch.tensor([0, 5, 5 + 2**32, 13, 20]),
    "ends at 2^32": torch.tensor([0, 5, 5, 13, 20 + 2**32]),
    "floating": torch.tensor([0.0, 5.0, 5.0, 13.0, 20.0]),
    "of bytes": torch.tensor([0, 5, 5, 13, 20], dtype=torch.int8),
    "2-D": torch.tensor([[0, 5, 5, 13, 20]]),
    "0-D": torch.tensor(20),
    "empty": torch.tensor([], dtype=torch.int32),
    "elsewhere": torch.tensor([0, 5, 5, 13, 20], device="meta"),
    "list": [0, 5, 5, 13, 20],
}


def devices_of(op):
    """The devices of each backend; the two halves of the vocabulary-parallel op share theirs."""
    return DEVICES.get(op, DEVICES["vocab_shard_stats"])


def arguments(op, shape=GRID, cu_seqlens=None):
    """Valid arguments of an op, every one that it has."""
    n_rows = shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    out = {}
    for name in inspect.signature(getattr(sk, op)).parameters:
        if name in TENSORS:
            out[name] = TENSORS[name](shape, n_rows)
        elif name == "cu_seqlens":
            out[name] = None if cu_seqlens is None else torch.tensor(cu_seqlens).int()
        else:
            out[name] = OPTIONS[name][0]
    return out


def call(op, **given):
    return getattr(sk, op)(**given)


def tensors_of(result):
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]


def check_form(error):
    """what: expected, got; remedy."""
    form = r"\w+(: \w+)?: expected .+, got .+; .+"
    assert re.fullmatch(form, str(error), re.DOTALL), f"{type(error).__name__}: {error}"


def check_refused(op, changed, shape=GRID, cu_seqlens=None):
    given = arguments(op, shape, cu_seqlens)
    backends = ("text",) if "backend" in changed else ("reference", *devices_of(op))
    for backend in backends:
        with pytest.raises((ValueError, TypeError)) as caught:
            call(op, **{**given, "backend": backend, **changed})
        check_form(caught.value)


def wrong(name, good):
    """What is no such tensor, by its fault."""
    out = {
        "a list": good.tolist(),
        "an array": good.numpy(),
        "text": "text",
        "sparse": good.to_sparse(),
        "nested": torch.nested.nested_tensor(
            [good.reshape(-1)[:n] for n in (1, 2)], layout=torch.jagged
        ),
        "elsewhere": good.to("meta"),
        "0-D": good.new_zeros(()),
        "one more dimension": good[None],
        "one dimension less": good[0],
        "a row less": good[1:],
        "a row more": torch.cat([good, good[:1]]),
        "complex": good.to(torch.complex128),
    }
    if good.dtype == torch.bool:
        out.update({"floating": good.float(), "integer": good.byte()})
    elif good.dtype.is_floating_point:
        out.update({"integer": good.int(), "boolean": good.bool()})
        if name == "states":
            out["single"] = good.float()
    else:
        out.update({"floating": good.float(), "boolean": good.bool()})
    if name not in OPTIONAL:
        out["nothing"] = None
    return out


OPS = [
    name
    for name in sk.__all__
    if inspect.isfunction(getattr(sk, name))
    and "backend" in inspect.signature(getattr(sk, name)).parameters
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("shape", "cu_seqlens"), [(GRID, None), (FLAT, CU_SEQLENS)])
def test_every_wrong_tensor_is_refused(op, shape, cu_seqlens):
    given = arguments(op, shape, cu_seqlens)
    if cu_seqlens is not None and "cu_seqlens" not in given:
        shape = GRID
        given = arguments(op)
    for name in given.keys() & TENSORS.keys():
        for fault, tensor in wrong(name, given[name]).items():
            try:
                check_refused(op, {name: tensor}, shape, cu_seqlens)
            except BaseException as error:
                raise AssertionError(f"{op}: {name} that is {fault}") from error


@pytest.mark.parametrize("op", OPS)
def test_every_wrong_option_is_refused(op):
    for name in arguments(op):
        for value in (*OPTIONS.get(name, ())[1:], *NUMBERS.get(name, ())):
            try:
                check_refused(op, {name: value})
            except BaseException as error:
                raise AssertionError(f"{op}: {name}={value!r}") from error


@pytest.mark.parametrize("op", [op for op in OPS if "cu_seqlens" in arguments(op)])
@pytest.mark.parametrize("fault", BAD_CU_SEQLENS)
def test_every_wrong_cu_seqlens_is_refused(op, fault):
    check_refused(op, {"cu_seqlens": BAD_CU_SEQLENS[fault]}, FLAT, CU_SEQLENS)


@pytest.mark.parametrize(
    "op", [op for op in OPS if "targets" in arguments(op) and not op.endswith("_stats")]
)
@pytest.mark.parametrize("target", [-1, VOCAB, 2**31, -(2**63)])
def test_targets_out_of_range_are_refused(op, target):
    targets = torch.full(GRID, target)
    check_refused(op, {"targets": targets, "mask": torch.ones(GRID, dtype=torch.bool)})


@pytest.mark.parametrize("op", [op for op in OPS if "temperature" in arguments(op)])
@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, INF])
def test_temperatures_out_of_range_are_refused(op, temperature):
    temperatures = torch.ones(GRID)
    temperatures[2, 3] = temperature
    check_refused(op, {"temperature": temperatures, "mask": torch.ones(GRID, dtype=torch.bool)})


def test_values_that_make_no_sense_together_are_refused():
    every = torch.ones(GRID, dtype=torch.bool)
    for n_rows in (0, 3):
        pairs = arguments("segment_bradley_terry", (n_rows, 5)) | {"margin": None}
        check_refused("segment_bradley_terry", {k: v for k, v in pairs.items() if k != "backend"})
    check_refused("segment_ends", {"entropy": torch.full(GRID, NAN), "mask": every})
    for op in ("policy_loss", "linear_policy_loss"):
        check_refused(op, {"ref_logprobs": None})
    check_refused("policy_loss", {"entropy": None})
    check_refused("linear_policy_loss", {"targets": torch.full(GRID, -100), "mask": every})
    check_refused("linear_policy_loss", {"weight": floats(0, HIDDEN)})
    check_refused("linear_logprobs_and_entropy", {"hidden": floats(*GRID, 0)})
    check_refused("entropy_from_logits", {"logits": floats(*GRID, 0)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fault", ["decreasing", "overrun", "late"])
def test_half_precision_projections_refuse_wrong_cu_seqlens(dtype, fault):
    half = {"hidden": floats(*FLAT, HIDDEN).to(dtype), "weight": floats(VOCAB, HIDDEN).to(dtype)}
    changed = {**half, "cu_seqlens": BAD_CU_SEQLENS[fault]}
    check_refused("linear_policy_loss", changed, FLAT, CU_SEQLENS)


TABLE = {"positions": [0.5, 1.0], "means": [0.0, 1.0], "stds": [1.0, 2.0]}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: sk.LocationNormalizer("text", 0.0, 0.0, 1.0),
        lambda: sk.LocationNormalizer(0.0, 0.0, 0.0, NAN),
        lambda: sk.LocationNormalizer(0.0, 0.0, 0.0, 1.0, min_std=[1.0]),
        lambda: sk.LocationNormalizer(0.0, 0.0, 0.0, -1.0),
        lambda: sk.TableNormalizer(**{**TABLE, "means": [0.0]}),
        lambda: sk.TableNormalizer(**{**TABLE, "means": [0.0, None]}),
        lambda: sk.TableNormalizer(**{**TABLE, "positions": [1.0, 0.5]}),
        lambda: sk.TableNormalizer([], [], []),
        lambda: sk.ScalarNormalizer(0.0, 0.0),
        lambda: sk.ScalarNormalizer(None, 1.0),
        lambda: sk.RunningLocationNormalizer(bins=1.5),
        lambda: sk.RunningLocationNormalizer(bins="text"),
        lambda: sk.RunningLocationNormalizer(decay=None),
        lambda: sk.RunningLocationNormalizer(decay=NAN),
        lambda: sk.RunningLocationNormalizer(epsilon=1.0),
        lambda: sk.normalizer_from_dict([1, 2]),
        lambda: sk.normalizer_from_dict({}),
        lambda: sk.normalizer_from_dict({"type": ["line"]}),
        lambda: sk.normalizer_from_dict({"type": "scalar", "mean": 0.0}),
        lambda: sk.normalizer_from_dict({"type": "running", "bins": 10}),
        lambda: sk.fit_location(floats(0), floats(0)),
        lambda: sk.fit_location(floats(3).abs().clamp(0.1, 1), floats(3), epsilon=NAN),
        lambda: sk.fit_location(floats(3), [1.0, 2.0, 3.0]),
        lambda: sk.fit_location(torch.tensor([0.5, 2.0]), floats(2)),
        lambda: sk.fit_location(torch.tensor([0.5, 1.0]), torch.tensor([NAN, 1.0])),
        lambda: sk.segment_positions(bools(*GRID).tolist(), bools(*GRID)),
        lambda: sk.segment_positions(bools(*GRID), floats(*GRID)),
        lambda: sk.RunningLocationNormalizer().update([[1.0]], bools(1, 1), bools(1, 1)),
        lambda: sk.RunningLocationNormalizer().update(floats(3, 5), bools(*GRID), bools(*GRID)),
        lambda: sk.RunningLocationNormalizer().update(
            floats(20), bools(20), bools(20), cu_seqlens=torch.tensor([0, 25, 20])
        ),
    ],
)
def test_wrong_normalisers_are_refused(wrong):
    with pytest.raises((ValueError, TypeError)) as caught:
        wrong()
    check_form(caught.value)


def each_backend(op):
    return ("reference", *(name for name, devices in devices_of(op).items() if "cpu" in devices))


def check_same(op, backend, given, changed):
    """The op gives bit for bit the same for arguments that hold the same values."""
    plain = tensors_of(call(op, **{**given, "backend": backend}))
    other = tensors_of(call(op, **{**given, "backend": backend, **changed}))
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=0, equal_nan=True)


def spread_out(x):
    """The same values, every other element in memory; for 0 dimensions x itself."""
    return torch.stack([x, x.clone()], -1)[..., 0] if x.dim() else x


def transposed(x):
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def negated_view(x):
    """Holds -x and a bit that says so; contiguous all the same."""
    return torch._neg_view(-x) if x.dtype.is_floating_point else x


SAME_VALUES = {
    "spread out": spread_out,
    "transposed": transposed,
    "negated view": negated_view,
    "parameter": lambda x: torch.nn.Parameter(x) if x.dtype.is_floating_point else x,
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", SAME_VALUES)
def test_what_holds_the_same_values_gives_the_same(op, form):
    given = arguments(op)
    changed = {k: SAME_VALUES[form](v) for k, v in given.items() if isinstance(v, Tensor)}
    for backend in each_backend(op):
        check_same(op, backend, given, changed)


@pytest.mark.parametrize("op", OPS)
def test_one_row_for_all(op):
    """Expanded tensors: one row of memory stands for every row."""
    given = arguments(op)
    shared = {
        name: value[:1].expand(value.shape)
        for name, value in given.items()
        if isinstance(value, Tensor) and name not in ("weight", "bias")
    }
    if "states" in shared:
        shared["states"] = shard_states(given | shared)
    copies = {name: value.contiguous() for name, value in shared.items()}
    for backend in each_backend(op):
        check_same(op, backend, given | copies, shared)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(op, mode):
    given = arguments(op)
    for backend in each_backend(op):
        plain = tensors_of(call(op, **{**given, "backend": backend}))
        with mode():
            inside = arguments(op)
            result = tensors_of(call(op, **{**inside, "backend": backend}))
        for a, b in zip(plain, result, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


DIFFERENTIABLE = {
    **dict.fromkeys(("entropy_from_logits", "logprobs_and_entropy"), ("logits",)),
    **dict.fromkeys(("vocab_parallel_logprobs_and_entropy", "merge_vocab_stats"), ("logits",)),
    **{op: ("hidden", "weight", "bias") for op in OPS if op.startswith("linear_")},
    **dict.fromkeys(("segment_scores", "segment_bradley_terry"), ("rewards",)),
    **{"policy_loss": ("logprobs", "entropy"), "value_loss": ("values",)},
}


@pytest.mark.parametrize("op", OPS)
def test_gradients_where_they_are_promised_and_nowhere_else(op):
    given = arguments(op)
    leaves = {
        name: value.requires_grad_()
        for name, value in given.items()
        if isinstance(value, Tensor) and value.dtype.is_floating_point
    }
    promised = DIFFERENTIABLE.get(op, ())
    for backend in each_backend(op):
        outs = tensors_of(call(op, **{**given, "backend": backend}))
        outs = [out for out in outs if out.requires_grad]
        assert bool(outs) == bool(promised)
        if not outs:
            continue
        grads = torch.autograd.grad([out.sum() for out in outs], leaves.values(), allow_unused=True)
        got = {name for name, grad in zip(leaves, grads, strict=True) if grad is not None}
        assert got == set(promised)


SIZES = [
    *[((0, 5), None), ((4, 0), None), ((0, 0), None), ((4, 1), None)],
    *[((0,), (0,)), ((0,), (0, 0, 0)), ((1,), (0, 0, 1)), ((3,), (0, 3, 3))],
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("shape", "cu_seqlens"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sizes_down_to_nothing(op, shape, cu_seqlens, dtype):
    given = arguments(op, shape, cu_seqlens)
    n_rows = shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if op == "segment_bradley_terry" and n_rows == 0:
        return  # refused, see above
    for name in given.keys() & (TENSORS.keys() - {"temperature", "states"}):
        if given[name].dtype.is_floating_point:
            given[name] = given[name].to(dtype)
    for backend in each_backend(op):
        if dtype == torch.float64 and backend != "reference":
            with pytest.raises(BackendError):
                call(op, **{**given, "backend": backend})
            continue
        for name in DIFFERENTIABLE.get(op, ()):
            given[name].requires_grad_()
        result = tensors_of(call(op, **{**given, "backend": backend}))
        assert not any(t.isnan().any() for t in result)
        if op in DIFFERENTIABLE:
            sum(t.sum() for t in result if t.requires_grad).backward()
            for name in DIFFERENTIABLE[op]:
                assert given[name].grad.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_vocabulary_of_one_token(backend):
    logits = floats(*GRID, 1).requires_grad_()
    logprobs, entropy = sk.logprobs_and_entropy(
        logits, torch.zeros(GRID, dtype=torch.long), backend=backend
    )
    assert not logprobs.any()
    assert not entropy.any()
    (gradient,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)
    assert not gradient.any()


def test_rows_that_start_behind_2_to_the_31_elements(tmp_path):
    """In a sparse file, of which only the pages that are touched exist."""
    stride = 2**31 + 8
    file = torch.from_file(
        str(tmp_path / "logits"), shared=True, size=stride + VOCAB, dtype=torch.bfloat16
    )
    far = file.as_strided((2, VOCAB), (stride, 1))
    near = floats(2, VOCAB).bfloat16()
    far.copy_(near)
    targets = torch.tensor([3, 5])
    results = []
    for logits in (far, near):
        leaf = logits.detach().requires_grad_()
        out = sk.logprobs_and_entropy(leaf, targets, backend="native")
        results.append([*out, *torch.autograd.grad(sum(o.sum() for o in out), leaf)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@st.composite
def calls(draw):
    """An op and arguments, some of which are something else than they should be."""
    op = draw(st.sampled_from(OPS))
    flat = "cu_seqlens" in arguments(op) and draw(st.booleans())
    given = arguments(op, *((FLAT, CU_SEQLENS) if flat else (GRID,)))
    for name, value in list(given.items()):
        if draw(st.integers(0, 3)):
            continue
        if isinstance(value, Tensor):
            pool = {**wrong(name, value), **{k: f(value) for k, f in SAME_VALUES.items()}}
            pool["infinite"] = torch.full_like(value, INF) if value.is_floating_point() else value
            pool["NaN"] = torch.full_like(value, NAN) if value.is_floating_point() else value
            pool["halves"] = value.half() if value.is_floating_point() else value
            pool["doubles"] = value.double() if value.is_floating_point() else value
            pool["zeros"] = torch.zeros_like(value)
            pool["expanded"] = value[:1].expand(value.shape)
        else:
            pool = dict(enumerate(OPTIONS.get(name, (None,))))
        if name == "cu_seqlens":
            pool |= BAD_CU_SEQLENS
        if name in NUMBERS:
            pool |= dict(enumerate(NUMBERS[name]))
        given[name] = pool[draw(st.sampled_from(sorted(pool, key=str)))]
    if draw(st.booleans()):
        given["backend"] = draw(st.sampled_from(["reference", "native"]))
    return op, given


@given(calls())
@settings(max_examples=400, deadline=None)
def test_no_call_ends_in_anything_else(chosen):
    op, given = chosen
    try:
        outs = tensors_of(call(op, **given))
    except BackendError:
        return
    except (ValueError, TypeError) as error:
        check_form(error)
        return
    outs = [out for out in outs if out.requires_grad]
    if outs:
        sum(out.sum() for out in outs).backward()


WITHOUT_EXTENSION = """
import json, os, sys
sys.modules["segkernels._native"] = None
import torch, segkernels as sk
from segkernels.backend import BackendError, explain
x, mask = torch.tensor([[2.0, 0.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool)

def attempt(**options):
    try:
        return sk.segment_ends(x, mask, 1.0, **options).tolist()
    except BackendError as error:
        return str(error)

calls = [attempt(), attempt(backend="native"), attempt(backend="reference")]
os.environ["SEGKERNELS_BACKEND"] = "reference"
print(json.dumps([explain(), *calls, attempt()]))
"""


def test_a_build_without_the_extension():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION],
        env={**os.environ, "PYTHONPATH": str(Path(sk.__file__).parents[1])},
        check=True,
        capture_output=True,
        text=True,
    )
    table, default, native, reference, by_environment = json.loads(run.stdout)
    assert "extension: missing (import of segkernels._native halted" in table
    assert re.search(r"^segment_ends +reference +asked for by", table, re.MULTILINE)
    missing = r"segment_ends: .*the compiled extension is missing \(.*\); build it with"
    assert re.match(missing, default)
    assert default.endswith("or set SEGKERNELS_BACKEND=reference to run plain PyTorch")
    assert re.match(missing, native)
    assert reference == by_environment == [[True, True, False]]
