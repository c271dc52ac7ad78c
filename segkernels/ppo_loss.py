"""PPO's policy and value losses."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from torch import Tensor

from .backend import choose
from .layout import (
    Layout,
    check_bools,
    check_coefficient,
    check_floats,
    check_like,
    constants,
    each,
    layout_of,
    number,
)
from .native import ppo_loss as native
from .objective import log_ratio_bounds

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)  # in the order of segk::Aggregation


class PolicyLoss(NamedTuple):
    """A policy loss with what it was made of; only ``loss`` carries a gradient."""

    loss: Tensor  # []
    logprobs: Tensor  # stream, nats
    entropy: Tensor | None  # stream, nats; None where it was not given
    clip_fraction: Tensor  # [], share of the action tokens whose ratio is held by clipping
    approx_kl: Tensor  # [], mean over action tokens of (logprob - old_logprob)^2 / 2, nats


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    clip: float = 0.2,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    aggregation: Aggregation = "token-mean",
    backend: str | None = None,
) -> PolicyLoss:
    """The clipped surrogate of PPO, with a KL penalty and an entropy bonus where they are wanted.

    With rho = exp(logprobs - old_logprobs) and q = logprobs - ref_logprobs the term of an action
    token is::

        -min(rho A, clip(rho, 1 - clip, 1 + clip) A) + kl_coef (exp(-q) - 1 + q) - entropy_coef H

    The gradient of the surrogate in logprobs is -rho A, or 0 where the clipped form is the smaller
    one; that of the KL term is kl_coef (1 - exp(-q)). ``aggregation``: "token-mean" is the mean
    over all action tokens; "seq-mean-token-mean" the mean over rows of each row's mean;
    "seq-mean-token-sum" the mean over rows of each row's sum. Rows without an action token are not
    counted; without any the loss is 0 with zero gradient. A second derivative is refused.

    Source: arXiv 1707.06347, equation 7; arXiv 2501.02790 aggregates by seq-mean-token-mean. The KL
    term is the k3 estimator of http://joschu.net/blog/kl-approx.html.

    Args:
        logprobs: nats, float ``[N, T]``, or ``[T]`` with ``cu_seqlens``; of each token under the
            policy in training.
        old_logprobs: nats, float like ``logprobs``; under the policy that sampled it. A constant.
        advantages: float like ``logprobs``. A constant.
        mask: bool like ``logprobs``, True at action tokens.
        cu_seqlens: int32 ``[N + 1]``, rows of a flat stream.
        clip: positive; ``math.inf`` clips nothing.
        entropy: H, nats, float like ``logprobs``; needed where ``entropy_coef`` is not 0.
        ref_logprobs: nats, float like ``logprobs``; needed where ``kl_coef`` is not 0. A constant.
        kl_coef: weight of the KL term.
        entropy_coef: weight of the entropy bonus.
        aggregation: see above.
        backend: see ``segkernels.backend``.

    Returns:
        ``PolicyLoss``. ``loss``, ``clip_fraction`` and ``approx_kl`` are ``[]``, fp32 (fp64 when an
        input is fp64); ``loss`` is differentiable in ``logprobs`` and ``entropy``, and NaN when an
        input is NaN at an action token. ``logprobs`` and ``entropy`` are those given, detached.

    Raises:
        ValueError: shapes that disagree; an unknown aggregation; a clip that is not positive;
            ``kl_coef`` without ``ref_logprobs``; ``entropy_coef`` without ``entropy``.
        TypeError: dtypes that disagree.
    """
    optional = [("ref_logprobs", ref_logprobs), ("entropy", entropy)]
    layout = _check(
        ("logprobs", logprobs),
        [
            ("old_logprobs", old_logprobs),
            ("advantages", advantages),
            *((name, tensor) for name, tensor in optional if tensor is not None),
        ],
        mask,
        cu_seqlens,
        clip,
        aggregation,
    )
    check_kl_coef(kl_coef, ref_logprobs)
    check_coefficient("entropy_coef", entropy_coef)
    if entropy_coef and entropy is None:
        raise ValueError(
            f"entropy: expected a tensor because entropy_coef is {entropy_coef}, got None; pass "
            "the policy's entropies, or entropy_coef=0"
        )
    old_logprobs, advantages = constants(old_logprobs, advantages)
    ref = ref_logprobs.detach() if ref_logprobs is not None and kl_coef else None
    h = entropy if entropy_coef else None
    tensors = (logprobs, old_logprobs, advantages, ref, h)
    if choose("policy_loss", *tensors, backend=backend) == "reference":
        from .reference import ppo_loss as reference

        loss, clip_fraction, approx_kl = reference.policy_loss(
            *tensors,
            mask,
            layout,
            clip=clip,
            kl_coef=kl_coef,
            entropy_coef=entropy_coef,
            aggregation=aggregation,
        )
    else:
        loss, clip_fraction, approx_kl, _ = native.policy_loss_fwd(
            *each(Tensor.contiguous, *tensors),
            mask.contiguous(),
            layout.cu_seqlens,
            *log_ratio_bounds(clip),
            float(kl_coef),
            float(entropy_coef),
            AGGREGATIONS.index(aggregation),
        )
    detached = None if entropy is None else entropy.detach()
    return PolicyLoss(loss, logprobs.detach(), detached, clip_fraction, approx_kl)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    clip: float = 0.2,
    aggregation: Aggregation = "token-mean",
    backend: str | None = None,
) -> Tensor:
    """The clipped value loss of PPO.

    With V' = clip(V, V_old - clip, V_old + clip) the term of an action token is::

        0.5 max((V - R)^2, (V' - R)^2)

    Its gradient in V is V - R, or 0 where the clipped form is the larger one. ``aggregation`` and
    rows without action tokens as in ``policy_loss``. A second derivative is refused.

    Source: the value clipping of OpenAI baselines' PPO2, as in TRL and verl.

    Args:
        values: V, float ``[N, T]``, or ``[T]`` with ``cu_seqlens``.
        old_values: V_old, float like ``values``; at the time of the rollout. A constant.
        returns: R, float like ``values``. A constant.
        mask: bool like ``values``, True at action tokens.
        cu_seqlens: int32 ``[N + 1]``, rows of a flat stream.
        clip: positive; ``math.inf`` clips nothing.
        aggregation: see ``policy_loss``.
        backend: see ``segkernels.backend``.

    Returns:
        ``[]``, fp32 (fp64 when an input is fp64), differentiable in ``values``. NaN when an input
        is NaN at an action token.

    Raises:
        ValueError: shapes that disagree; an unknown aggregation; a clip that is not positive.
        TypeError: dtypes that disagree.
    """
    layout = _check(
        ("values", values),
        [("old_values", old_values), ("returns", returns)],
        mask,
        cu_seqlens,
        clip,
        aggregation,
    )
    old_values, returns = constants(old_values, returns)
    if choose("value_loss", values, old_values, returns, backend=backend) == "reference":
        from .reference import ppo_loss as reference

        return reference.value_loss(
            values, old_values, returns, mask, layout, clip=clip, aggregation=aggregation
        )
    loss, _ = native.value_loss_fwd(
        values.contiguous(),
        old_values.contiguous(),
        returns.contiguous(),
        mask.contiguous(),
        layout.cu_seqlens,
        float(clip),
        AGGREGATIONS.index(aggregation),
    )
    return loss


def check_aggregation(aggregation: str) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(
            f"aggregation: expected one of {', '.join(AGGREGATIONS)}, got {aggregation!r}; "
            "'token-mean' weighs every action token the same"
        )


def check_clip(clip: float) -> None:
    if not number("clip", clip) > 0:
        raise ValueError(
            f"clip: expected a positive number, got {clip}; pass math.inf to clip nothing"
        )


def check_kl_coef(kl_coef: float, ref_logprobs: Tensor | None) -> None:
    check_coefficient("kl_coef", kl_coef)
    if kl_coef and ref_logprobs is None:
        raise ValueError(
            f"ref_logprobs: expected a tensor because kl_coef is {kl_coef}, got None; pass the "
            "reference policy's log-probabilities, or kl_coef=0"
        )


def _check(
    new: tuple[str, Tensor],
    others: list[tuple[str, Tensor]],
    mask: Tensor,
    cu_seqlens: Tensor | None,
    clip: float,
    aggregation: str,
) -> Layout:
    layout = layout_of(*new, cu_seqlens)
    check_floats(*new)
    for name, tensor in others:
        check_floats(name, tensor)
        check_like(name, tensor, *new)
    check_bools("mask", mask, *new)
    check_clip(clip)
    check_aggregation(aggregation)
    return layout
