import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import CASES, Case, cases
from tolerance import assert_close

from segkernels import PolicyLoss, policy_loss, segment_bradley_terry, segment_scores, value_loss
from segkernels.native.ppo_loss import (
    policy_loss_bwd,
    policy_loss_fwd,
    value_loss_bwd,
    value_loss_fwd,
)

BACKENDS = ("reference", "native")
STORAGE = (torch.float32, torch.bfloat16, torch.float16)
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")


def surrogate(*args, **options):
    return policy_loss(*args, **options).loss


LOSSES = {"policy": surrogate, "value": value_loss}
NAN = float("nan")
INF = float("inf")

backends = pytest.mark.parametrize("backend", BACKENDS)
storage = pytest.mark.parametrize("dtype", STORAGE, ids=str)
aggregations = pytest.mark.parametrize("aggregation", AGGREGATIONS)
losses = pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES.keys())
case_names = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
SMALL = {name: case for name, case in CASES.items() if case.n_tokens < 300}
small_cases = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())


def draw(case: Case, dtype=torch.float32, seed=0):
    """new, old (apart by more than the clip for about half), advantages or returns, mask."""
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(case.n_tokens, generator=g) - 1
    new = old + 0.3 * torch.randn(case.n_tokens, generator=g)
    target = torch.randn(case.n_tokens, generator=g)
    return *(x.to(dtype).masked_fill(~case.mask, NAN) for x in (new, old, target)), case.mask


def naive_policy_term(new, old, advantage, clip):
    rho = math.exp(new - old)
    clipped = min(max(rho, 1 - clip), 1 + clip)
    term = -min(rho * advantage, clipped * advantage)
    return term, -rho * advantage if rho * advantage <= clipped * advantage else 0.0


def naive_value_term(new, old, target, clip):
    clipped = min(max(new, old - clip), old + clip)
    plain, limited = (new - target) ** 2, (clipped - target) ** 2
    return 0.5 * max(plain, limited), new - target if plain >= limited else 0.0


def naive(case, loss_of, args, clip, aggregation):
    """Loss and gradient, token by token."""
    term_of = naive_policy_term if loss_of is surrogate else naive_value_term
    new, old, target, mask = (x.tolist() for x in args)
    rows, start = [], 0
    for length in case.lengths:
        action = [t for t in range(start, start + length) if mask[t]]
        start += length
        if action:
            rows.append({t: term_of(new[t], old[t], target[t], clip) for t in action})
    gradient = [0.0] * len(new)
    tokens = sum(len(row) for row in rows)
    loss = 0.0
    for row in rows:
        weight = {
            "token-mean": 1 / tokens,
            "seq-mean-token-mean": 1 / len(rows) / len(row),
            "seq-mean-token-sum": 1 / len(rows),
        }[aggregation]
        for t, (term, slope) in row.items():
            loss += weight * term
            gradient[t] = weight * slope
    return torch.tensor(loss, dtype=torch.float64), torch.tensor(gradient, dtype=torch.float64)


def run(loss_of, args, upstream=1.0, **options):
    """Loss and gradient of the first argument."""
    new = args[0].detach().requires_grad_()
    loss = loss_of(new, *args[1:], **options)
    (upstream * loss).backward()
    return loss.detach(), new.grad


@small_cases
@losses
@aggregations
def test_reference_is_the_definition(case, loss_of, aggregation):
    args = draw(case, torch.float64)
    options = {"clip": 0.2, "aggregation": aggregation}
    out = run(loss_of, args, cu_seqlens=case.cu_seqlens, **options)
    torch.testing.assert_close(out, naive(case, loss_of, args, **options))


@losses
@aggregations
def test_gradcheck(loss_of, aggregation):
    case = CASES["empty rows"]
    new, old, target, mask = draw(case, torch.float64)

    def function(new):
        return loss_of(new, old, target, mask, cu_seqlens=case.cu_seqlens, aggregation=aggregation)

    torch.autograd.gradcheck(function, new.requires_grad_())


def check_native(loss_of, case, dtype, seed=0, **options):
    args = draw(case, dtype, seed)
    options |= {"cu_seqlens": case.cu_seqlens, "upstream": 3.0}
    doubles = *(x.double() for x in args[:3]), args[3]
    truth = run(loss_of, doubles, **options)
    baseline, kernel = (run(loss_of, args, backend=b, **options) for b in BACKENDS)
    assert kernel[0].dtype == torch.float32
    assert kernel[1].dtype == dtype
    for name, *triple in zip(("loss", "gradient"), kernel, baseline, truth, strict=True):
        assert_close(*triple, name)
    assert not kernel[1][~case.mask].any()


