import math

import pytest
import torch
from hypothesis import given, settings
from layouts import CASES, Case, cases

from segkernels import (
    PolicyLoss,
    linear_logprobs_and_entropy,
    linear_policy_loss,
    policy_loss,
)

BACKENDS = ("reference", "native")
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")
VOCAB, SIZE = 13, 6
NAN = float("nan")

backends = pytest.mark.parametrize("backend", BACKENDS)
aggregations = pytest.mark.parametrize("aggregation", AGGREGATIONS)
SMALL = {name: case for name, case in CASES.items() if name != "giant"}
case_names = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())


def draw(case: Case, dtype=torch.float32, seed=0):
    """Inputs of a flat stream; NaN and impossible targets outside the mask."""
    g = torch.Generator().manual_seed(seed)
    n = case.n_tokens
    off = ~case.mask
    hidden = torch.randn(n, SIZE, generator=g, dtype=torch.float64)
    weight = torch.randn(VOCAB, SIZE, generator=g, dtype=torch.float64)
    bias = torch.randn(VOCAB, generator=g, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (n,), generator=g)
    logprobs, _ = linear_logprobs_and_entropy(hidden, weight, targets, bias, 0.9)
    near = [logprobs + torch.randn(n, generator=g, dtype=torch.float64) * 0.3 for _ in range(2)]
    tokens = {
        "hidden": hidden.to(dtype).masked_fill(off[:, None], NAN),
        "targets": targets.masked_fill(off, 10**9),
        "old_logprobs": near[0].to(dtype).masked_fill(off, NAN),
        "ref_logprobs": near[1].to(dtype).masked_fill(off, NAN),
        "advantages": torch.randn(n, generator=g).to(dtype).masked_fill(off, NAN),
        "mask": case.mask,
    }
    return tokens, {"weight": weight.to(dtype), "bias": bias.to(dtype)}


OPTIONS = {"temperature": 0.9, "kl_coef": 0.1, "entropy_coef": 0.05}


def naive(case, tokens, params, aggregation, clip=0.2):
    """(loss, clip_fraction, approx_kl), token by token."""
    rows, clipped, squares, start = [], [], [], 0
    for length in case.lengths:
        terms = []
        for t in range(start, start + length):
            if not case.mask[t]:
                continue
            z = (params["weight"] @ tokens["hidden"][t] + params["bias"]).tolist()
            z = [x / OPTIONS["temperature"] for x in z]
            log_sum = math.log(sum(math.exp(x) for x in z))
            logprob = z[tokens["targets"][t]] - log_sum
            entropy = log_sum - sum(math.exp(x - log_sum) * x for x in z)
            old, ref, a = (
                float(tokens[n][t]) for n in ("old_logprobs", "ref_logprobs", "advantages")
            )
            ratio = math.exp(logprob - old)
            held = min(max(ratio, 1 - clip), 1 + clip)
            q = logprob - ref
            terms.append(
                -min(ratio * a, held * a)
                + OPTIONS["kl_coef"] * (math.exp(-q) - 1 + q)
                - OPTIONS["entropy_coef"] * entropy
            )
            clipped.append(held * a < ratio * a)
            squares.append(0.5 * (logprob - old) ** 2)
        start += length
        if terms:
            rows.append(terms)
    if not rows:
        return 0.0, 0.0, 0.0
    if aggregation == "token-mean":
        loss = sum(map(sum, rows)) / len(clipped)
    elif aggregation == "seq-mean-token-mean":
        loss = sum(sum(r) / len(r) for r in rows) / len(rows)
    else:
        loss = sum(map(sum, rows)) / len(rows)
    return loss, sum(clipped) / len(clipped), sum(squares) / len(squares)


@case_names
@aggregations
def test_token_by_token(case, aggregation):
    tokens, params = draw(case, torch.float64)
    got = linear_policy_loss(
        **tokens, **params, cu_seqlens=case.cu_seqlens, aggregation=aggregation, **OPTIONS
    )
    expected = naive(case, tokens, params, aggregation)
    assert got.loss.item() == pytest.approx(expected[0], rel=1e-9, abs=1e-12)
    assert got.clip_fraction.item() == pytest.approx(expected[1])
    assert got.approx_kl.item() == pytest.approx(expected[2], rel=1e-9)


@backends
@aggregations
@settings(max_examples=15, deadline=None)
@given(case=cases())
def test_plain_part_is_the_policy_loss(backend, aggregation, case):
    tokens, params = draw(case)
    tokens.pop("ref_logprobs")
    kw = {"cu_seqlens": case.cu_seqlens, "clip": 0.1, "aggregation": aggregation}
    got = linear_policy_loss(**tokens, **params, **kw, backend=backend)
    logprobs, entropy = linear_logprobs_and_entropy(
        tokens["hidden"],
        params["weight"],
        tokens["targets"],
        params["bias"],
        mask=case.mask,
        backend=backend,
    )
    plain = policy_loss(
        logprobs, tokens["old_logprobs"], tokens["advantages"], case.mask, **kw, backend=backend
    )
    torch.testing.assert_close(got.loss, plain)
    assert torch.equal(got.logprobs, logprobs)
    assert torch.equal(got.entropy, entropy)


