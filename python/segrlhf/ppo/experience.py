"""What PPO learns from: rollouts and what their tokens were worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from segkernels import LocationNormalizer, RunningLocationNormalizer
from segkernels.normalizer import ScalarNormalizer

from ..errors import UserError
from .config import PPOConfig
from .rollout import Rollout


@dataclass(frozen=True)
class Experience:
    """One process's share of a batch of rollouts, and what PPO learns from; all ``[B, T]``."""

    prompts: list[int]  # index of each row's prompt
    rollout: Rollout
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


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
    if config.normalizer == "line":
        return LocationNormalizer(*(config.normalizer_line or ()))
    if config.normalizer == "scalar":
        return ScalarNormalizer(*(config.normalizer_scalar or ()))
    return RunningLocationNormalizer() if config.normalizer == "running" else None
