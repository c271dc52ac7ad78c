"""The numbers of a PPO update, by TRL's names where it has them, and the file they go to."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from segkernels import PolicyLoss, scatter_segment_rewards, segment_scores

from ..runtime import files
from ..runtime.checkpoints import saving
from ..runtime.metrics import Mean
from .config import PPOConfig
from .experience import Experience


def rollout_means(
    config: PPOConfig, experience: Experience, normalizer: Any, kl_coef: float, processes: int
) -> dict[str, Mean]:
    """Means over responses, segments and tokens of this process's rollouts."""
    mask, ends, rows = experience.rollout.action_mask, experience.ends, len(experience.rollout)
    n_segments, n_tokens = ends.sum(), mask.sum()
    in_segment = mask & (ends.flip(1).cumsum(1).flip(1) > 0)
    scores = segment_scores(experience.rewards, ends, mask)
    token_rewards, kl = experience.token_rewards, experience.kl
    paid, penalty = token_rewards.double().sum(), kl_coef * kl.double().sum()
    clipped = (token_rewards.abs() >= config.reward_clip) & mask
    means: dict[str, Mean] = {
        "objective/kl": (kl.sum(), rows),
        "objective/entropy": (-experience.logprobs.double().sum(), rows),
        "objective/non_score_reward": (-penalty, rows),
        "objective/rlhf_reward": (paid - penalty, rows),
        "objective/scores": (scores.double().sum(), rows),
        "segments/per_response": (n_segments, rows),
        "segments/tokens_per_segment": (in_segment.sum(), n_segments),
        "response_length": (n_tokens, rows),
        "rewards/clipped_share": (clipped.sum(), n_tokens),
        # TRL's count of the whole batch, as a mean over one batch.
        "val/num_eos_tokens": (experience.rollout.terminated.sum(), 1.0 / processes),
    }
    if normalizer is not None:
        z = scatter_segment_rewards(
            experience.rewards,
            ends,
            mask,
            normalizer=normalizer,
            spread="last",
            reduction="sum",
            clip=math.inf,
        )[ends].double()
        means["normalizer/mean_drift"] = z.sum(), n_segments
        means["normalizer/second_moment"] = z.square().sum(), n_segments
    return means


def token_means(
    batch: Experience, policy: PolicyLoss, values: Tensor, cliprange_value: float
) -> dict[str, Mean]:
    """Means over the tokens of a micro-batch. Masked sums: x[mask] would wait for the device."""
    assert policy.entropy is not None
    mask = batch.rollout.action_mask
    n = mask.sum()
    ratio = (policy.logprobs.double() - batch.logprobs).exp()
    values, old_values, returns = values.double(), batch.values.double(), batch.returns.double()
    near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    worse = (near - returns).square() > (values - returns).square()
    return {
        "policy/approxkl_avg": (policy.approx_kl * n, n),
        "policy/clipfrac_avg": (policy.clip_fraction * n, n),
        "policy/entropy_avg": (policy.entropy.double().sum(), n),
        "val/ratio": (ratio.where(mask, 0.0).sum(), n),
        "val/clipfrac_avg": ((worse & mask).sum(), n),
    }


def with_std_drift(metrics: dict[str, float]) -> dict[str, float]:
    """``normalizer/std_drift``, how far from 1 the spread of normalised rewards is, in the place
    of their second moment."""
    if "normalizer/second_moment" not in metrics:
        return metrics
    second = metrics["normalizer/second_moment"]
    variance = second - metrics["normalizer/mean_drift"] ** 2
    kept = {name: x for name, x in metrics.items() if name != "normalizer/second_moment"}
    return {**kept, "normalizer/std_drift": math.sqrt(max(variance, 0.0)) - 1}


METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """metrics.jsonl of a run, a line an update, and the trackers that accelerate reports to."""

    def __init__(self, accelerator: Accelerator, config: PPOConfig) -> None:
        self.accelerator, self.config = accelerator, config
        self.path = Path(config.output_dir) / METRICS_FILE

    def start(self, history: list[dict[str, float]]) -> None:
        """Writes what was logged before, if anything was, and opens the trackers."""
        # A new directory stays empty until there is a number: a file in it would turn away the
        # corrected command of a run that fails in its first update.
        if self.accelerator.is_main_process and (history or self.path.exists()):
            files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in history))
        if self.accelerator.log_with:
            flags = {
                name: value
                for name, value in dataclasses.asdict(self.config).items()
                if isinstance(value, str | int | float)
            }
            self.accelerator.init_trackers("segrlhf-ppo", config=flags)

    def write(self, metrics: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with (
                saving(self.path.name, self.path.parent),
                open(self.path, "a", encoding="utf-8") as handle,
            ):
                handle.write(json.dumps(metrics) + "\n")
        self.accelerator.log(metrics, step=int(metrics["update"]))
