"""``linear_logprobs_and_entropy`` and ``linear_policy_loss``, beside the bare matrix products."""

from __future__ import annotations

import eager
import peers
import pytest
import shapes
import torch
from cases import Case, Yardstick, ours, textbook
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import segkernels as sk


def _projection(
    tokens: int, hidden_size: int, vocab: int, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    g = shapes.generator(device, 3)
    hidden = torch.randn(tokens, hidden_size, generator=g, device=device)
    weight = torch.randn(vocab, hidden_size, generator=g, device=device) * (3 / hidden_size**0.5)
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "targets": shapes.targets(tokens, vocab, device),
    }


def _bare(hidden: Tensor, weight: Tensor, products: int) -> Yardstick:
    """The products of the op and nothing else: logits; logits again, dX and dW."""
    hidden, weight = hidden.detach(), weight.detach()
    logits = hidden.new_empty(len(hidden), len(weight))
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def one():
        torch.mm(hidden, weight.t(), out=logits)

    def four():
        one()
        one()
        torch.mm(logits, weight, out=dhidden)
        torch.mm(logits.t(), hidden, out=dweight)

    name, run = {1: ("one bare product", one), 4: ("four bare products", four)}[products]
    run()
    return Yardstick(name, run, products)


CHUNK = 512  # rows: the fp64 logits of 8,192 x 131,072 and what autograd keeps of them pass 80 GB


def _definition(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The reference, chunk by chunk of rows, each computed again in its backward pass."""

    def stats(hidden: Tensor, targets: Tensor):
        return sk.linear_logprobs_and_entropy(hidden, weight, targets, backend="reference")

    parts = [
        checkpoint(stats, *part, use_reentrant=False)
        for part in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return dict(zip(("logprobs", "entropy"), map(torch.cat, zip(*parts, strict=True)), strict=True))


def linear(
    tokens: int,
    hidden_size: int,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    backward: bool = False,
) -> Case:
    inputs = _projection(tokens, hidden_size, vocab, dtype, device)
    g = shapes.generator(device, 5)
    upstream = {
        name: torch.randn(tokens, generator=g, device=device) for name in ("logprobs", "entropy")
    }
    upstream["nll"] = torch.ones((), device=device)
    products = 4 if backward else 1

    def fused(hidden, weight, targets):
        logprobs, entropy = sk.linear_logprobs_and_entropy(hidden, weight, targets)
        return {"logprobs": logprobs, "entropy": entropy}

    def definition(hidden, weight, targets):
        out = _definition(hidden, weight, targets)
        return out | {"nll": -out["logprobs"].mean()}

    return Case(
        op="linear_logprobs_and_entropy",
        shape={"tokens": tokens, "hidden": hidden_size, "vocab": vocab},
        dtype=dtype,
        inputs=inputs,
        definition=definition,
        contenders=[
            ours(fused),
            *textbook(eager.linear_logprobs_and_entropy),
            *peers.linear_logprobs_and_entropy(torch.device(device)),
        ],
        upstream=upstream if backward else {},
        wrt=("hidden", "weight") if backward else (),
        flops=2 * products * tokens * hidden_size * vocab,
        yardstick=_bare(inputs["hidden"], inputs["weight"], products),
    )


def linear_policy_loss(
    rows: int,
    tokens: int,
    hidden_size: int,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    gated: float = 0.0,
) -> Case:
    """Forward and backward with the share ``gated`` of the tokens held by clipping; ours alone
    where that is not 0, because nobody else's time depends on it."""
    count = rows * tokens
    flat = _projection(count, hidden_size, vocab, dtype, device)
    with torch.no_grad():
        logprobs, _ = sk.linear_logprobs_and_entropy(**flat)
    g = shapes.generator(device, 6)
    held = torch.rand(count, generator=g, device=device) < gated
    # Positive and one per row: Liger's loss takes no other, and no sum comes near zero.
    advantages = 0.5 + torch.rand(rows, 1, generator=g, device=device)
    inputs = {
        "hidden": flat["hidden"].unflatten(0, (rows, tokens)),
        "weight": flat["weight"],
        "targets": flat["targets"].unflatten(0, (rows, tokens)),
        "old_logprobs": (logprobs - held.float()).unflatten(0, (rows, tokens)),
        "advantages": advantages.expand(rows, tokens).contiguous(),
        "mask": torch.ones(rows, tokens, dtype=torch.bool, device=device),
    }

    def fused(hidden, weight, targets, old_logprobs, advantages, mask):
        out = sk.linear_policy_loss(hidden, weight, targets, old_logprobs, advantages, mask)
        return {"loss": out.loss}

    def definition(hidden, weight, targets, old_logprobs, advantages, mask):
        new = _definition(hidden.flatten(0, 1), weight, targets.flatten())["logprobs"]
        new = new.view(targets.shape)
        out = sk.policy_loss(new, old_logprobs, advantages, mask, backend="reference")
        return {"loss": out.loss}

    others = [
        *textbook(eager.linear_policy_loss),
        *peers.linear_policy_loss(torch.device(device)),
    ]
    return Case(
        op="linear_policy_loss",
        shape={"tokens": count, "hidden": hidden_size, "vocab": vocab, "gated": gated},
        dtype=dtype,
        inputs=inputs,
        definition=definition,
        contenders=[ours(fused), *([] if gated else others)],
        upstream={"loss": torch.ones((), device=device)},
        wrt=("hidden", "weight"),
        flops=6 * count * hidden_size * vocab,
        yardstick=_bare(flat["hidden"], flat["weight"], 4),
    )


storage = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@storage
def test_linear(side_by_side, dtype):
    side_by_side(linear(256, 1024, 32_000, dtype))


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    # In bf16 fewer: on processors without bf16 arithmetic torch's dX of 256 takes half a minute.
    [(256, torch.float32), (64, torch.bfloat16)],
)
def test_linear_backward(side_by_side, tokens, dtype):
    side_by_side(linear(tokens, 1024, 32_000, dtype, backward=True))


@pytest.mark.parametrize("gated", [0.0, 0.5, 0.9])
def test_linear_policy_loss(side_by_side, gated):
    side_by_side(linear_policy_loss(4, 64, 1024, 32_000, torch.float32, gated=gated))
