"""PPO's policy loss straight from hidden states and the output projection."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .backend import choose
from .layout import (
    check_bools,
    check_coefficient,
    check_floats,
    check_like,
    layout_of,
    values_may_be_checked,
)
from .linear import check_projection, linear_logprobs_and_entropy
from .ppo_loss import Aggregation, check_aggregation, check_clip
from .reference import linear_policy as reference
from .token_stats import IGNORED


class PolicyLoss(NamedTuple):
    """What ``linear_policy_loss`` returns; only ``loss`` carries a gradient."""

    loss: Tensor  # []
    logprobs: Tensor  # stream, nats
    entropy: Tensor  # stream, nats
    clip_fraction: Tensor  # [], share of the action tokens whose ratio is held by clipping
    approx_kl: Tensor  # [], mean over action tokens of (logprob - old_logprob)^2 / 2, nats


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    clip: float = 0.2,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    aggregation: Aggregation = "token-mean",
    backend: str | None = None,
) -> PolicyLoss:
    """The clipped surrogate of PPO without ever holding the logits of all tokens.

    With logprob and H those of softmax((hidden weight^T + bias) / temperature),
    rho = exp(logprob - old_logprob) and q = logprob - ref_logprob, the term of an action token is::

        -min(rho A, clip(rho, 1 - clip, 1 + clip) A) + kl_coef (exp(-q) - 1 + q) - entropy_coef H

    and the loss their aggregate, as in :func:`segkernels.policy_loss`. Row i of ``hidden`` predicts
    ``targets[i]``: the caller shifts, and everything per token is aligned with ``targets``. Rows
    outside the mask take no part in the products.

    Source: arXiv 1707.06347, equation 7; arXiv 2501.02790 for the surrounding method. The KL term
    is the k3 estimator of http://joschu.net/blog/kl-approx.html.

    Args:
        hidden: last hidden states ``[N, T, D]``, or ``[T, D]`` with ``cu_seqlens``.
        weight: output projection ``[V, D]``.
        targets: token ids ``[N, T]`` or ``[T]``, in [0, V) at action tokens.
        old_logprobs: nats, float like ``targets``; under the policy that sampled it. A constant.
        advantages: float like ``targets``. A constant.
        mask: bool like ``targets``, True at action tokens.
        cu_seqlens: int32 ``[N + 1]``, rows of a flat stream.
        bias: ``[V]`` or None.
        temperature: positive; one float, or a tensor like ``targets``.
        clip: positive; ``math.inf`` clips nothing.
        ref_logprobs: nats, float like ``targets``; needed where ``kl_coef`` is not 0. A constant.
        kl_coef: weight of the KL term.
        entropy_coef: weight of the entropy bonus.
        aggregation: see :func:`segkernels.policy_loss`.
        backend: runs the log-probabilities and the entropy; see ``segkernels.backend``. The rest
            is plain PyTorch on any device.

    Returns:
        ``PolicyLoss``; ``loss`` is differentiable in ``hidden``, ``weight`` and ``bias``, the other
        fields are detached. Without an action token everything is 0.

    Raises:
        ValueError: shapes that disagree; a target out of range or -100 at an action token; an
            unknown aggregation; a clip that is not positive; ``kl_coef`` without ``ref_logprobs``.
        TypeError: dtypes that do not fit.
    """
    layout = layout_of("targets", targets, cu_seqlens)
    check_projection(hidden, weight, bias)
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden: expected shape {[*targets.shape, 'D']} to fit targets, got "
            f"{list(hidden.shape)}; pass the hidden state that predicts each target"
        )
    per_token = [("old_logprobs", old_logprobs), ("advantages", advantages)]
    if ref_logprobs is not None:
        per_token.append(("ref_logprobs", ref_logprobs))
    for name, tensor in per_token:
        check_floats(name, tensor)
        check_like(name, tensor, "targets", targets)
    check_bools("mask", mask, "targets", targets)
    check_clip(clip)
    check_aggregation(aggregation)
    check_coefficient("kl_coef", kl_coef)
    check_coefficient("entropy_coef", entropy_coef)
    if kl_coef and ref_logprobs is None:
        raise ValueError(
            f"ref_logprobs: expected a tensor because kl_coef is {kl_coef}, got None; pass the "
            "reference policy's log-probabilities, or kl_coef=0"
        )
    if values_may_be_checked(targets):
        missing = (mask & (targets == IGNORED)).nonzero()
        if len(missing):
            raise ValueError(
                f"targets: expected token ids at action tokens, got {IGNORED} at "
                f"{missing[0].tolist()}; set the mask to False there"
            )
    name = choose(
        "linear_policy_loss", hidden, weight, bias, old_logprobs, advantages, backend=backend
    )
    logprobs, entropy = linear_logprobs_and_entropy(
        hidden, weight, targets, bias, temperature, mask, backend=name
    )
    assert logprobs is not None
    loss, clip_fraction, approx_kl = reference.policy_terms(
        logprobs,
        entropy,
        old_logprobs.detach(),
        advantages.detach(),
        None if ref_logprobs is None else ref_logprobs.detach(),
        mask,
        layout,
        clip=clip,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        aggregation=aggregation,
    )
    return PolicyLoss(loss, logprobs.detach(), entropy.detach(), clip_fraction, approx_kl)
