"""What somebody writes in plain torch: the textbook forms that the ops are compared with.

All sequence functions take right-padded grids [N, T], as training scripts hold them.
"""

from __future__ import annotations

import math

import torch
from shapes import NORMALIZER, THRESHOLD
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

# ---- vocabulary --------------------------------------------------------------------------------


def entropy(logits: Tensor) -> dict[str, Tensor]:
    logp = log_softmax(logits.float(), -1)
    return {"entropy": -(logp.exp() * logp).sum(-1)}


def logprobs_and_entropy(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    logp = log_softmax(logits.float(), -1)
    logprobs = logp.gather(-1, targets[..., None])[..., 0]
    return {"logprobs": logprobs, "entropy": -(logp.exp() * logp).sum(-1)}


def linear_logprobs_and_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    return logprobs_and_entropy(hidden @ weight.t(), targets)


# ---- segments ----------------------------------------------------------------------------------


def segment_ends(entropy: Tensor, mask: Tensor) -> dict[str, Tensor]:
    position = mask.cumsum(1) - 1
    count = mask.sum(1, keepdim=True)
    over = mask & (entropy > THRESHOLD) & (position < count - 1)
    return {"ends": over | (mask & (position == (count - 2).clamp(min=0)))}


def segment_scores(rewards: Tensor, ends: Tensor) -> dict[str, Tensor]:
    return {"scores": (rewards * ends).sum(1) / ends.sum(1).clamp(min=1)}


def segment_bradley_terry(rewards: Tensor, ends: Tensor) -> dict[str, Tensor]:
    scores = segment_scores(rewards, ends)["scores"]
    chosen, rejected = scores.chunk(2)
    return {"loss": -logsigmoid(chosen - rejected).mean(), "scores": scores}


def scatter_segment_rewards(rewards: Tensor, ends: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Even spread, the location-aware line, clipped at 10."""
    count = ends.sum(1, keepdim=True)
    segment = ends.cumsum(1) - ends.long()  # of each token, from 0 in each row
    paid = mask & (segment < count)
    slots = torch.zeros_like(rewards)
    lengths = slots.scatter_add(1, segment.clamp(max=rewards.shape[1] - 1), paid.to(rewards.dtype))
    r = slots.scatter_add(1, segment.clamp(max=rewards.shape[1] - 1), rewards * ends)
    p = (torch.arange(rewards.shape[1], device=rewards.device) + 1) / count.clamp(min=1)
    line = NORMALIZER
    mean = line.mean_slope * p.log() + line.mean_intercept
    std = (line.std_slope * p.log() + line.std_intercept).clamp(min=line.min_std)
    each = (r - mean) / std / lengths.clamp(min=1)
    tokens = each.gather(1, segment.clamp(max=rewards.shape[1] - 1))
    return {"token_rewards": torch.where(paid, tokens, 0.0).clamp(-10, 10)}


def moments_by_position(rewards: Tensor, ends: Tensor, bins: int) -> dict[str, Tensor]:
    """[bins] count, mean and summed squared deviation of the rewards at each relative position."""
    k, count = ends.cumsum(1), ends.sum(1, keepdim=True)
    at = (k.double() / count.clamp(min=1) * bins).round().long().clamp(min=1)[ends] - 1
    r = rewards[ends].double()
    counts = torch.bincount(at, minlength=bins).double()
    mean = torch.bincount(at, r, minlength=bins) / counts.clamp(min=1)
    m2 = torch.bincount(at, (r - mean[at]).square(), minlength=bins)
    return {"count": counts, "mean": mean, "m2": m2}


# ---- advantages --------------------------------------------------------------------------------


def gae_over_time(rewards: Tensor, values: Tensor, mask: Tensor, lam: float = 0.95):
    """One step of all rows at a time, from the last token to the first."""
    keep = mask.to(rewards.dtype)
    next_value = advantage = torch.zeros_like(rewards[:, 0])
    steps = []
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        steps.append(advantage)
    advantages = torch.stack(steps[::-1], 1) * keep
    return {"advantages": advantages, "returns": (advantages + values) * keep}


def gae_matrix(rewards: Tensor, values: Tensor, mask: Tensor, lam: float = 0.95):
    """No loop: the discounted sums are a product with a triangular matrix of powers."""
    keep = mask.to(rewards.dtype)
    next_values = torch.cat([(values * keep)[:, 1:], torch.zeros_like(values[:, :1])], 1)
    deltas = (rewards + next_values - values) * keep
    t = torch.arange(rewards.shape[1], device=rewards.device)
    ahead = t[:, None] - t[None]  # [later, now]
    powers = torch.where(ahead >= 0, lam ** ahead.clamp(min=0).to(rewards.dtype), 0.0)
    advantages = (deltas @ powers) * keep
    return {"advantages": advantages, "returns": (advantages + values) * keep}


def boundaries_to_advantages(gae):
    """Entropies and rewards to advantages, with one of the GAEs above."""

    def run(entropy, rewards, logprobs, ref_logprobs, values, mask):
        ends = segment_ends(entropy, mask)["ends"]
        token_rewards = scatter_segment_rewards(rewards, ends, mask)["token_rewards"]
        kl = (logprobs - ref_logprobs) * mask
        out = gae(token_rewards - 0.01 * kl, values, mask)
        return out | {"ends": ends, "token_rewards": token_rewards, "kl": kl}

    return run


def boundaries_to_advantages_by_token(
    entropy, rewards, logprobs, ref_logprobs, values, mask, lam: float = 0.95
):
    """Python loops over tokens, as training scripts for segment rewards have been written."""
    shape = rewards.shape
    out = {name: torch.zeros(shape) for name in ("advantages", "returns", "token_rewards", "kl")}
    out["ends"] = torch.zeros(shape, dtype=torch.bool)
    for n in range(shape[0]):
        count = int(mask[n].sum())
        ends = [t for t in range(count - 1) if entropy[n, t].item() > THRESHOLD]
        if count and (not ends or ends[-1] != max(count - 2, 0)):
            ends.append(max(count - 2, 0))
        out["ends"][n, ends] = True
        begin = 0
        for k, end in enumerate(ends):
            log_p = math.log((k + 1) / len(ends))
            mean = NORMALIZER.mean_slope * log_p + NORMALIZER.mean_intercept
            std = max(NORMALIZER.std_slope * log_p + NORMALIZER.std_intercept, NORMALIZER.min_std)
            paid = (rewards[n, end] - mean) / std / (end + 1 - begin)
            for t in range(begin, end + 1):
                out["token_rewards"][n, t] = paid.clamp(-10, 10)
            begin = end + 1
        next_value = advantage = 0.0
        for t in range(count - 1, -1, -1):
            kl = logprobs[n, t] - ref_logprobs[n, t]
            delta = out["token_rewards"][n, t] - 0.01 * kl + next_value - values[n, t]
            advantage = delta + lam * advantage
            next_value = values[n, t]
            out["kl"][n, t], out["advantages"][n, t] = kl, advantage
            out["returns"][n, t] = advantage + values[n, t]
    return out


def whiten(x: Tensor, mask: Tensor) -> dict[str, Tensor]:
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean).square() * mask).sum() / count
    return {"white": torch.where(mask, (x - mean) * (variance + 1e-8).rsqrt(), 0.0)}


# ---- losses ------------------------------------------------------------------------------------


def policy_loss(logprobs, old_logprobs, advantages, mask, clip: float = 0.2):
    ratio = (logprobs - old_logprobs).exp()
    held = ratio.clamp(1 - clip, 1 + clip)
    terms = -torch.minimum(ratio * advantages, held * advantages)
    return {"loss": (terms * mask).sum() / mask.sum()}


def value_loss(values, old_values, returns, mask, clip: float = 0.2):
    held = old_values + (values - old_values).clamp(-clip, clip)
    terms = 0.5 * torch.maximum((values - returns).square(), (held - returns).square())
    return {"loss": (terms * mask).sum() / mask.sum()}


def linear_policy_loss(hidden, weight, targets, old_logprobs, advantages, mask):
    logp = log_softmax((hidden @ weight.t()).float(), -1)
    logprobs = logp.gather(-1, targets[..., None])[..., 0]
    return policy_loss(logprobs, old_logprobs, advantages, mask)
