"""The models that PPO trains: the policy and the value model."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segkernels import PolicyLoss

from ..configs import ModelConfig
from ..models.lm_head import policy_loss
from ..models.reward_model import SegmentRewardModel
from .config import PPOConfig


def starting_value_model(
    config: PPOConfig, policy: ModelConfig, reward_model: SegmentRewardModel
) -> SegmentRewardModel:
    """A scalar head at every token, on what ``config.value_model`` names.

    On a language model the head starts at 0; a reward model keeps its own.
    """
    if config.value_model == "reward":
        return copy.deepcopy(reward_model)
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "attn_implementation": policy.attn_implementation,
    }
    if config.value_model == "policy":
        model = SegmentRewardModel.from_causal_lm(
            policy.model_name_or_path,
            "token",
            revision=policy.model_revision,
            trust_remote_code=policy.trust_remote_code,
            **options,
        )
        # Values drawn at random would drown the rewards in the first advantages.
        nn.init.zeros_(model.score.weight)
        return model
    return SegmentRewardModel.from_pretrained(config.value_model, **options)


def state_values(value_model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """``[B, T]``: the value of the state before each token, read at the token in front of it."""
    return F.pad(value_model(input_ids, attention_mask=attention_mask)[:, :-1], (1, 0))


class PolicyAndValue(nn.Module):
    """The two trained models as one module, so that one wrapper of accelerate serves both."""

    policy: Any
    value: Any

    def __init__(self, policy: nn.Module, value: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        self.value = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        action_mask: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        **options: Any,
    ) -> tuple[PolicyLoss, Tensor]:
        """``lm_head.policy_loss`` and the values ``[B, T]``: what an optimizer step needs."""
        # The loss holds the gradient of the head's weight until the backward pass: it comes last.
        values = state_values(self.value, input_ids, attention_mask)
        loss = policy_loss(
            self.policy,
            input_ids,
            attention_mask,
            action_mask,
            old_logprobs,
            advantages,
            **options,
        )
        return loss, values


def without_dropout(model: nn.Module) -> None:
    """Ratios compare two passes over the same tokens, so both must be of the same function."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
