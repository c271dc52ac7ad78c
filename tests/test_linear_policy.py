import math

import pytest
import torch
from backends import NATIVE, REFERENCE, TRITON, Backend
from hypothesis import given, settings
from layouts import CASES, Case, cases
from measure import multiplications, peak_bytes
from tolerance import assert_close

import segkernels.linear_policy
from segkernels import (
    PolicyLoss,
    linear_logprobs_and_entropy,
    linear_policy_loss,
    logprobs_and_entropy,
    native,
    policy_loss,
)
from segkernels.linear_policy import _policy_bwd_, _policy_fwd
from segkernels.projection import Space, add_product

BACKENDS = (REFERENCE, NATIVE)
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")
VOCAB, SIZE = 13, 6
NAN = float("nan")

backends = pytest.mark.parametrize("backend", BACKENDS)
# With gpu_driver: the way of CPUs and the way of GPUs.
drivers = pytest.mark.parametrize("backend", [NATIVE, Backend("triton")])
aggregations = pytest.mark.parametrize("aggregation", AGGREGATIONS)
SMALL = {name: case for name, case in CASES.items() if name != "giant"}
case_names = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())


def draw(case: Case, dtype=torch.float32, seed=0, vocab=VOCAB):
    """Inputs of a flat stream; NaN and impossible targets outside the mask."""
    g = torch.Generator().manual_seed(seed)
    n = case.n_tokens
    off = ~case.mask
    hidden = torch.randn(n, SIZE, generator=g, dtype=torch.float64)
    weight = torch.randn(vocab, SIZE, generator=g, dtype=torch.float64)
    bias = torch.randn(vocab, generator=g, dtype=torch.float64)
    targets = torch.randint(0, vocab, (n,), generator=g)
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
def test_it_is_the_policy_loss_of_what_the_head_says(backend, aggregation, case):
    tokens, params = draw(case)
    kw = {"cu_seqlens": case.cu_seqlens, "clip": 0.1, "aggregation": aggregation}
    kw |= {"kl_coef": OPTIONS["kl_coef"], "entropy_coef": OPTIONS["entropy_coef"]}
    got = linear_policy_loss(**tokens, **params, **kw, backend=backend)
    logprobs, entropy = linear_logprobs_and_entropy(
        tokens["hidden"],
        params["weight"],
        tokens["targets"],
        params["bias"],
        mask=case.mask,
        backend=backend,
    )
    expected = policy_loss(
        logprobs,
        tokens["old_logprobs"],
        tokens["advantages"],
        case.mask,
        entropy=entropy,
        ref_logprobs=tokens["ref_logprobs"],
        **kw,
        backend=None if backend == "triton" else backend,
    )
    for name, a, b in zip(PolicyLoss._fields, got, expected, strict=True):
        if name in ("logprobs", "entropy"):
            assert torch.equal(a, b), name
        else:
            torch.testing.assert_close(a, b)


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


def run(backend, tokens, params, upstream=1.0, **options):
    """(loss, logprobs, entropy, clip_fraction, approx_kl, dhidden, dweight, dbias)."""
    inputs = {**tokens, **params, **OPTIONS, **options}
    inputs = dict(zip(inputs, backend.place(*inputs.values()), strict=True))
    wanted = [inputs[name].detach().clone() for name in ("hidden", *params)]
    inputs.update(zip(("hidden", *params), (t.requires_grad_() for t in wanted), strict=True))
    got = linear_policy_loss(**inputs, backend=backend)
    assert isinstance(got, PolicyLoss)
    assert [x.requires_grad for x in got] == [True, False, False, False, False]
    grads = torch.autograd.grad(got.loss * upstream, wanted)
    return tuple(x.detach().cpu() for x in (*got, *grads))


