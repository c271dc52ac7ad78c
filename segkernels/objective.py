"""PPO's policy objective in plain PyTorch: a token's term, its gradient, their aggregate.

With rho = exp(logprob - old_logprob) and q = logprob - ref_logprob, an action token's term is::

    -min(rho A, clip(rho, 1 - clip, 1 + clip) A) + kl_coef (exp(-q) - 1 + q) - entropy_coef H

The definitions in ``reference`` and the linear form, chunk by chunk, are made of these functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .layout import Layout, each


def log_ratio_bounds(clip: float) -> tuple[float, float]:
    """log(1 - clip) and log(1 + clip); no lower bound where 1 - clip is no ratio."""
    return (math.log1p(-clip) if clip < 1 else -math.inf), math.log1p(clip)


def surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """-min(rho A, clip(rho) A) of each token, elementwise.

    The log of the ratio is held where clipping lets the loss grow no further, so exp cannot
    overflow into 0 * inf for a token whose term is bounded.
    """
    low, high = log_ratio_bounds(clip)
    q = logprobs - old_logprobs
    q = torch.where(advantages >= 0, q.clamp(max=high), q.clamp(min=low))
    return -advantages * q.exp()


def token_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    clip: float,
    kl_coef: float,
    entropy_coef: float,
) -> Tensor:
    """What each token adds to the loss, elementwise."""
    terms = surrogate(logprobs, old_logprobs, advantages, clip)
    if kl_coef and ref_logprobs is not None:
        q = logprobs - ref_logprobs
        terms = terms + kl_coef * (torch.expm1(-q) + q)
    if entropy_coef and entropy is not None:
        terms = terms - entropy_coef * entropy
    return terms


def clipped(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Which tokens have the clipped form as the smaller one, and so no gradient from it."""
    low, high = log_ratio_bounds(clip)
    q = (logprobs - old_logprobs).detach()
    return ((advantages > 0) & (q > high)) | ((advantages < 0) & (q < low))


def squared_log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Half the square: its mean estimates the KL divergence of the two policies."""
    return 0.5 * (logprobs - old_logprobs).detach().square()


@dataclass(frozen=True)
class Objective:
    """The loss as a function of log-probabilities and entropies, with everything else constant."""

    old_logprobs: Tensor  # these four fp32, of one shape; 0 outside the mask
    advantages: Tensor
    ref_logprobs: Tensor | None
    weights: Tensor  # what the aggregation multiplies a token's term with
    clip: float
    kl_coef: float
    entropy_coef: float

    @classmethod
    def of(
        cls,
        old_logprobs: Tensor,
        advantages: Tensor,
        ref_logprobs: Tensor | None,
        mask: Tensor,
        layout: Layout,
        clip: float,
        kl_coef: float,
        entropy_coef: float,
        aggregation: str,
    ) -> Objective:
        old, advantages, ref = each(
            lambda x: x.float().masked_fill(~mask, 0), old_logprobs, advantages, ref_logprobs
        )
        weights = _token_weights(mask, layout, aggregation)
        return cls(old, advantages, ref, weights, clip, kl_coef, entropy_coef)

    def map(self, function: Callable[[Tensor], Tensor]) -> Objective:
        old, advantages, ref, weights = each(
            function, self.old_logprobs, self.advantages, self.ref_logprobs, self.weights
        )
        return replace(
            self, old_logprobs=old, advantages=advantages, ref_logprobs=ref, weights=weights
        )

    def totals(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, clip_fraction, approx_kl)."""
        tokens = (logprobs, self.old_logprobs, self.advantages)
        terms = token_terms(
            *tokens, entropy, self.ref_logprobs, self.clip, self.kl_coef, self.entropy_coef
        )
        loss = (self.weights * terms).sum(dtype=torch.float64).float()
        count = (self.weights > 0).sum().clamp(min=1)
        clip_fraction = clipped(*tokens, self.clip).sum().float() / count
        approx_kl = squared_log_ratio(logprobs, self.old_logprobs).sum() / count
        return loss, clip_fraction, approx_kl

    def grads(self, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """(d loss / d logprobs, d loss / d entropy)."""
        held = clipped(logprobs, self.old_logprobs, self.advantages, self.clip)
        ratio = (logprobs - self.old_logprobs).exp()
        # Not 0 times a ratio, which may be infinite.
        dlogprobs = torch.where(held | (self.advantages == 0), 0, -self.advantages * ratio)
        if self.kl_coef and self.ref_logprobs is not None:
            dlogprobs = dlogprobs - self.kl_coef * torch.expm1(self.ref_logprobs - logprobs)
        return self.weights * dlogprobs, self.weights * -self.entropy_coef


def _token_weights(mask: Tensor, layout: Layout, aggregation: str) -> Tensor:
    """What each token's term is multiplied with, 0 outside the mask; without synchronisation."""
    layout.check_rows()
    if layout.cu_seqlens is None:
        counts = mask.sum(1)
    else:
        before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
        counts = before[layout.cu_seqlens.long()].diff()
    rows = (counts > 0).sum()
    if aggregation == "token-mean":
        share = counts.sum().expand(layout.n_rows)
    elif aggregation == "seq-mean-token-mean":
        share = rows * counts
    else:
        share = rows.expand(layout.n_rows)
    of_row = 1 / share.clamp(min=1).float()
    if layout.cu_seqlens is None:
        of_token = of_row[:, None].expand(mask.shape)
    else:
        of_token = of_row[layout.row_ids(mask.device)]
    return of_token.masked_fill(~mask, 0)