@backends
@aggregations
@case_names
def test_padded_equals_packed(case, aggregation, backend):
    tokens, params = draw(case)
    flat = linear_policy_loss(
        **tokens,
        **params,
        cu_seqlens=case.cu_seqlens,
        aggregation=aggregation,
        backend=backend,
        **OPTIONS,
    )
    grids = {
        name: case.grid(values, NAN)
        for name, values in tokens.items()
        if name not in ("hidden", "targets", "mask")
    }
    columns = [case.grid(column.contiguous(), NAN) for column in tokens["hidden"].unbind(-1)]
    padded = linear_policy_loss(
        hidden=torch.stack(columns, -1),
        targets=case.grid(tokens["targets"], 10**9),
        mask=case.grid(case.mask, False),
        **grids,
        **params,
        aggregation=aggregation,
        backend=backend,
        **OPTIONS,
    )
    torch.testing.assert_close(padded.loss, flat.loss)
    torch.testing.assert_close(case.flat(padded.logprobs), flat.logprobs)
    torch.testing.assert_close(padded.clip_fraction, flat.clip_fraction)
    torch.testing.assert_close(padded.approx_kl, flat.approx_kl)


@backends
def test_gradients(backend):
    """fp32 against the fp64 reference; only the loss carries one."""
    case = CASES["holes"]
    grads = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        tokens, params = draw(case)
        tokens = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tokens.items()}
        params = {k: v.to(dtype).requires_grad_() for k, v in params.items()}
        tokens["hidden"].requires_grad_()
        got = linear_policy_loss(
            **tokens, **params, cu_seqlens=case.cu_seqlens, backend=name, **OPTIONS
        )
        assert isinstance(got, PolicyLoss)
        assert [x.requires_grad for x in got] == [True, False, False, False, False]
        grads.append(torch.autograd.grad(got.loss, (tokens["hidden"], *params.values())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)
    assert (grads[0][0][~case.mask] == 0).all()


def test_gradcheck():
    case = CASES["two tokens"]
    tokens, params = draw(case, torch.float64)
    hidden = tokens.pop("hidden").masked_fill(~case.mask[:, None], 0.0).requires_grad_()
    weight, bias = (t.requires_grad_() for t in params.values())

    def loss(h, w, b):
        return linear_policy_loss(
            h, w, **tokens, bias=b, cu_seqlens=case.cu_seqlens, clip=math.inf, **OPTIONS
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@backends
def test_no_action_token_is_zero(backend):
    case = CASES["no action token"]
    tokens, params = draw(case)
    hidden = tokens["hidden"].requires_grad_()
    got = linear_policy_loss(
        **tokens, **params, cu_seqlens=case.cu_seqlens, backend=backend, **OPTIONS
    )
    assert [got.loss.item(), got.clip_fraction.item(), got.approx_kl.item()] == [0, 0, 0]
    got.loss.backward()
    assert (hidden.grad == 0).all()


HIDDEN, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(5, 4)
TOKENS = torch.zeros(2, 3)


@backends
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"hidden": HIDDEN[:, 1:]},
            ValueError,
            r"hidden: expected shape \[2, 3, 'D'\] to fit targets, got \[2, 2, 4\]; "
            "pass the hidden state that predicts each target",
        ),
        (
            {"old_logprobs": TOKENS[1:]},
            ValueError,
            r"old_logprobs: expected shape \[2, 3\] like targets, got \[1, 3\]; ",
        ),
        ({"advantages": TOKENS.int()}, TypeError, "advantages: expected float32, "),
        (
            {"kl_coef": 0.1},
            ValueError,
            "ref_logprobs: expected a tensor because kl_coef is 0.1, got None; ",
        ),
        (
            {"targets": torch.full((2, 3), -100)},
            ValueError,
            r"targets: expected token ids at action tokens, got -100 at \[0, 0\]; "
            "set the mask to False there",
        ),
        ({"clip": 0.0}, ValueError, "clip: expected a positive number, got 0.0; "),
        ({"aggregation": "mean"}, ValueError, "aggregation: expected one of token-mean, "),
        ({"targets": TOKENS[0].long()}, ValueError, r"targets: expected shape \[rows, tokens\]"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask: expected bool, got torch.float32; "),
    ],
)
def test_errors(backend, change, error, message):
    arguments = {
        "hidden": HIDDEN,
        "weight": WEIGHT,
        "targets": TOKENS.long(),
        "old_logprobs": TOKENS,
        "advantages": TOKENS,
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }
    with pytest.raises(error, match=message):
        linear_policy_loss(**{**arguments, **change}, backend=backend)