def through_logits(
    tokens, params, upstream=1.0, cu_seqlens=None, aggregation="token-mean", options=OPTIONS
):
    """What ``run`` gives, from logits that a model computes in its own dtype."""
    wanted = [t.detach().clone().requires_grad_() for t in (tokens["hidden"], *params.values())]
    mask = tokens["mask"]
    logits = torch.nn.functional.linear(*wanted)
    stats = logprobs_and_entropy(
        logits, tokens["targets"], options["temperature"], mask, backend="reference"
    )
    logprobs, entropy = stats
    out = policy_loss(
        logprobs,
        tokens["old_logprobs"],
        tokens["advantages"],
        mask,
        cu_seqlens=cu_seqlens,
        entropy=entropy,
        ref_logprobs=tokens["ref_logprobs"],
        kl_coef=options["kl_coef"],
        entropy_coef=options["entropy_coef"],
        aggregation=aggregation,
        backend="reference",
    )
    grads = torch.autograd.grad(out.loss * upstream, wanted)
    return *(x.detach() for x in out), *grads


def doubles(inputs):
    return {
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in inputs.items()
    }


NAMES = (*PolicyLoss._fields, "dhidden", "dweight", "dbias")


def check_close(kernel, baseline, truth):
    for name, k, b, t in zip(NAMES, kernel, baseline, truth, strict=True):
        if k.dim():
            assert_close(k, b, t, name)
        else:  # sums whose terms cancel: the baseline may be right by chance
            torch.testing.assert_close(k, b, msg=lambda m, name=name: f"{name}: {m}")


CHUNKS = 12_000  # bytes of a workspace with some forty rows of float32 logits
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
workspaces = pytest.mark.parametrize("workspace", [None, CHUNKS])


@dtypes
@workspaces
@aggregations
@case_names
def test_native_equals_reference(case, aggregation, workspace, dtype):
    tokens, params = draw(case, dtype)
    common = {"upstream": -3.0, "cu_seqlens": case.cu_seqlens, "aggregation": aggregation}
    kernel = run(NATIVE, tokens, params, workspace=workspace, **common)
    baseline = run(REFERENCE, tokens, params, **common)
    check_close(kernel, baseline, run(REFERENCE, doubles(tokens), doubles(params), **common))
    assert (kernel[5][~case.mask] == 0).all()


@dtypes
@workspaces
@pytest.mark.parametrize("case", ["holes", "lengths"])
def test_in_the_dtype_of_the_hidden_states(case, workspace, dtype, gpu_driver):
    """As on GPUs: held to the model's own rounding of logits and of their gradient."""
    case = CASES[case]
    tokens, params = draw(case, dtype)
    common = {"upstream": 2.0, "cu_seqlens": case.cu_seqlens}
    kernel = run(Backend("triton"), tokens, params, workspace=workspace, **common)
    readable = {**tokens, "hidden": tokens["hidden"].nan_to_num()}
    baseline = through_logits(readable, params, **common)
    check_close(kernel, baseline, run(REFERENCE, doubles(tokens), doubles(params), **common))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipped_rows_between_others_in_chunks_and_slices(dtype):
    """Several chunks of the rows and, where the weights are converted, slices of them."""
    case = CASES["holes"]
    tokens, params = draw(case, dtype, vocab=300)
    common = {"cu_seqlens": case.cu_seqlens, "clip": 0.1, "kl_coef": 0.0, "entropy_coef": 0.0}
    kernel = run(NATIVE, tokens, params, workspace=60_000, **common)
    baseline = run(REFERENCE, tokens, params, **common)
    assert 0.2 < kernel[3] < 0.8
    check_close(kernel, baseline, run(REFERENCE, doubles(tokens), doubles(params), **common))


@dtypes
@pytest.mark.parametrize("backend", TRITON)
def test_triton_equals_the_form_from_logits(backend, dtype):
    case = CASES["full"]
    tokens, params = draw(case, dtype)
    common = {"upstream": 2.0, "cu_seqlens": case.cu_seqlens}
    kernel = run(backend, tokens, params, **common)
    readable = {**tokens, "hidden": tokens["hidden"].nan_to_num()}
    baseline = through_logits(readable, params, **common)
    check_close(kernel, baseline, run(REFERENCE, doubles(tokens), doubles(params), **common))


