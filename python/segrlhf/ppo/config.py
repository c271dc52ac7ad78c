"""Flags of ``segrlhf ppo``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from ..configs import flag
from ..errors import UserError

# What a normaliser's numbers were fitted to.
_REWARDS = ("reward_model", "reward_granularity", "reward_threshold")


@dataclass
class PPOConfig:
    """Flags of ``segrlhf ppo``. Batch sizes count rows over all processes, unless they say not."""

    output_dir: str = flag(..., "Where policy, checkpoints and metrics.jsonl go.")
    reward_model: str = flag(
        ..., "Reward model: a directory or a hub name.", depends_on=("reward_granularity",)
    )

    # reward
    reward_granularity: str | None = flag(
        None, "segment, token or bandit; default: what the reward model's config says."
    )
    reward_threshold: float | None = flag(
        None,
        "Entropy (nats) over which a segment starts; default: the reward model's own.",
        depends_on=("reward_model", "reward_granularity"),
    )
    normalizer: Literal["auto", "none", "running", "line", "scalar"] = flag(
        "auto",
        "auto (the one fitted into the reward model's config), none, running (fitted to the "
        "rollouts as they come), line or scalar (given by the two flags below).",
        depends_on={"line": _REWARDS, "scalar": _REWARDS},
    )
    normalizer_line: list[float] | None = flag(
        None,
        "w_m b_m w_s b_s: mean(p) = w_m ln p + b_m, std(p) = w_s ln p + b_s.",
        depends_on=("normalizer",),
    )
    normalizer_scalar: list[float] | None = flag(
        None, "Mean and std of --normalizer scalar.", depends_on=("normalizer",)
    )
    reward_credit: Literal["segments", "final"] = flag(
        "segments",
        "segments: each segment's tokens are paid its reward. final: the mean over the row's "
        "segments is paid at its last token (a control: same reward model, no credit placement).",
    )
    reward_spread: Literal["even", "repeat", "last"] = flag(
        "even", "How a segment's reward goes to its tokens: even, repeat or last."
    )
    reward_reduction: Literal["mean", "sum", "token-mean"] = flag(
        "mean",
        "mean: a row's rewards add up to the mean of its segments. sum: to their sum (the authors' "
        "form; weakens the KL penalty by the number of segments). token-mean: to their sum over "
        "the number of the response's tokens (the authors' length norm).",
    )
    reward_clip: float = flag(10.0, "Token rewards are clipped to plus and minus this.")
    missing_eos_penalty: float | None = flag(
        None, "Taken off the last token's reward of a response without EOS."
    )
    overlong_tokens: int | None = flag(
        None, "A response of more tokens, or without EOS, earns --overlong_reward instead."
    )
    overlong_reward: float = flag(-0.05, "Reward on every token of an overlong response.")

    # rollouts
    total_episodes: int | None = flag(
        None, "Responses to sample in all; default: num_episodes times the prompts."
    )
    num_episodes: float = flag(1.0, "Passes over the prompts.")
    rollout_batch_size: int = flag(128, "Responses sampled an update.")
    generation_batch_size: int = flag(64, "Rows that one process generates at a time.")
    response_length: int = flag(256, "Most tokens of a response.")
    max_prompt_length: int = flag(
        512, "Prompts of more tokens are dropped and counted; see --truncation_side."
    )
    truncation_side: Literal["none", "left"] = flag(
        "none", "left: a prompt of more than max_prompt_length tokens keeps its last ones."
    )
    temperature: float = flag(1.0, "Sampling temperature; log-probabilities are taken at it too.")

    # optimisation
    num_ppo_epochs: int = flag(1, "Passes over each batch of rollouts.")
    mini_batch_size: int = flag(64, "Rows of one optimizer step.")
    per_device_train_batch_size: int = flag(8, "Rows of one forward pass of one process.")
    learning_rate: float = flag(5e-7, "Policy's learning rate.")
    value_learning_rate: float = flag(9e-6, "Value model's learning rate.")
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ] = flag("linear", "Schedule over updates, by transformers' names.")
    lr_scheduler_kwargs: dict[str, Any] | str | None = flag(
        None,
        'More settings of the schedule as json, e.g. {"min_lr_rate": 0.1}.',
        depends_on=("lr_scheduler_type",),
    )
    warmup_steps: float = flag(
        0.0, "Updates in which the learning rates rise; below 1: their share of all updates."
    )
    adam_beta1: float = flag(0.9, "AdamW's first beta.")
    adam_beta2: float = flag(0.999, "AdamW's second beta.")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon.")
    weight_decay: float = flag(0.0, "AdamW's weight decay.")
    max_grad_norm: float = flag(1.0, "Gradient norm limit, of policy and value model each.")
    gradient_checkpointing: bool = flag(
        False, "Recompute activations to save memory.", aliases=["--activation_checkpointing"]
    )
    mixed_precision: Literal["no", "bf16"] = flag(
        "no", "no or bf16. Trained weights are always kept in float32."
    )
    use_cpu: bool = flag(False, "Run on CPUs though there is a GPU.")

    # PPO
    kl_coef: float = flag(0.05, "beta: weight of the KL penalty in the reward.")
    kl_target: float | None = flag(
        None, "Nats a response that an adaptive beta steers to; default: beta stays fixed."
    )
    kl_horizon: int = flag(10_000, "Episodes over which the adaptive beta moves.")
    gamma: float = flag(1.0, "Discount.")
    lam: float = flag(0.95, "Lambda of generalised advantage estimation.")
    cliprange: float = flag(0.2, "Clip range of the probability ratio.")
    cliprange_value: float = flag(0.2, "Clip range of the values.")
    whiten_advantages: bool = flag(True, "Advantages get mean 0 and variance 1 over the rollouts.")
    loss_aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = flag(
        "token-mean", "token-mean, seq-mean-token-mean or seq-mean-token-sum."
    )
    entropy_model: str | None = flag(
        None,
        "LM whose entropy divides responses into segments; default: the one that the reward model "
        "was trained with. policy: the reference policy.",
    )
    value_model: str = flag(
        "policy", "What the value model starts from: policy, reward, or a reward model's directory."
    )

    # running
    seed: int = flag(0, "Fixes prompt order and sampling.")
    logging_steps: int = flag(1, "Updates between lines of metrics.jsonl.")
    eval_steps: int | None = flag(None, "Updates between evaluations; default: none.")
    save_steps: int | None = flag(50, "Updates between checkpoints; 0: only when interrupted.")
    save_total_limit: int | None = flag(None, "Keep this many of the newest checkpoints.")
    report_to: list[str] = flag(
        ["none"], "Trackers of accelerate: tensorboard, wandb, ... or none."
    )
    resume_from_checkpoint: str | None = flag(
        None, "true (the newest checkpoint of output_dir) or a checkpoint's directory."
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            # Else the processes of torchrun would each train alone, into the same directory.
            self.use_cpu = True
        for name, hint in get_type_hints(PPOConfig).items():
            allowed, got = get_args(hint), getattr(self, name)
            if get_origin(hint) is Literal and got not in allowed:
                raise UserError(f"{name}: expected one of {', '.join(allowed)}, got {got!r}")
        self._check_schedule()
        for name in (
            "rollout_batch_size", "generation_batch_size", "response_length", "num_ppo_epochs",
            "mini_batch_size", "per_device_train_batch_size", "temperature", "max_grad_norm",
            "reward_clip", "logging_steps", "num_episodes", "kl_horizon", "total_episodes",
            "kl_target", "overlong_tokens", "eval_steps", "save_total_limit",
        ):  # fmt: skip
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if self.rollout_batch_size % self.mini_batch_size:
            raise UserError(
                f"mini_batch_size: expected a divisor of rollout_batch_size "
                f"{self.rollout_batch_size}, got {self.mini_batch_size}"
            )
        for name, kind, n in (("normalizer_line", "line", 4), ("normalizer_scalar", "scalar", 2)):
            given = getattr(self, name)
            if (given is not None) != (self.normalizer == kind) or len(given or [0] * n) != n:
                raise UserError(
                    f"{name}: expected {n} numbers with --normalizer {kind} and none without, "
                    f"got {given} with --normalizer {self.normalizer}"
                )

    def _check_schedule(self) -> None:
        given = self.lr_scheduler_kwargs
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError:
                given = None
            if not isinstance(given, dict):
                raise UserError(
                    'lr_scheduler_kwargs: expected a json object like {"min_lr_rate": 0.1}, got '
                    f"{self.lr_scheduler_kwargs}"
                )
            self.lr_scheduler_kwargs = given
        if given and "min_lr" in given:
            raise UserError(
                f"lr_scheduler_kwargs: expected min_lr_rate, a share of both learning rates, got "
                f"min_lr {given['min_lr']}; give min_lr_rate instead"
            )
        if not self.warmup_steps >= 0:
            raise UserError(f"warmup_steps: expected at least 0, got {self.warmup_steps}")
