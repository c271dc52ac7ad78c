"""What PPO learns from: the scores of rollouts, and the advantages of their tokens."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from segkernels import (
    RunningLocationNormalizer,
    scatter_segment_rewards,
    segment_advantages,
    whiten,
)

from ..errors import UserError
from .config import PPOConfig
from .rollout import Rollout


@dataclass(frozen=True)
class TokenScores:
    """What the models say of the tokens of B rollouts, fp32 ``[B, T]``; read at actions only."""

    logprobs: Tensor  # nats, of the policy that sampled them
    ref_logprobs: Tensor  # nats, of the reference policy
    values: Tensor  # of the state before each token
    rewards: Tensor  # the reward model's output after reading each token
    entropy: Tensor | None  # nats, of what produced each token; None unless segments are cut by it


@dataclass(frozen=True)
class Experience(TokenScores):
    """One process's share of a batch of rollouts with all that PPO learns from, ``[B, T]``."""

    prompts: list[int]  # index of each row's prompt
    rollout: Rollout
    ends: Tensor  # bool, of the segments
    token_rewards: Tensor  # before the KL penalty
    kl: Tensor  # logprobs - ref_logprobs
    advantages: Tensor
    returns: Tensor

    def rows(self, part: slice) -> Experience:
        """Some of the rows, no wider than the longest of them."""
        rollout = self.rollout.rows(part)
        width = rollout.input_ids.shape[1]
        fields = {k: x[part, :width] for k, x in vars(self).items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, prompts=self.prompts[part], rollout=rollout, **fields)


def make_experience(
    config: PPOConfig,
    prompts: list[int],
    rollout: Rollout,
    scores: TokenScores,
    ends: Tensor,
    normalizer: Any,
    kl_coef: float,
) -> Experience:
    """Token rewards, KL and advantages of scored rollouts; a running normaliser learns from them.

    Every process must call this: advantages are whitened over all of them.
    """
    mask = rollout.action_mask
    if isinstance(normalizer, RunningLocationNormalizer):
        normalizer.update(scores.rewards, ends, mask)
        normalizer.all_reduce()
        normalizer.refit()
    rewards, paid_ends, credit = apply_reward_rules(
        config, scores.rewards, ends, rollout, normalizer
    )
    advantages, returns, token_rewards, kl = segment_advantages(
        rewards,
        paid_ends,
        scores.logprobs,
        scores.ref_logprobs,
        scores.values,
        mask,
        kl_coef=kl_coef,
        gamma=config.gamma,
        lam=config.lam,
        **credit,
    )
    if isinstance(normalizer, RunningLocationNormalizer):
        normalizer.check()
    return Experience(
        **vars(scores),
        prompts=prompts,
        rollout=rollout,
        ends=ends,
        token_rewards=token_rewards,
        kl=kl,
        advantages=whiten(advantages, mask) if config.whiten_advantages else advantages,
        returns=returns,
    )


def apply_reward_rules(
    config: PPOConfig, rewards: Tensor, ends: Tensor, rollout: Rollout, normalizer: Any
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Rewards, ends and options for ``segment_advantages`` under the rules of the config.

    Without special rules these are the reward model's own. Otherwise the rules make token
    rewards, each of which is then a segment that is paid as it stands.
    """
    mask, clip = rollout.action_mask, config.reward_clip
    final, by_length = config.reward_credit == "final", config.reward_reduction == "token-mean"
    penalty, limit = config.missing_eos_penalty, config.overlong_tokens
    credit = {
        "normalizer": normalizer,
        "spread": config.reward_spread,
        "reduction": config.reward_reduction,
        "clip": clip,
    }
    if not final and not by_length and penalty is None and limit is None:
        return rewards, ends, credit
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    lengths = mask.sum(1, keepdim=True)
    if final:
        credit |= {"spread": "last", "reduction": "mean", "clip": math.inf}
    elif by_length:
        credit |= {"reduction": "sum", "clip": math.inf}
    paid = scatter_segment_rewards(rewards, ends, mask, **credit)
    if final:
        paid = torch.where(last, paid.sum(1, keepdim=True).clamp(-clip, clip), 0.0)
    elif by_length:
        paid = (paid / lengths.clamp(min=1)).clamp(-clip, clip)
    if penalty is not None:
        paid = paid - penalty * (last & ~rollout.terminated[:, None])
    if limit is not None:
        overlong = ~rollout.terminated[:, None] | (lengths > limit)
        paid = torch.where(overlong & mask, config.overlong_reward, paid)
    as_it_is = {"normalizer": None, "spread": "last", "reduction": "sum", "clip": math.inf}
    return paid, mask, as_it_is


def build_normalizer(config: PPOConfig, reward_model: Any) -> Any:
    """The normaliser that ``config.normalizer`` names; None for none.

    Raises UserError, naming the command that fits one, when the reward model has none.
    """
    if config.normalizer == "auto":
        if reward_model.normalizer is None:
            raise UserError(
                f"normalizer: expected one in the config of reward model {config.reward_model}, "
                f"got none; run segrlhf fit-normalizer --reward_model {config.reward_model} "
                "--dataset_name <its training pairs>, or choose --normalizer running or none"
            )
        return reward_model.normalizer
    if config.normalizer == "running":
        return RunningLocationNormalizer()
    return config.given_normalizer()