@drivers
@pytest.mark.parametrize(
    ("dtype", "other"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_mixed_dtypes(backend, dtype, other, gpu_driver):
    case = CASES["lengths"]
    tokens, params = draw(case, dtype)
    common = {"cu_seqlens": case.cu_seqlens}
    mixed = {**params, "weight": params["weight"].to(other)}
    kernel = run(backend, tokens, mixed, workspace=CHUNKS, **common)
    assert [x.dtype for x in kernel[5:]] == [dtype, other, dtype]
    if backend == NATIVE:
        baseline = run(REFERENCE, tokens, mixed, **common)
    else:
        readable = {**tokens, "hidden": tokens["hidden"].nan_to_num()}
        like_hidden = {name: p.to(dtype) for name, p in mixed.items()}
        baseline = through_logits(readable, like_hidden, **common)
    check_close(kernel, baseline, run(REFERENCE, doubles(tokens), doubles(mixed), **common))


@backends
def test_grid_with_a_temperature_per_token(backend):
    case = CASES["holes"]
    tokens, params = draw(case)
    g = torch.Generator().manual_seed(5)
    temperature = (torch.rand(case.n_tokens, generator=g) + 0.5).masked_fill(~case.mask, NAN)
    flat = run(
        backend,
        tokens,
        params,
        cu_seqlens=case.cu_seqlens,
        temperature=temperature,
        workspace=CHUNKS,
    )
    grid = {
        name: case.grid(values, NAN)
        for name, values in {**tokens, "temperature": temperature}.items()
        if name not in ("hidden", "targets", "mask")
    }
    columns = [case.grid(column.contiguous(), NAN) for column in tokens["hidden"].unbind(-1)]
    grid["hidden"] = torch.stack(columns, -1)
    grid["targets"] = case.grid(tokens["targets"], 10**9)
    grid["mask"] = case.grid(case.mask, False)
    temperature = grid.pop("temperature")
    padded = run(backend, grid, params, temperature=temperature, workspace=CHUNKS)
    for name, a, b in zip(NAMES, padded, flat, strict=True):
        if name in ("logprobs", "entropy"):
            a = case.flat(a)
        if name == "dhidden":
            a = torch.stack([case.flat(column) for column in a.unbind(-1)], -1)
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@backends
@pytest.mark.parametrize("needs", ["hidden", "weight", "bias"])
@workspaces
def test_partial_gradients(backend, needs, workspace):
    case = CASES["lengths"]
    tokens, params = draw(case, torch.bfloat16)
    common = {"cu_seqlens": case.cu_seqlens, "workspace": workspace}
    everything = dict(
        zip(("hidden", "weight", "bias"), run(backend, tokens, params, **common)[5:], strict=True)
    )
    inputs = {**tokens, **params}
    inputs[needs] = inputs[needs].clone().requires_grad_()
    linear_policy_loss(**inputs, **common, **OPTIONS, backend=backend).loss.backward()
    assert torch.equal(inputs[needs].grad, everything[needs])
    assert [n for n, t in inputs.items() if t.requires_grad] == [needs]


@workspaces
@drivers
def test_no_host_synchronisation(backend, workspace, gpu_driver, capturing):
    case = CASES["lengths"]
    tokens, params = draw(case)
    common = {"cu_seqlens": case.cu_seqlens, "workspace": workspace}
    got = run(backend, tokens, params, **common)
    baseline = run(REFERENCE, tokens, params, **common)
    check_close(got, baseline, run(REFERENCE, doubles(tokens), doubles(params), **common))
    assert (got[5][~case.mask] == 0).all()


def clipped_inputs(share):
    """96 tokens; a share of them has a ratio that clipping holds, the others have an advantage."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(96, SIZE, generator=g)
    weight = torch.randn(VOCAB, SIZE, generator=g)
    targets = torch.randint(0, VOCAB, (96,), generator=g)
    mask = torch.arange(96) % 3 > 0  # 64 tokens
    old, _ = linear_logprobs_and_entropy(hidden, weight, targets)
    held = mask & (mask.cumsum(0) <= share * 64)
    old = old - held.float()
    tensors = {"hidden": hidden, "weight": weight, "targets": targets, "mask": mask}
    return {**tensors, "old_logprobs": old, "advantages": torch.ones(96)}, held


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@workspaces
def test_clipped_and_masked_rows_cost_no_product(share, workspace):
    inputs, held = clipped_inputs(share)
    wanted = [inputs[name].requires_grad_() for name in ("hidden", "weight")]
    call = lambda: linear_policy_loss(  # noqa: E731
        **inputs, cu_seqlens=torch.tensor([0, 96]), workspace=workspace
    )
    cost, got = multiplications(call)
    assert got.clip_fraction == share
    product = SIZE * VOCAB
    assert cost == 64 * product + 2 * (64 - int(held.sum())) * product
    cost, (dhidden, dweight) = multiplications(lambda: torch.autograd.grad(got.loss, wanted))
    assert cost == 0
    gets_some = inputs["mask"] & ~held
    assert torch.equal((dhidden != 0).any(1), gets_some)
    assert (dweight != 0).any() == gets_some.any()
    with torch.no_grad():
        assert multiplications(call)[0] == 64 * product
    advantages = inputs["advantages"].zero_()
    assert multiplications(call)[0] == 64 * product
    assert (advantages == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("gated", "products"), [(0.0, 8), (0.5, 6), (0.9, 2), (1.0, 0)])
@drivers
def test_rows_with_a_gradient_wait_for_a_full_tile(
    backend, gated, products, dtype, gpu_driver, monkeypatch
):
    """Of eight chunks: the fewer rows have a gradient, the fewer products of dW there are."""
    case, chunk, vocab = Case([150, 250], torch.ones(400) > 0), 50, 100
    options = OPTIONS | {"kl_coef": 0.0, "entropy_coef": 0.0}
    common = {"cu_seqlens": case.cu_seqlens}
    tokens, params = draw(case, dtype, vocab=vocab)
    logprobs = through_logits(doubles(tokens), doubles(params), **common, options=options)[1]
    held = torch.rand(400, generator=torch.Generator().manual_seed(1)) < gated
    tokens["old_logprobs"] = (logprobs - held.double()).to(dtype)
    tokens["advantages"] = tokens["advantages"].abs() + 0.1
    of_weight = []

    def counted(out, a, b, start):
        of_weight.append(len(out) == vocab)
        add_product(out, a, b, start)

    monkeypatch.setattr(segkernels.linear_policy, "add_product", counted)
    monkeypatch.setattr(Space, "chunk", lambda *_: chunk)
    kernel = run(backend, tokens, params, **common, **options)
    assert sum(of_weight) <= products
    reference = run(REFERENCE, tokens, params, **common, **options)
    assert torch.equal((kernel[5] != 0).any(1), ~held)
    through = through_logits(tokens, params, **common, options=options)
    baseline = reference if backend == NATIVE else through
    truth = run(REFERENCE, doubles(tokens), doubles(params), **common, **options)
    check_close(kernel, baseline, truth)


@dtypes
def test_rows_of_logits_are_aligned_on_gpus(dtype, gpu_driver, monkeypatch):
    """Whatever the vocabulary, rows start at multiples of 64 elements; dlogits take their place."""
    strides = set()

    def seen(rows, *arguments):
        strides.update(x.stride(0) for x in (rows.logits, arguments[-1]))
        backward(rows, *arguments)

    backward = native.vocab.backward
    monkeypatch.setattr(native.vocab, "backward", seen)
    case = CASES["holes"]
    tokens, params = draw(case, dtype, vocab=131)
    common = {"cu_seqlens": case.cu_seqlens}
    kernel = run(Backend("triton"), tokens, params, **common)
    assert strides == {192}
    readable = {**tokens, "hidden": tokens["hidden"].nan_to_num()}
    baseline = through_logits(readable, params, **common)
    check_close(kernel, baseline, run(REFERENCE, doubles(tokens), doubles(params), **common))


def test_scaled_in_place_and_differentiated_once():
    case = CASES["holes"]
    tokens, params = draw(case)
    wanted = [tokens["hidden"].requires_grad_(), params["weight"].requires_grad_()]

    def loss():
        return linear_policy_loss(**tokens, **params, cu_seqlens=case.cu_seqlens, **OPTIONS).loss

    once = torch.autograd.grad(loss(), wanted)
    again = loss()
    scaled = torch.autograd.grad(again, wanted, torch.tensor(-4.0), retain_graph=True)
    for a, b in zip(once, scaled, strict=True):
        assert torch.equal(a * -4, b)
    with pytest.raises(RuntimeError, match="linear_policy_loss: expected one backward pass, got"):
        torch.autograd.grad(again, wanted)
    for a, b in zip(once, scaled, strict=True):
        assert torch.equal(a * -4, b)


def test_the_scale_of_the_loss_is_not_rounded_with_the_gradient():
    """A third is 0.2 % off in bfloat16: enough to show in every element."""
    case = CASES["holes"]
    tokens, params = draw(case, torch.bfloat16)
    common = {"cu_seqlens": case.cu_seqlens}
    whole, third = (run(NATIVE, tokens, params, up, **common)[6] for up in (1.0, 1 / 3))
    assert torch.equal(third, (whole.double() / 3).bfloat16())


def test_bf16_autocast_changes_nothing():
    case = CASES["holes"]
    tokens, params = draw(case)
    plain = run(NATIVE, tokens, params, cu_seqlens=case.cu_seqlens)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(NATIVE, tokens, params, cu_seqlens=case.cu_seqlens)
    for a, b in zip(plain, inside, strict=True):
        assert torch.equal(a, b)


def test_second_derivative_is_refused():
    case = CASES["two tokens"]
    tokens, params = draw(case)
    hidden = tokens["hidden"].requires_grad_()
    loss = linear_policy_loss(**tokens, **params, cu_seqlens=case.cu_seqlens, **OPTIONS).loss
    with pytest.raises(RuntimeError, match="linear_policy_loss: expected create_graph=False, got"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_many_chunks_do_not_round_a_half_precision_gradient_as_often(monkeypatch):
    """Chunks of one row would round it 1,500 times; slices of the vocabulary round it once."""
    case = CASES["lengths"]
    tokens, params = draw(case, torch.bfloat16)
    common = {"cu_seqlens": case.cu_seqlens, "aggregation": "seq-mean-token-sum"}
    truth = run(REFERENCE, doubles(tokens), doubles(params), **common)[6]
    baseline = run(REFERENCE, tokens, params, **common)[6]
    assert_close(run(NATIVE, tokens, params, workspace=600, **common)[6], baseline, truth)
    monkeypatch.setattr(segkernels.linear_policy, "MOST_ROUNDINGS", 10**6)
    monkeypatch.setattr(segkernels.linear_policy, "FEWEST_ROWS", 1)
    rounded = run(NATIVE, tokens, params, workspace=600, **common)[6]
    with pytest.raises(AssertionError, match="error"):
        assert_close(rounded, baseline, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@drivers
def test_extra_memory_is_bounded(backend, dtype, gpu_driver):
    """600 rows of 20,000 logits would have 48 MB."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 64, generator=g).to(dtype)
    hidden = (hidden.float() if backend == "triton" else hidden).requires_grad_()
    weight = (torch.randn(20_000, 64, generator=g) * 0.1).to(dtype).requires_grad_()
    tokens = {
        "targets": torch.randint(0, 20_000, (600,), generator=g),
        "old_logprobs": torch.full((600,), -9.0),
        "advantages": torch.randn(600, generator=g),
        "mask": torch.rand(600, generator=g) < 0.9,
        "cu_seqlens": torch.tensor([0, 600]),
    }

    def both_passes():
        got = linear_policy_loss(hidden, weight, **tokens, workspace=8 << 20, backend=backend)
        return torch.autograd.grad(got.loss, (hidden, weight))

    peak, grads = peak_bytes(both_passes)
    gradients = sum(g.nbytes for g in grads)
    assert gradients < peak < gradients + (8 << 20)


@pytest.mark.parametrize("backend", TRITON[1:])
def test_cuda_graph(backend):
    case = CASES["response"]
    tokens, params = draw(case, torch.bfloat16)
    common = {"cu_seqlens": case.cu_seqlens, "workspace": CHUNKS // 2}
    inputs = {**tokens, **params, **OPTIONS, **common}
    inputs = dict(zip(inputs, backend.place(*inputs.values()), strict=True))
    inputs["hidden"].nan_to_num_()
    wanted = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    advantages = inputs["advantages"].clone()
    inputs["advantages"].zero_()

    def both_passes():
        got = linear_policy_loss(**inputs, backend=backend)
        return *got, *torch.autograd.grad(got.loss, wanted)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both_passes()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both_passes()
    inputs["advantages"].copy_(advantages)
    graph.replay()
    got = [x.detach().cpu() for x in got]
    readable = {**tokens, "hidden": tokens["hidden"].nan_to_num()}
    baseline = through_logits(readable, params, cu_seqlens=case.cu_seqlens)
    check_close(got, baseline, run(REFERENCE, doubles(tokens), doubles(params), **common))


def op_arguments(case, dtype=torch.float32, needs=(True, True, True), workspace=CHUNKS):
    tokens, params = draw(case, dtype)
    floats = [tokens["hidden"], params["weight"], params["bias"]]
    floats = [t.requires_grad_(need) for t, need in zip(floats, needs, strict=True)]
    rest = (tokens[n] for n in ("targets", "old_logprobs", "advantages", "ref_logprobs", "mask"))
    options = (0.9, None, 0.2, 0.1, 0.05, "seq-mean-token-mean")
    return (*floats, list(needs), *rest, case.cu_seqlens, *options, workspace, "native")


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
def test_opcheck(needs):
    arguments = op_arguments(CASES["holes"], needs=needs)
    # Not the graph of both passes that returns the gradients, which the backward pass changes.
    # test_compiles_in_one_graph has the one that there is, where they are seen by nobody else.
    alone = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_policy_fwd, arguments, test_utils=alone)
    constants = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    torch.library.opcheck(_policy_fwd, constants)
    gradients = _policy_fwd(*constants)[5:]
    torch.library.opcheck(_policy_bwd_, (torch.tensor(2.0), *gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compiles_in_one_graph(dtype):
    case = CASES["holes"]
    tokens, params = draw(case, dtype)
    hidden = tokens.pop("hidden").masked_fill(~case.mask[:, None], 0)
    cu_seqlens = case.cu_seqlens

    def loss(h, w, b):
        got = linear_policy_loss(h * 2, w, **tokens, bias=b, cu_seqlens=cu_seqlens, **OPTIONS)
        return got.loss * 3, got.approx_kl

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = [t.detach().clone().requires_grad_() for t in (hidden, *params.values())]
        value, approx_kl = function(*inputs)
        results.append((value, approx_kl, *torch.autograd.grad(value, inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


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
        ({"workspace": -1}, ValueError, "workspace: expected a positive number of bytes, got -1; "),
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
