"""Rows that the threads share. A row of more than 32,768 marked tokens is cut into blocks."""

import pytest
import torch
from layouts import Case
from tolerance import assert_close

import segkernels as sk

BLOCK = 32_768
THRESHOLD = 1.0
NAN = float("nan")
NORMALIZER = sk.LocationNormalizer(0.8, 0.5, 0.3, 2.5)


def giant_case(holes: float, lengths: tuple[int, ...]) -> Case:
    g = torch.Generator().manual_seed(0)
    return Case(list(lengths), torch.rand(sum(lengths), generator=g) >= holes)


def draw(case, density, seed=0):
    """entropy, rewards, logprobs, ref_logprobs, values; NaN outside the mask."""
    g = torch.Generator().manual_seed(seed)
    entropy = (torch.rand(case.n_tokens, generator=g) < density) * (2 * THRESHOLD)
    floats = torch.randn(4, case.n_tokens, generator=g)
    return [x.masked_fill(~case.mask, NAN) for x in (entropy, *floats)]


def every_op(inputs, mask, cu_seqlens, backend=None):
    """Exact outputs and rounded ones of all sequence ops."""
    entropy, rewards, logprobs, ref_logprobs, values = inputs
    where = {"cu_seqlens": cu_seqlens, "backend": backend}
    ends = sk.segment_ends(entropy, mask, THRESHOLD, exclude_last=False, **where)
    current = sk.segment_ends(entropy, mask, THRESHOLD, entropy_of="current", **where)
    stream = rewards.clone().requires_grad_(), ends, mask
    bt = sk.segment_bradley_terry(*stream, reduction="sum", margin=None, **where)
    (drewards,) = torch.autograd.grad(bt.loss + bt.scores.sum(), stream[0])
    advantages = sk.segment_advantages(
        *(rewards, ends, logprobs, ref_logprobs, values, mask),
        normalizer=NORMALIZER,
        reduction="mean",
        **where,
    )
    at_once, *rest = sk.segment_ends_and_advantages(
        *(entropy, rewards, logprobs, ref_logprobs, values, mask, THRESHOLD), **where
    )
    new = logprobs.clone().requires_grad_()
    losses = (
        sk.policy_loss(new, ref_logprobs, rewards, mask, **where).loss,
        sk.value_loss(new, values, rewards, mask, **where),
    )
    (dnew,) = torch.autograd.grad(sum(losses), new)
    rounded = [
        *(sk.segment_scores(*stream, **where), bt.loss, bt.scores, drewards),
        sk.scatter_segment_rewards(*stream, spread="last", **where),
        sk.scatter_segment_rewards(*stream, normalizer=NORMALIZER, **where),
        *sk.gae(rewards, values, mask, gamma=1.0, lam=1.0, **where),
        *sk.gae(rewards, values, mask, gamma=0.99, lam=0.95, **where),
        *(*advantages, *rest, *losses, dnew),
    ]
    return [ends, current, at_once], [x.detach() for x in rounded]


@pytest.mark.parametrize(("density", "length"), [(0.1, 1_100_000), (1.0, 150_000), (0.0, 150_000)])
def test_every_op_equals_the_reference(density, length, two_threads):
    case = giant_case(0.2, (5, length, 0, 50_000))
    inputs = draw(case, density)
    exact, kernel = every_op(inputs, case.mask, case.cu_seqlens)
    torch.set_num_threads(1)  # the definitions need not compete for the processor
    same, baseline = every_op(inputs, case.mask, case.cu_seqlens, "reference")
    _, truth = every_op([x.double() for x in inputs], case.mask, case.cu_seqlens)
    for a, b in zip(exact, same, strict=True):
        assert torch.equal(a, b)
    for i, triple in enumerate(zip(kernel, baseline, truth, strict=True)):
        assert_close(*triple, f"output {i}")


@pytest.mark.parametrize("holes", [0.0, 0.3])
def test_threads_and_padding_change_no_bit(holes, two_threads):
    case = giant_case(holes, (5, 3 * BLOCK, 200_000, 2 * BLOCK + 1))
    inputs = draw(case, 0.1)
    once, again = (every_op(inputs, case.mask, case.cu_seqlens) for _ in range(2))
    torch.set_num_threads(1)
    alone = every_op(inputs, case.mask, case.cu_seqlens)
    # Padding in front moves every token, and the grid makes short rows wide.
    width = 777
    grids = [torch.nn.functional.pad(case.grid(x, NAN), (width, 0), value=NAN) for x in inputs]
    mask = torch.nn.functional.pad(case.grid(case.mask, False), (width, 0))
    padded = [
        [case.flat(x[:, width:]) if x.dim() == 2 else x for x in outs]
        for outs in every_op(grids, mask, None)
    ]
    for outs in (again, alone, padded):
        for kind, expected in zip(outs, once, strict=True):
            for i, (a, b) in enumerate(zip(kind, expected, strict=True)):
                assert torch.equal(a, b), f"output {i}"


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1])
@pytest.mark.parametrize("exclude_last", [True, False])
def test_lengths_around_a_block(length, exclude_last, two_threads):
    """Ends stand at the last tokens of blocks and at the first ones; long segments cross blocks."""
    mask = torch.ones(2, length, dtype=torch.bool)
    entropy = torch.zeros(2, length)
    for t in (0, BLOCK - 2, BLOCK - 1, BLOCK, 2 * BLOCK - 1):
        entropy[0, t : t + 1] = 2.0
    rewards = torch.arange(2.0 * length).view(2, length) / length
    for entropy_of in ("next", "current"):
        options = {"entropy_of": entropy_of, "exclude_last": exclude_last}
        ends = sk.segment_ends(entropy, mask, THRESHOLD, **options)
        expected = sk.segment_ends(entropy, mask, THRESHOLD, backend="reference", **options)
        assert torch.equal(ends, expected)
        pay = [
            sk.scatter_segment_rewards(rewards, ends, mask, spread="repeat", backend=backend)
            for backend in ("native", "reference")
        ]
        assert torch.equal(*pay)


def test_the_first_nan_of_a_giant_row_is_named(two_threads):
    case = giant_case(0.0, (3, 4 * BLOCK))
    entropy = torch.zeros(case.n_tokens)
    entropy[torch.tensor([3 * BLOCK, 2 * BLOCK + 7, 3])] = NAN
    with pytest.raises(ValueError, match="got NaN at row 1, position 0;"):
        sk.segment_ends(entropy, case.mask, THRESHOLD, cu_seqlens=case.cu_seqlens)
    with pytest.raises(ValueError, match=f"got NaN at row 1, position {2 * BLOCK + 4};"):
        sk.segment_ends(
            entropy, case.mask, THRESHOLD, cu_seqlens=case.cu_seqlens, entropy_of="current"
        )


def test_every_byte_but_zero_is_true():
    """A change of view makes bool tensors of any bytes; counted as numbers they would overrun."""
    case = giant_case(0.3, (3, 40, BLOCK * 2, 9))
    inputs = draw(case, 0.1)
    expected = every_op(inputs, case.mask, case.cu_seqlens)
    g = torch.Generator().manual_seed(0)
    for low in (2, 255):
        bytes_ = torch.randint(low, 256, case.mask.shape, generator=g, dtype=torch.uint8)
        odd = (bytes_ * case.mask).view(torch.bool)
        for got, kind in zip(every_op(inputs, odd, case.cu_seqlens), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, kind, strict=True))
