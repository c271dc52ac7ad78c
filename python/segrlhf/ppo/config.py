"""Flags of ``segrlhf ppo``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from ..errors import UserError


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PPOConfig:
    """Flags of ``segrlhf ppo``. Batch sizes count rows over all processes, unless they say not."""

    output_dir: str = field(metadata={"help": "Where policy, checkpoints and metrics.jsonl go."})
    reward_model: str = field(metadata={"help": "Reward model: a directory or a hub name."})

    # reward
    reward_granularity: str | None = _flag(
        None, "segment, token or bandit; default: what the reward model's config says."
    )
    reward_threshold: float | None = _flag(
        None, "Entropy (nats) over which a segment starts; default: the reward model's own."
    )
    normalizer: Literal["auto", "none", "running", "line", "scalar"] = _flag(
        "auto",
        "auto (the one fitted into the reward model's config), none, running (fitted to the "
        "rollouts as they come), line or scalar (given by the two flags below).",
    )
    normalizer_line: list[float] | None = field(
        default=None,
        metadata={"help": "w_m b_m w_s b_s: mean(p) = w_m ln p + b_m, std(p) = w_s ln p + b_s."},
    )
    normalizer_scalar: list[float] | None = field(
        default=None, metadata={"help": "Mean and std of --normalizer scalar."}
    )
    reward_credit: Literal["segments", "final"] = _flag(
        "segments",
        "segments: each segment's tokens are paid its reward. final: the mean over the row's "
        "segments is paid at its last token (a control: same reward model, no credit placement).",
    )
    reward_spread: Literal["even", "repeat", "last"] = _flag(
        "even", "How a segment's reward goes to its tokens: even, repeat or last."
    )
    reward_reduction: Literal["mean", "sum"] = _flag(
        "mean",
        "mean: a row's rewards add up to the mean of its segments. sum: to their sum (the authors' "
        "form; weakens the KL penalty by the number of segments).",
    )
    reward_clip: float = _flag(10.0, "Token rewards are clipped to plus and minus this.")
    missing_eos_penalty: float | None = _flag(
        None, "Taken off the last token's reward of a response without EOS."
    )
    overlong_tokens: int | None = _flag(
        None, "A response of more tokens, or without EOS, earns --overlong_reward instead."
    )
    overlong_reward: float = _flag(-0.05, "Reward on every token of an overlong response.")

    # rollouts
    total_episodes: int | None = _flag(
        None, "Responses to sample in all; default: num_episodes times the prompts."
    )
    num_episodes: float = _flag(1.0, "Passes over the prompts.")
    rollout_batch_size: int = _flag(128, "Responses sampled an update.")
    generation_batch_size: int = _flag(64, "Rows that one process generates at a time.")
    response_length: int = _flag(256, "Most tokens of a response.")
    max_prompt_length: int = _flag(512, "Prompts of more tokens are dropped and counted.")
    temperature: float = _flag(1.0, "Sampling temperature; log-probabilities are taken at it too.")

    # optimisation
    num_ppo_epochs: int = _flag(1, "Passes over each batch of rollouts.")
    mini_batch_size: int = _flag(64, "Rows of one optimizer step.")
    per_device_train_batch_size: int = _flag(8, "Rows of one forward pass of one process.")
    learning_rate: float = _flag(5e-7, "Policy's learning rate.")
    value_learning_rate: float = _flag(9e-6, "Value model's learning rate.")
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = _flag("linear", "Schedule over updates, by transformers' names.")
    warmup_ratio: float = _flag(0.0, "Share of the updates in which the learning rates rise.")
    adam_beta1: float = _flag(0.9, "AdamW's first beta.")
    adam_beta2: float = _flag(0.999, "AdamW's second beta.")
    adam_epsilon: float = _flag(1e-8, "AdamW's epsilon.")
    weight_decay: float = _flag(0.0, "AdamW's weight decay.")
    max_grad_norm: float = _flag(1.0, "Gradient norm limit, of policy and value model each.")
    gradient_checkpointing: bool = _flag(False, "Recompute activations to save memory.")
    mixed_precision: Literal["no", "bf16"] = _flag(
        "no", "no or bf16. Trained weights are always kept in float32."
    )
    use_cpu: bool = _flag(False, "Run on CPUs though there is a GPU.")

    # PPO
    kl_coef: float = _flag(0.05, "beta: weight of the KL penalty in the reward.")
    kl_target: float | None = _flag(
        None, "Nats a response that an adaptive beta steers to; default: beta stays fixed."
    )
    kl_horizon: int = _flag(10_000, "Episodes over which the adaptive beta moves.")
    gamma: float = _flag(1.0, "Discount.")
    lam: float = _flag(0.95, "Lambda of generalised advantage estimation.")
    cliprange: float = _flag(0.2, "Clip range of the probability ratio.")
    cliprange_value: float = _flag(0.2, "Clip range of the values.")
    whiten_advantages: bool = _flag(True, "Advantages get mean 0 and variance 1 over the rollouts.")
    loss_aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = _flag(
        "token-mean", "token-mean, seq-mean-token-mean or seq-mean-token-sum."
    )
    entropy_model: str | None = _flag(
        None,
        "LM whose entropy divides responses into segments; default: the one that the reward model "
        "was trained with. policy: the reference policy.",
    )
    value_model: str = _flag(
        "policy", "What the value model starts from: policy, reward, or a reward model's directory."
    )

    # running
    seed: int = _flag(0, "Fixes prompt order and sampling.")
    logging_steps: int = _flag(1, "Updates between lines of metrics.jsonl.")
    eval_steps: int | None = _flag(None, "Updates between evaluations; default: none.")
    save_steps: int | None = _flag(50, "Updates between checkpoints; 0: only when interrupted.")
    save_total_limit: int | None = _flag(None, "Keep this many of the newest checkpoints.")
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Trackers of accelerate: tensorboard, wandb, ... or none."},
    )
    resume_from_checkpoint: str | None = _flag(
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

    @property
    def resumes(self) -> bool:
        return str(self.resume_from_checkpoint).lower() not in ("", "none", "false", "no")