@case_names
@losses
@storage
def test_native(case, loss_of, dtype):
    for aggregation in AGGREGATIONS:
        check_native(loss_of, case, dtype, aggregation=aggregation)


@given(
    cases(),
    st.sampled_from(list(LOSSES.values())),
    st.sampled_from(AGGREGATIONS),
    st.sampled_from([0.05, 0.2, 1.5, INF]),
    st.integers(0, 2**31 - 1),
)
@settings(max_examples=30, deadline=None)
def test_random_layouts(case, loss_of, aggregation, clip, seed):
    check_native(loss_of, case, torch.float32, seed, aggregation=aggregation, clip=clip)


@backends
@losses
@aggregations
@case_names
def test_padded_equals_packed(case, aggregation, loss_of, backend):
    args = draw(case)
    grids = [case.grid(x, NAN if x.is_floating_point() else False) for x in args]
    options = {"aggregation": aggregation, "backend": backend}
    packed = run(loss_of, args, cu_seqlens=case.cu_seqlens, **options)
    padded = run(loss_of, grids, **options)
    assert torch.equal(padded[0], packed[0])
    assert torch.equal(case.flat(padded[1]), packed[1])
    assert padded[1].isfinite().all()


@backends
@losses
@aggregations
def test_permuted_rows(loss_of, aggregation, backend):
    case = CASES["holes"]
    grids = [case.grid(x, NAN if x.is_floating_point() else False) for x in draw(case)]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    options = {"aggregation": aggregation, "backend": backend}
    loss, gradient = run(loss_of, grids, **options)
    permuted_loss, permuted_gradient = run(loss_of, [x[order] for x in grids], **options)
    torch.testing.assert_close(permuted_loss, loss)
    assert torch.equal(permuted_gradient, gradient[order])


@losses
@aggregations
def test_threads_do_not_matter(loss_of, aggregation, two_threads):
    args = [x.repeat(4) for x in draw(CASES["giant"])]
    cu_seqlens = torch.tensor([0, *CASES["giant"].lengths * 4]).cumsum(0).int()
    options = {"cu_seqlens": cu_seqlens, "aggregation": aggregation}
    many, again = run(loss_of, args, **options), run(loss_of, args, **options)
    torch.set_num_threads(1)
    for a, b, c in zip(many, again, run(loss_of, args, **options), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@backends
def test_aggregations_by_hand(backend):
    # Rows of 1 and 3 action tokens with terms -1 and -2, -3, -4; a third row has none.
    advantages = torch.tensor([[1.0, NAN, NAN], [2.0, 3.0, 4.0], [NAN, NAN, NAN]])
    mask = ~advantages.isnan()
    zeros = torch.where(mask, 0.0, NAN)
    found = {
        aggregation: policy_loss(
            zeros, zeros, advantages, mask, aggregation=aggregation, backend=backend
        ).loss.item()
        for aggregation in AGGREGATIONS
    }
    assert found == {
        "token-mean": -2.5,
        "seq-mean-token-mean": -2.0,
        "seq-mean-token-sum": -5.0,
    }


@backends
@pytest.mark.parametrize(
    ("q", "advantage", "loss", "slope"),
    [
        (0.0, 2.0, -2.0, -2.0),
        (math.log(2), 3.0, -3.6, 0.0),
        (math.log(2), -3.0, 6.0, 6.0),
        (math.log(0.5), 3.0, -1.5, -1.5),
        (math.log(0.5), -3.0, 2.4, 0.0),
        (200.0, 1.0, -1.2, 0.0),  # exp overflows, the clipped term does not
        (200.0, 0.0, 0.0, 0.0),
        (-200.0, -1.0, 0.8, 0.0),
        (200.0, -1.0, INF, INF),
    ],
)
def test_policy_terms_by_hand(q, advantage, loss, slope, backend):
    one = torch.ones(1, 1)
    args = q * one, 0 * one, advantage * one, one.bool()
    found_loss, found_slope = run(surrogate, args, backend=backend)
    assert found_loss.item() == pytest.approx(loss)
    assert found_slope.item() == pytest.approx(slope)


@backends
@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [
        (0.25, 1.0, 0.28125, -0.75),
        (1.0, 2.0, 1.125, 0.0),  # clipped to 0.5, which is further away
        (1.0, 0.0, 0.5, 1.0),
        (-1.0, 2.0, 4.5, -3.0),
        (1.0, 0.75, 0.03125, 0.25),  # equally far: the plain error counts
    ],
)
def test_value_terms_by_hand(value, target, loss, slope, backend):
    one = torch.ones(1, 1)
    args = value * one, 0 * one, target * one, one.bool()
    found = run(value_loss, args, clip=0.5, backend=backend)
    assert [x.item() for x in found] == [loss, slope]


