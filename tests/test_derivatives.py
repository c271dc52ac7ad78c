"""Derivatives of derivatives, and forward mode: every op has the right number, or refuses by name.

The definitions, in fp64, are held to finite differences. A kernel must then agree with its
definition, or raise: a derivative that is silently 0 is the worst of errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import segkernels as sk
from segkernels import backend as backends

ROWS, LENGTH, V, D = 2, 5, 7, 3


def _draw() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tokens = (ROWS, LENGTH)
    mask = torch.tensor([[True, True, True, True, False], [True, True, False, True, True]])
    return {
        "logits": normal(*tokens, V),
        "hidden": normal(*tokens, D),
        "weight": normal(V, D),
        "targets": torch.randint(0, V, tokens, generator=g),
        "rewards": normal(*tokens),
        "values": normal(*tokens),
        "logprobs": -2 + 0.1 * normal(*tokens),
        "old": -2 + 0.1 * normal(*tokens),
        "advantages": normal(*tokens),
        "mask": mask,
        "ends": mask
        & torch.tensor([[True, False, True, True, False], [False, True, False, True, True]]),
    }


DATA = _draw()
SINGLE = {name: x.float() if x.is_floating_point() else x for name, x in DATA.items()}


class Case:
    """An op, differentiated in the input ``name``; ``rest`` are the arguments after that."""

    def __init__(self, op: Callable, name: str, *rest: str, **options: Any) -> None:
        self.op, self.name, self.rest, self.options = op, name, rest, options

    def __call__(self, x: Tensor, data: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        arguments = (data[name] for name in self.rest)
        outputs = self.op(x, *arguments, **self.options, backend=backend)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def bent(self, x: Tensor, data: dict[str, Tensor], backend: str) -> Tensor:
        """A number of which no first derivative is constant."""
        return sum((y.square() + y.sin()).sum() for y in self(x, data, backend))


def _merge(logits: Tensor, targets: Tensor, backend: str) -> Any:
    states = sk.vocab_shard_stats(logits.detach(), targets, 0, backend=backend)
    return sk.merge_vocab_stats(states[None], logits, targets, 0, backend=backend)


def _offsets(entropy: Tensor, mask: Tensor, backend: str) -> Any:
    return sk.segment_offsets((entropy > 0) & mask, mask, backend=backend)


def _collected(rewards: Tensor, ends: Tensor, mask: Tensor, backend: str) -> Tensor:
    normalizer = sk.RunningLocationNormalizer()
    normalizer.update(rewards, ends, mask, backend=backend)
    return torch.tensor(normalizer.state_dict()["batch"]["mean"])


def _ends_and_advantages(rewards: Tensor, *rest: Tensor, backend: str) -> Any:
    entropy, threshold = rewards.detach().abs(), 0.3
    return sk.segment_ends_and_advantages(entropy, rewards, *rest, threshold, backend=backend)


def _policy_loss(*arguments: Any, **options: Any) -> Tensor:
    return sk.policy_loss(*arguments, **options).loss


def _linear_policy_loss(*arguments: Any, **options: Any) -> Tensor:
    return sk.linear_policy_loss(*arguments, **options).loss


TOKENS = ("old", "advantages", "mask")
DIFFERENTIABLE = {
    "entropy_from_logits": Case(sk.entropy_from_logits, "logits"),
    "logprobs_and_entropy": Case(sk.logprobs_and_entropy, "logits", "targets"),
    "linear_logprobs_and_entropy": Case(
        sk.linear_logprobs_and_entropy, "hidden", "weight", "targets"
    ),
    "merge_vocab_stats": Case(_merge, "logits", "targets"),
    "segment_scores": Case(sk.segment_scores, "rewards", "ends", "mask"),
    "segment_bradley_terry": Case(sk.segment_bradley_terry, "rewards", "ends", "mask"),
    "policy_loss": Case(_policy_loss, "logprobs", *TOKENS),
    "value_loss": Case(sk.value_loss, "values", "old", "rewards", "mask", clip=5.0),
    "linear_policy_loss": Case(_linear_policy_loss, "hidden", "weight", "targets", *TOKENS),
}
CONSTANT = {
    "vocab_shard_stats": Case(sk.vocab_shard_stats, "logits", "targets", vocab_start=0),
    "scatter_segment_rewards": Case(sk.scatter_segment_rewards, "rewards", "ends", "mask"),
    "gae": Case(sk.gae, "rewards", "values", "mask"),
    "segment_advantages": Case(
        sk.segment_advantages, "rewards", "ends", "logprobs", "old", "values", "mask"
    ),
    "segment_ends_and_advantages": Case(
        _ends_and_advantages, "rewards", "logprobs", "old", "values", "mask"
    ),
    "whiten": Case(sk.whiten, "rewards", "mask"),
    "RunningLocationNormalizer": Case(_collected, "rewards", "ends", "mask"),
}
DISCRETE = {
    "segment_ends": Case(sk.segment_ends, "rewards", "mask", threshold=0.3),
    "segment_offsets": Case(_offsets, "rewards", "mask"),
}


def test_every_op_is_here():
    assert {*DIFFERENTIABLE, *CONSTANT, *DISCRETE} == set(backends.DEVICES)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_definitions_have_both_derivatives_and_tangents(op):
    case = DIFFERENTIABLE[op]
    x = DATA[case.name].clone().requires_grad_()

    def bent(x):
        return case.bent(x, DATA, "reference")

    assert torch.autograd.gradcheck(bent, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(bent, x)


def _gradient(op: str, backend: str) -> tuple[Tensor, Tensor]:
    """(x, gradient of ``Case.bent`` in it), to be differentiated again."""
    case = DIFFERENTIABLE[op]
    x = SINGLE[case.name].clone().requires_grad_()
    return x, torch.autograd.grad(case.bent(x, SINGLE, backend), x, create_graph=True)[0]


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_kernels_refuse_a_second_derivative(op):
    def second():
        x, gradient = _gradient(op, "native")
        torch.autograd.grad(gradient.sum(), x)

    with pytest.raises(RuntimeError, match=rf"{op}: expected .* (backend=|policy_loss of)"):
        second()


@pytest.mark.parametrize("op", [op for op in DIFFERENTIABLE if op != "linear_policy_loss"])
def test_kernels_give_the_first_derivative_where_it_is_recorded(op):
    torch.testing.assert_close(_gradient(op, "native")[1], _gradient(op, "reference")[1])


def test_inplace_backward_refuses_to_be_recorded():
    x = SINGLE["logits"].clone().requires_grad_()
    entropy = sk.entropy_from_logits(x * 1, inplace_backward=True, backend="native")
    with pytest.raises(RuntimeError, match="entropy_from_logits with inplace_backward=True: exp"):
        torch.autograd.grad(entropy.sum(), x, create_graph=True)


def _dual(function: Callable, x: Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def _jvp(function: Callable, x: Tensor) -> Any:
    return torch.func.jvp(function, (x,), (torch.ones_like(x),))


MODES = pytest.mark.parametrize("forward_mode", [_dual, _jvp])


@MODES
@pytest.mark.parametrize("op", DIFFERENTIABLE | CONSTANT)
def test_tangents_are_refused_where_they_would_be_lost(op, forward_mode):
    case = (DIFFERENTIABLE | CONSTANT)[op]
    for backend in ("native",) if op in DIFFERENTIABLE else ("native", "reference"):

        def function(x, backend=backend):
            return case(x, SINGLE, backend)

        for x in (SINGLE[case.name], SINGLE[case.name].clone().requires_grad_()):
            with pytest.raises(backends.BackendError, match=rf"{op}: expected tensors without ta"):
                forward_mode(function, x)
            function(x)  # without tangents nothing is refused


@pytest.mark.parametrize("op", DISCRETE)
def test_booleans_and_integers_have_no_tangents_to_lose(op):
    case = DISCRETE[op]
    expected = case(SINGLE[case.name], SINGLE, "reference")
    backend = "native" if op == "segment_ends" else "reference"
    got = _dual(lambda x: case(x, SINGLE, backend), SINGLE[case.name])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("op", CONSTANT)
def test_what_is_not_differentiable_is_cut_off(op, backend):
    case = CONSTANT[op]
    x = SINGLE[case.name].clone().requires_grad_()
    assert not any(y.requires_grad for y in case(x, SINGLE, backend))
