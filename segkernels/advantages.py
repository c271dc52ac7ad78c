"""From segment rewards and log-probabilities to advantages."""

from __future__ import annotations

from torch import Tensor

from .backend import choose
from .boundaries import EntropyOf, boundaries_of
from .credit import Credit, Reduction, Spread
from .gae import check_discounts
from .layout import (
    check_bools,
    check_coefficient,
    check_floats,
    check_floats_like,
    constants,
    layout_of,
)
from .native import advantages as native
from .native.rewards import credit_arguments
from .normalizer import Normalizer


def segment_advantages(
    rewards: Tensor,
    ends: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    normalizer: Normalizer | None = None,
    spread: Spread = "even",
    reduction: Reduction = "sum",
    clip: float = 10.0,
    kl_coef: float = 0.01,
    gamma: float = 1.0,
    lam: float = 0.95,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From segment rewards and log-probabilities to advantages, in one pass over the tokens.

    ::

        token_rewards = scatter_segment_rewards(rewards, ends, mask, ...)
        kl = logprobs - ref_logprobs
        advantages, returns = gae(token_rewards - kl_coef * kl, values, mask, ...)

    Source: arXiv 2501.02790, section 3; arXiv 1506.02438.

    Args:
        rewards, ends, normalizer, spread, reduction, clip: as in ``scatter_segment_rewards``.
        logprobs: nats, float like ``rewards``; of each token under the policy that sampled it.
        ref_logprobs: nats, float like ``rewards``; under the reference model.
        values: float like ``rewards``; the value of the state before each token.
        mask: bool like ``rewards``, True at action tokens.
        cu_seqlens: int32 ``[N + 1]``, rows of a flat stream.
        kl_coef: reward per nat, finite.
        gamma, lam: as in ``gae``.
        backend: see ``segkernels.backend``.

    Returns:
        ``(advantages, returns, token_rewards, kl)`` like ``rewards``, fp32 (fp64 when an input is
        fp64); 0 outside the mask. token_rewards are normalised, spread, reduced and clipped, but
        without the KL penalty; kl is per token, in nats, and may be negative. Their rows' sums are
        the score and the KL estimate of a response. Not differentiable.

    Raises:
        ValueError: shapes that disagree; an option out of range.
        TypeError: dtypes that disagree; a normalizer of another type.
        RuntimeError: a running normalizer that was never fitted.
    """
    layout = layout_of("rewards", rewards, cu_seqlens)
    check_floats("rewards", rewards)
    check_bools("ends", ends, "rewards", rewards)
    check_floats_like("logprobs", logprobs, "rewards", rewards)
    check_floats_like("ref_logprobs", ref_logprobs, "rewards", rewards)
    check_floats_like("values", values, "rewards", rewards)
    check_bools("mask", mask, "rewards", rewards)
    credit = Credit(normalizer, spread, reduction, clip)
    check_coefficient("kl_coef", kl_coef)
    check_discounts(gamma, lam)
    chosen = choose("segment_advantages", rewards, logprobs, ref_logprobs, values, backend=backend)
    rewards, logprobs, ref_logprobs, values = constants(rewards, logprobs, ref_logprobs, values)
    if chosen == "reference":
        from .reference import advantages as reference

        tokens = (rewards, ends, logprobs, ref_logprobs, values, mask)
        return reference.segment_advantages(
            *tokens, layout, credit, kl_coef=kl_coef, gamma=gamma, lam=lam
        )
    return native.segment_advantages_fwd(
        rewards.contiguous(),
        ends.contiguous(),
        logprobs.contiguous(),
        ref_logprobs.contiguous(),
        values.contiguous(),
        mask.contiguous(),
        layout.cu_seqlens,
        *credit_arguments(credit, rewards.device),
        float(kl_coef),
        float(gamma),
        float(lam),
    )


def segment_ends_and_advantages(
    entropy: Tensor,
    rewards: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    threshold: float,
    *,
    cu_seqlens: Tensor | None = None,
    entropy_of: EntropyOf = "next",
    exclude_last: bool | Tensor = True,
    normalizer: Normalizer | None = None,
    spread: Spread = "even",
    reduction: Reduction = "sum",
    clip: float = 10.0,
    kl_coef: float = 0.01,
    gamma: float = 1.0,
    lam: float = 0.95,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``segment_ends`` and ``segment_advantages`` in one pass over the tokens.

    ::

        ends = segment_ends(entropy, mask, threshold, ...)
        advantages, returns, token_rewards, kl = segment_advantages(rewards, ends, ...)

    to the bit, and on a GPU in one launch instead of two.

    Source: arXiv 2501.02790, reward model training and section 3; arXiv 1506.02438.

    Args:
        entropy, threshold, entropy_of, exclude_last: as in ``segment_ends``.
        rewards, logprobs, ref_logprobs, values: float like ``entropy``; as in
            ``segment_advantages``.
        mask: bool like ``entropy``, True at action tokens.
        cu_seqlens: int32 ``[N + 1]``, rows of a flat stream.
        normalizer, spread, reduction, clip, kl_coef, gamma, lam: as in ``segment_advantages``.
        backend: see ``segkernels.backend``.

    Returns:
        ``(ends, advantages, returns, token_rewards, kl)`` like ``entropy``: ends bool, the others
        fp32 (fp64 when rewards, logprobs or values are fp64). False and 0 outside the mask. Not
        differentiable.

    Raises:
        ValueError: shapes that disagree; an option out of range; NaN entropy at an action token
            that is read (CPU tensors, or SEGKERNELS_DEBUG=1), with its row and position.
        TypeError: dtypes that disagree; a normalizer of another type.
        RuntimeError: a running normalizer that was never fitted.
    """
    layout = layout_of("entropy", entropy, cu_seqlens)
    check_floats("entropy", entropy)
    check_floats_like("rewards", rewards, "entropy", entropy)
    check_floats_like("logprobs", logprobs, "entropy", entropy)
    check_floats_like("ref_logprobs", ref_logprobs, "entropy", entropy)
    check_floats_like("values", values, "entropy", entropy)
    check_bools("mask", mask, "entropy", entropy)
    boundaries = boundaries_of(entropy, layout, threshold, entropy_of, exclude_last)
    credit = Credit(normalizer, spread, reduction, clip)
    check_coefficient("kl_coef", kl_coef)
    check_discounts(gamma, lam)
    floats = (entropy, rewards, logprobs, ref_logprobs, values)
    chosen = choose("segment_ends_and_advantages", *floats, backend=backend)
    entropy, rewards, logprobs, ref_logprobs, values = constants(*floats)
    if chosen == "reference":
        from .reference import advantages as reference

        tokens = (rewards, logprobs, ref_logprobs, values, mask)
        return reference.segment_ends_and_advantages(
            entropy, boundaries, *tokens, layout, credit, kl_coef=kl_coef, gamma=gamma, lam=lam
        )
    return native.segment_ends_and_advantages_fwd(
        entropy.contiguous(),
        *boundaries,
        rewards.contiguous(),
        logprobs.contiguous(),
        ref_logprobs.contiguous(),
        values.contiguous(),
        mask.contiguous(),
        layout.cu_seqlens,
        *credit_arguments(credit, rewards.device),
        float(kl_coef),
        float(gamma),
        float(lam),
    )