@backends
@losses
@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_at_an_action_token_is_never_plausible(where, loss_of, backend):
    args = [torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3).bool()]
    args[where][1, 1] = NAN
    loss, gradient = run(loss_of, args, backend=backend)
    assert loss.isnan()
    gradient[1, 1] = 0
    assert gradient.isfinite().all()


@backends
@losses
@aggregations
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 4)])
def test_no_action_token(shape, aggregation, loss_of, backend):
    nan, none = torch.full(shape, NAN), torch.zeros(shape, dtype=torch.bool)
    args = nan, nan, nan, none
    loss, gradient = run(loss_of, args, aggregation=aggregation, backend=backend)
    assert loss.item() == 0.0
    assert torch.equal(gradient, torch.zeros(shape))


@backends
@losses
def test_the_other_inputs_are_constants(loss_of, backend):
    case = CASES["full"]
    *tensors, mask = draw(case)
    tensors = [x.requires_grad_() for x in tensors]
    loss_of(*tensors, mask, cu_seqlens=case.cu_seqlens, backend=backend).backward()
    assert [x.grad is not None for x in tensors] == [True, False, False]
    frozen = loss_of(
        tensors[0].detach(), *tensors[1:], mask, cu_seqlens=case.cu_seqlens, backend=backend
    )
    assert not frozen.requires_grad


@backends
@losses
def test_mixed_storage(loss_of, backend):
    case = CASES["holes"]
    new, old, target, mask = draw(case, torch.bfloat16)
    mixed = run(
        loss_of,
        (new, old.float(), target.half(), mask),
        cu_seqlens=case.cu_seqlens,
        backend=backend,
    )
    assert mixed[0].dtype == torch.float32
    assert mixed[1].dtype == torch.bfloat16


# The policy loss with all of its terms

COEFFICIENTS = {"kl_coef": 0.3, "entropy_coef": 0.05}
FIELDS = "loss", "clip_fraction", "approx_kl", "dlogprobs", "dentropy"


def draw_more(case, dtype=torch.float32, seed=1):
    """ref_logprobs and entropy, as ``draw`` draws."""
    g = torch.Generator().manual_seed(seed)
    ref = draw(case)[1] + 0.2 * torch.randn(case.n_tokens, generator=g)
    entropy = 3 * torch.rand(case.n_tokens, generator=g)
    return [x.to(dtype).masked_fill(~case.mask, NAN) for x in (ref, entropy)]


def whole(logprobs, old, advantages, mask, ref, entropy, *, upstream=1.0, **options):
    """FIELDS, with every term."""
    new, h = (x.detach().requires_grad_() for x in (logprobs, entropy))
    given = {"entropy": h, "ref_logprobs": ref, **COEFFICIENTS}
    out = policy_loss(new, old, advantages, mask, **given, **options)
    assert [x.requires_grad for x in out] == [True, False, False, False, False]
    grads = torch.autograd.grad(upstream * out.loss, (new, h))
    return out.loss.detach(), out.clip_fraction, out.approx_kl, *grads


def naive_whole(case, args, aggregation):
    """What ``whole`` gives of one case, token by token."""
    kl_coef, entropy_coef = COEFFICIENTS.values()
    plain, dlogprobs = naive(case, surrogate, args[:4], 0.2, aggregation)
    # Weights of tokens are the gradients of a loss whose terms are -1 times advantages of -1.
    ones = torch.ones(case.n_tokens, dtype=torch.float64).masked_fill(~case.mask, NAN)
    _, weights = naive(case, surrogate, (ones, ones, -ones, case.mask), 0.2, aggregation)
    new, old, advantages, mask, ref, entropy = (x.tolist() for x in args)
    tokens = [t for t in range(case.n_tokens) if mask[t]]
    loss, clipped, squares, dentropy = plain.item(), 0, 0.0, torch.zeros_like(dlogprobs)
    for t in tokens:
        q, weight = new[t] - ref[t], weights[t].item()
        loss += weight * (kl_coef * (math.exp(-q) - 1 + q) - entropy_coef * entropy[t])
        dlogprobs[t] += weight * kl_coef * (1 - math.exp(-q))
        dentropy[t] = -weight * entropy_coef
        ratio = math.exp(new[t] - old[t])
        clipped += ratio > 1.2 if advantages[t] > 0 else ratio < 0.8
        squares += (new[t] - old[t]) ** 2 / 2
    means = [x / max(len(tokens), 1) for x in (clipped, squares)]
    return *(torch.tensor(x, dtype=torch.float64) for x in (loss, *means)), dlogprobs, dentropy


