"""From segment rewards and log-probabilities to advantages, plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..boundaries import Boundaries
from ..credit import Credit
from ..layout import Layout
from ._actions import accumulation_dtype, actions
from .gae import dense_gae
from .rewards import token_rewards
from .segments import segment_ends


def segment_advantages(
    rewards: Tensor,
    ends: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    layout: Layout,
    credit: Credit,
    *,
    kl_coef: float,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acts = actions(mask, layout)
    dtype = accumulation_dtype(rewards, logprobs, ref_logprobs, values)
    paid = token_rewards(rewards, ends, acts, dtype, credit)
    kl = acts.take(logprobs).to(dtype) - acts.take(ref_logprobs).to(dtype)
    v = acts.take(values).to(dtype)
    advantages, returns = dense_gae(paid - kl_coef * kl, v, acts, gamma, lam)
    return acts.put(advantages), acts.put(returns), acts.put(paid), acts.put(kl)


def segment_ends_and_advantages(
    entropy: Tensor,
    boundaries: Boundaries,
    rewards: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    layout: Layout,
    credit: Credit,
    *,
    kl_coef: float,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ends = segment_ends(entropy, mask, layout, boundaries)
    tokens = (rewards, ends, logprobs, ref_logprobs, values, mask)
    return ends, *segment_advantages(*tokens, layout, credit, kl_coef=kl_coef, gamma=gamma, lam=lam)
