"""Flags of ``segrlhf ppo``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from segkernels import LocationNormalizer, ScalarNormalizer

from ..configs import LEARNING_RATE, SEED, THRESHOLD, WEIGHT_DECAY, Range, check_flags, flag
from ..errors import UserError

# What a normaliser's numbers were fitted to.
_REWARDS = ("reward_model", "reward_granularity", "reward_threshold")


@dataclass
class PPOConfig:
    """Flags of ``segrlhf ppo``. Batch sizes count rows over all processes, unless they say not."""

    output_dir: str = flag(
        ..., "Where policy, checkpoints and metrics.jsonl go.", writes="directory"
    )
    reward_model: str = flag(
        ..., "Reward model: a directory or a hub name.", depends_on=("reward_granularity",)
    )

    # reward
    reward_granularity: Literal["segment", "token", "bandit"] | None = flag(
        None, "segment, token or bandit; default: what the reward model's config says."
    )
    reward_threshold: float | None = flag(
        None,
        "Entropy (nats) over which a segment starts; default: the reward model's own.",
        depends_on=("reward_model", "reward_granularity"),
        limits=THRESHOLD,
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
        limits=Range(),
    )
    normalizer_scalar: list[float] | None = flag(
        None, "Mean and std of --normalizer scalar.", depends_on=("normalizer",), limits=Range()
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
    reward_clip: float = flag(
        10.0,
        "Token rewards are clipped to plus and minus this.",
        limits=Range(above=0, infinite=True),
    )
    missing_eos_penalty: float | None = flag(
        None, "Taken off the last token's reward of a response without EOS.", limits=Range(min=0)
    )
    overlong_tokens: int | None = flag(
        None,
        "A response of more tokens, or without EOS, earns --overlong_reward instead.",
        limits=Range(min=1),
    )
    overlong_reward: float = flag(
        -0.05, "Reward on every token of an overlong response.", limits=Range()
    )

    # rollouts
    total_episodes: int | None = flag(
        None,
        "Responses to sample in all; default: num_episodes times the prompts.",
        limits=Range(min=1),
    )
    num_episodes: float = flag(
        1.0, "Passes over the prompts.", limits=Range(above=0, max=1_000_000)
    )
    rollout_batch_size: int = flag(128, "Responses sampled an update.", limits=Range(min=1))
    generation_batch_size: int = flag(
        64, "Rows that one process generates at a time.", limits=Range(min=1)
    )
    response_length: int = flag(256, "Most tokens of a response.", limits=Range(min=1))
    max_prompt_length: int = flag(
        512,
        "Prompts of more tokens are dropped and counted; see --truncation_side.",
        limits=Range(min=1),
    )
    truncation_side: Literal["none", "left"] = flag(
        "none", "left: a prompt of more than max_prompt_length tokens keeps its last ones."
    )
    temperature: float = flag(
        1.0,
        "Sampling temperature; log-probabilities are taken at it too.",
        limits=Range(min=1e-6, max=1e6),
    )

    # optimisation
    num_ppo_epochs: int = flag(1, "Passes over each batch of rollouts.", limits=Range(min=1))
    mini_batch_size: int = flag(64, "Rows of one optimizer step.", limits=Range(min=1))
    per_device_train_batch_size: int = flag(
        8, "Rows of one forward pass of one process.", limits=Range(min=1)
    )
    learning_rate: float = flag(5e-7, "Policy's learning rate.", limits=LEARNING_RATE)
    value_learning_rate: float = flag(9e-6, "Value model's learning rate.", limits=LEARNING_RATE)
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
        0.0,
        "Updates in which the learning rates rise; below 1: their share of all updates.",
        limits=Range(min=0),
    )
    adam_beta1: float = flag(0.9, "AdamW's first beta.", limits=Range(min=0, below=1))
    adam_beta2: float = flag(0.999, "AdamW's second beta.", limits=Range(min=0, below=1))
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon.", limits=Range(above=0))
    weight_decay: float = flag(0.0, "AdamW's weight decay.", limits=WEIGHT_DECAY)
    max_grad_norm: float = flag(
        1.0,
        "Gradient norm limit, of policy and value model each.",
        limits=Range(above=0, infinite=True),
    )
    gradient_checkpointing: bool = flag(
        False, "Recompute activations to save memory.", aliases=["--activation_checkpointing"]
    )
    mixed_precision: Literal["no", "bf16"] = flag(
        "no", "no or bf16. Trained weights are always kept in float32."
    )
    use_cpu: bool = flag(False, "Run on CPUs though there is a GPU.")

    # PPO
    kl_coef: float = flag(
        0.05, "beta: weight of the KL penalty in the reward.", limits=Range(min=0)
    )
    kl_target: float | None = flag(
        None,
        "Nats a response that an adaptive beta steers to; default: beta stays fixed.",
        limits=Range(above=0),
    )
    kl_horizon: int = flag(
        10_000, "Episodes over which the adaptive beta moves.", limits=Range(min=1)
    )
    gamma: float = flag(1.0, "Discount.", limits=Range(min=0, max=1))
    lam: float = flag(
        0.95, "Lambda of generalised advantage estimation.", limits=Range(min=0, max=1)
    )
    cliprange: float = flag(
        0.2, "Clip range of the probability ratio.", limits=Range(above=0, infinite=True)
    )
    cliprange_value: float = flag(
        0.2, "Clip range of the values.", limits=Range(above=0, infinite=True)
    )
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
    seed: int = flag(0, "Fixes prompt order and sampling.", limits=SEED)
    logging_steps: int = flag(1, "Updates between lines of metrics.jsonl.", limits=Range(min=1))
    eval_steps: int | None = flag(
        None, "Updates between evaluations; default: none.", limits=Range(min=1)
    )
    save_steps: int | None = flag(
        50, "Updates between checkpoints; 0: only when interrupted.", limits=Range(min=0)
    )
    save_total_limit: int | None = flag(
        None, "Keep this many of the newest checkpoints.", limits=Range(min=1)
    )
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
        check_flags(self)
        given = self.lr_scheduler_kwargs
        if isinstance(given, dict) and "min_lr" in given:
            raise UserError(
                f"lr_scheduler_kwargs: expected min_lr_rate, a share of both learning rates, got "
                f"min_lr {given['min_lr']}; give min_lr_rate instead"
            )
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
        self.given_normalizer()

    def given_normalizer(self) -> LocationNormalizer | ScalarNormalizer | None:
        """The normaliser whose numbers are flags; UserError for a std that is not positive."""
        try:
            if self.normalizer == "line":
                return LocationNormalizer(*(self.normalizer_line or ()))
            if self.normalizer == "scalar":
                return ScalarNormalizer(*(self.normalizer_scalar or ()))
        except ValueError as error:
            raise UserError(f"normalizer_{self.normalizer}: {error}") from error
        return None