@small_cases
@aggregations
def test_reference_of_all_terms_is_the_definition(case, aggregation):
    args = *draw(case, torch.float64), *draw_more(case, torch.float64)
    out = whole(*args, cu_seqlens=case.cu_seqlens, aggregation=aggregation)
    torch.testing.assert_close(out, naive_whole(case, args, aggregation))


def test_gradcheck_of_all_terms():
    case = CASES["empty rows"]
    new, *constant, mask = draw(case, torch.float64)
    ref, entropy = draw_more(case, torch.float64)

    def function(new, entropy):
        given = {"entropy": entropy, "ref_logprobs": ref, **COEFFICIENTS}
        return policy_loss(new, *constant, mask, cu_seqlens=case.cu_seqlens, **given).loss

    torch.autograd.gradcheck(function, (new.requires_grad_(), entropy.requires_grad_()))


@case_names
@storage
@aggregations
def test_native_of_all_terms(case, dtype, aggregation):
    args = *draw(case, dtype), *draw_more(case, dtype)
    doubles = [x.double() if x.is_floating_point() else x for x in args]
    options = {"cu_seqlens": case.cu_seqlens, "aggregation": aggregation, "upstream": 3.0}
    truth = whole(*doubles, **options)
    baseline, kernel = (whole(*args, backend=b, **options) for b in BACKENDS)
    for name, *triple in zip(FIELDS, kernel, baseline, truth, strict=True):
        assert_close(*triple, name)
    grids = [case.grid(x, NAN if x.is_floating_point() else False) for x in args]
    padded = whole(*grids, aggregation=aggregation, upstream=3.0)
    for i, (name, a, b) in enumerate(zip(FIELDS, padded, kernel, strict=True)):
        assert torch.equal(case.flat(a) if i > 2 else a, b), name


def test_a_kl_term_near_its_zero_keeps_its_digits():
    """exp(-q) - 1 + q is q^2 / 2 there, which exp(-q) in full would round away."""
    q = torch.tensor([[0.0, 1e-6, -1e-5, 1e-4, -1e-3, 1e-2, -0.3, 0.34, -0.35, 0.4, 20.0, -30.0]])
    for one in q.split(1, dim=1):
        new, zeros = one.clone().requires_grad_(), torch.zeros_like(one)
        out = policy_loss(new, one, zeros, zeros == 0, ref_logprobs=zeros, kl_coef=1.0)
        (gradient,) = torch.autograd.grad(out.loss, new)
        found = torch.stack([out.loss.detach().double(), gradient.double().sum()])
        exact = one.double().sum()
        truth = torch.stack([torch.expm1(-exact) + exact, -torch.expm1(-exact)])
        torch.testing.assert_close(found, truth, rtol=1e-6, atol=0)


@backends
def test_fields(backend):
    case = CASES["holes"]
    new, old, advantages, mask = draw(case)
    ref, entropy = draw_more(case)
    tensors = [x.requires_grad_() for x in (new, old, advantages, ref, entropy)]
    flat = {"cu_seqlens": case.cu_seqlens, "backend": backend}
    more = {"ref_logprobs": ref, "entropy": entropy}
    plain = policy_loss(new, old, advantages, mask, **flat)
    assert isinstance(plain, PolicyLoss)
    assert plain.entropy is None
    out = policy_loss(new, old, advantages, mask, **more, **flat)
    # Terms of weight 0 are no part of the loss, nor of the graph.
    assert torch.equal(out.loss, plain.loss)
    out.loss.backward()
    assert [x.grad is not None for x in tensors] == [True, False, False, False, False]
    for field, source in ((out.logprobs, new), (out.entropy, entropy)):
        assert not field.requires_grad
        assert field.data_ptr() == source.data_ptr()
    policy_loss(new, old, advantages, mask, **more, **COEFFICIENTS, **flat).loss.backward()
    assert [x.grad is not None for x in tensors] == [True, False, False, False, True]


