"""AdamW over policy and value model, and the schedule of their learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from transformers import get_scheduler

from ..errors import UserError
from .config import PPOConfig
from .models import PolicyAndValue


def make_optimizer(config: PPOConfig, module: PolicyAndValue) -> torch.optim.AdamW:
    """Two groups: the policy with ``learning_rate``, the value model with its own."""
    return torch.optim.AdamW(
        [
            {"params": list(module.policy.parameters()), "lr": config.learning_rate},
            {"params": list(module.value.parameters()), "lr": config.value_learning_rate},
        ],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def make_schedule(
    config: PPOConfig, optimizer: torch.optim.Optimizer, n_updates: int
) -> Callable[[int], list[float]]:
    """Learning rates of the optimizer's groups by update, transformers' schedule over each.

    All schedules are functions of the update alone, so that there is no state to save. Raises
    UserError for ``lr_scheduler_kwargs`` that the schedule does not take.
    """
    warmup = config.warmup_steps
    try:
        scheduler = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=int(warmup) if warmup >= 1 else math.ceil(warmup * n_updates),
            num_training_steps=n_updates,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"lr_scheduler_kwargs: expected what transformers' {config.lr_scheduler_type} takes, "
            f"got {config.lr_scheduler_kwargs}: {error}"
        ) from error
    groups = list(zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True))
    return lambda update: [rate * factor(update) for rate, factor in groups]