@pytest.mark.parametrize("op", ["policy_loss", "value_loss", "segment_bradley_terry", "scores"])
def test_a_second_derivative_is_refused(op):
    """By the op that has none, whatever its gradient is used for."""
    x = torch.randn(2, 4).requires_grad_()
    y, mask = torch.randn(2, 2, 4), torch.ones(2, 4, dtype=torch.bool)
    out = {
        "policy_loss": lambda: policy_loss(x, *y, mask).loss,
        "value_loss": lambda: value_loss(x, *y, mask),
        "segment_bradley_terry": lambda: segment_bradley_terry(x, mask).loss,
        "scores": lambda: segment_scores(x, mask).square().sum(),
    }[op]()
    (gradient,) = torch.autograd.grad(out, x, create_graph=True)
    name = "segment_scores" if op == "scores" else op
    with pytest.raises(RuntimeError, match=f"{name}: expected one derivative, got a second one"):
        (gradient * x).sum().backward()


def test_custom_operators():
    case = CASES["holes"]
    new, old, target, mask = draw(case)
    where = mask, case.cu_seqlens
    args = new.requires_grad_(), old, target, *where
    torch.library.opcheck(value_loss_fwd, (*args, 0.2, 1))
    ref, entropy = draw_more(case)
    bounds = -0.2, 0.2, 0.1, 0.01
    for more in ((None, None), (ref, None), (ref, entropy), (ref, entropy.requires_grad_())):
        torch.library.opcheck(policy_loss_fwd, (*args[:3], *more, *where, *bounds, 1))
    new = new.detach()
    weights = value_loss_fwd(new, old, target, *where, 0.2, 1)[1]
    tokens = torch.ones(()), new, old, target
    torch.library.opcheck(value_loss_bwd, (*tokens, *where, 0.2, weights))
    for more in ((None, False), (ref, True)):
        options = *where, *bounds, weights, more[1]
        torch.library.opcheck(policy_loss_bwd, (*tokens, more[0], *options))


@losses
@pytest.mark.parametrize("packed", [True, False])
def test_compiles(packed, loss_of):
    case = CASES["holes"]
    args = list(draw(case))
    if not packed:
        args = [case.grid(x, NAN if x.is_floating_point() else False) for x in args]
    cu_seqlens = case.cu_seqlens if packed else None

    def step(new, old, target, mask, cu_seqlens):
        new = new * 1.5
        return loss_of(new, old, target, mask, cu_seqlens=cu_seqlens) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    plain, traced = (run(f, args, cu_seqlens=cu_seqlens) for f in (step, compiled))
    assert torch.equal(plain[0], traced[0])
    torch.testing.assert_close(plain[1], traced[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kl_coef": 0.1},
            "ref_logprobs: expected a tensor because kl_coef is 0.1, got None; pass",
        ),
        ({"entropy_coef": 0.1}, "entropy: expected a tensor because entropy_coef is 0.1, got None"),
        ({"kl_coef": NAN}, "kl_coef: expected a finite number"),
        ({"entropy_coef": INF}, "entropy_coef: expected a finite number"),
        ({"entropy": torch.ones(1, 3)}, r"entropy: expected shape \[2, 3\] like logprobs, got"),
        ({"ref_logprobs": torch.ones(6)}, r"ref_logprobs: expected shape \[2, 3\] like logprobs"),
    ],
)
def test_errors_of_the_terms(options, message):
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match=message):
        policy_loss(ones, ones, ones, ones.bool(), **options)


@losses
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clip": 0.0}, ValueError, "clip: expected a positive number, got 0.0; pass math.inf"),
        ({"clip": NAN}, ValueError, "clip: expected a positive number, got nan"),
        (
            {"aggregation": "mean"},
            ValueError,
            "aggregation: expected one of token-mean, seq-mean-token-mean, .*, got 'mean'",
        ),
    ],
)
def test_errors(options, error, message, loss_of):
    ones = torch.ones(2, 3)
    with pytest.raises(error, match=message):
        loss_of(ones, ones, ones, ones.bool(), **options)


def test_errors_name_the_argument():
    ones = torch.ones(2, 3)
    mask = ones.bool()
    with pytest.raises(ValueError, match=r"advantages: expected shape \[2, 3\] like logprobs, got"):
        policy_loss(ones, ones, ones[:1], mask)
    with pytest.raises(ValueError, match=r"old_values: expected shape \[2, 3\] like values, got"):
        value_loss(ones, ones[:1], ones, mask)
    with pytest.raises(TypeError, match="mask: expected bool"):
        policy_loss(ones, ones, ones, ones)
    with pytest.raises(TypeError, match="returns: expected float32"):
        value_loss(ones, ones, ones.int(), mask)
