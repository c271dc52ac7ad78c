"""PPO on rewards per segment: one loop over accelerate, the same for any number of processes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_scheduler

from segkernels import (
    PolicyLoss,
    RunningLocationNormalizer,
    scatter_segment_rewards,
    segment_advantages,
    segment_scores,
    value_loss,
    whiten,
)

from ..configs import ModelConfig
from ..data.render import stop_token_ids
from ..errors import NonFiniteError, UserError
from ..models.lm_head import token_stats, token_stats_at
from ..models.loading import check_vocabulary
from ..models.reward_model import SegmentRewardModel
from ..runtime import files
from ..runtime.checkpoints import COMPLETE, claim_output_dir, mark_complete, resolve_resume
from ..runtime.interrupt import Interrupt
from .config import PPOConfig
from .experience import Experience, build_normalizer
from .metrics import Means
from .models import PolicyAndValue, starting_value_model, state_values, without_dropout
from .rollout import Rollout, distinct_bigrams, eos_ids, generate


def _mix(*parts: object) -> int:
    """A seed from several numbers or names; neighbours give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def _accelerator(config: PPOConfig) -> Accelerator:
    asked = [name for name in config.report_to if name != "none"]
    missing = sorted(set(asked) - {tracker.value for tracker in get_available_trackers()})
    if missing:
        raise UserError(
            f"report_to: expected none or trackers that are installed, got {', '.join(missing)}; "
            "pip install it, or choose another of accelerate's"
        )
    return Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=config.use_cpu,
        log_with=asked or None,
        project_dir=config.output_dir,
    )


class PPOTrainer:
    """Trains ``policy`` on the rewards that ``reward_model`` gives to segments of its responses.

    ``train_prompts`` and ``eval_prompts`` are indexable rows with ``prompt_ids`` (list of ints) and
    ``prompt`` (text). ``eval_fn(responses, prompts)`` returns gold rewards for texts. The reference
    policy defaults to a frozen copy of ``policy``; segments come from the reference policy's
    entropy, or from ``entropy_model``'s where that is another one. The value model defaults to what
    ``config.value_model`` says.

    Row r of update u has the same prompt, the same random numbers and the same minibatch
    r // mini_batch_size whatever the number of processes or the size of micro-batches, and losses
    are weighted by global counts: results agree to rounding. Everything drawn depends on seed,
    update and row alone, so a resumed run continues exactly.
    """

    def __init__(
        self,
        policy: Any,
        reward_model: SegmentRewardModel,
        tokenizer: Any,
        train_prompts: Any,
        config: PPOConfig,
        eval_prompts: Any = None,
        eval_fn: Callable[[list[str], list[str]], list[float]] | None = None,
        ref_policy: Any = None,
        value_model: SegmentRewardModel | None = None,
        entropy_model: Any = None,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.train_prompts, self.eval_prompts, self.eval_fn = train_prompts, eval_prompts, eval_fn
        self.accelerator = _accelerator(config)
        self._check()
        if self.accelerator.is_main_process:
            claim_output_dir(config.output_dir, resume=config.resumes)
        for model in (policy, reward_model):
            check_vocabulary(model.config.get_text_config().vocab_size, tokenizer)
        device = self.accelerator.device
        self.normalizer = build_normalizer(config, reward_model)
        if value_model is None:
            value_model = starting_value_model(
                config, ModelConfig(policy.name_or_path), reward_model
            )
        self.ref_policy = self._frozen(copy.deepcopy(policy) if ref_policy is None else ref_policy)
        self.entropy_model = None if entropy_model is None else self._frozen(entropy_model)
        self.reward_model = self._frozen(reward_model)

        self.module = PolicyAndValue(policy, value_model).float().to(device).requires_grad_(True)
        without_dropout(self.module)
        if config.gradient_checkpointing:
            for model in (policy, value_model):
                model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(policy.parameters()), "lr": config.learning_rate},
                {"params": list(value_model.parameters()), "lr": config.value_learning_rate},
            ],
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        # Only gradient checkpointing asks for it: there is no dropout to switch.
        self.module.train(config.gradient_checkpointing)
        self.model = self.accelerator.prepare(self.module)
        self.end_token_ids = self._end_tokens()

        total = config.total_episodes or math.ceil(config.num_episodes * len(train_prompts))
        self.n_updates = math.ceil(total / config.rollout_batch_size)
        self.lr_factor = self._schedule()
        self.done = 0  # updates
        self.kl_coef = config.kl_coef
        self.history: list[dict[str, float]] = []
        self._epoch: tuple[int, list[int]] = (-1, [])

    # ---- set-up

    def _check(self) -> None:
        kind, world = self.accelerator.distributed_type, self.accelerator.num_processes
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise UserError(
                f"accelerate: expected one process or data-parallel processes for PPO, got {kind}; "
                "launch with torchrun or accelerate launch --multi_gpu"
            )
        if self.config.mini_batch_size % world:
            raise UserError(
                f"mini_batch_size: expected a multiple of the {world} processes, got "
                f"{self.config.mini_batch_size}"
            )
        if self.config.eval_steps and not self.eval_prompts:
            raise UserError(
                f"eval_steps: expected prompts to evaluate on, got none with --eval_steps "
                f"{self.config.eval_steps}; hold some out with --eval_size 0.05, or give the "
                "dataset a test split"
            )
        if len(self.train_prompts) == 0:
            raise UserError("prompts: expected at least one, got none; check the dataset")

    def _frozen(self, model: Any) -> Any:
        return model.to(self.accelerator.device).eval().requires_grad_(False)

    def _schedule(self) -> Callable[[int], float]:
        # All are functions of the update alone, so that there is no state to save.
        scheduler = get_scheduler(
            self.config.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=1.0),
            num_warmup_steps=math.ceil(self.config.warmup_ratio * self.n_updates),
            num_training_steps=self.n_updates,
        )
        return scheduler.lr_lambdas[0]

    def _end_tokens(self) -> list[int]:
        conversational = bool(self.train_prompts[0].get("conversational"))
        stops = stop_token_ids(self.tokenizer, conversational)
        return sorted({*stops, *eos_ids(self.module.policy, self.tokenizer)})

    # ---- the loop

    def train(self) -> list[dict[str, float]]:
        """Runs all updates that are left; returns the metrics of every logged update."""
        config, main = self.config, self.accelerator.is_main_process
        checkpoint = resolve_resume(config.output_dir, config.resume_from_checkpoint)
        if checkpoint is not None:
            self.load_checkpoint(checkpoint)
        self._start_log()
        if self.done == 0 and self._due(config.eval_steps):
            self._log({"update": 0, "episode": 0, **self.evaluate()})
        bar = tqdm(
            total=self.n_updates, initial=self.done, desc="ppo", unit="update", disable=not main
        )
        with bar, Interrupt() as interrupt:
            while self.done < self.n_updates:
                metrics = self._update()
                self.done += 1
                last = self.done == self.n_updates
                evaluated = self._due(config.eval_steps) or (last and config.eval_steps)
                if evaluated:
                    metrics |= self.evaluate()
                if evaluated or last or self._due(config.logging_steps):
                    self._log(metrics)
                bar.set_postfix(
                    score=f"{metrics['objective/scores']:.3g}", kl=f"{metrics['objective/kl']:.3g}"
                )
                bar.update()
                stop = self._anywhere(interrupt.asked)
                if stop or self._due(config.save_steps):
                    path = self.save_checkpoint()
                if stop:
                    raise KeyboardInterrupt(
                        f"stopped after update {self.done} of {self.n_updates}, saved as {path}; "
                        "go on with --resume_from_checkpoint true"
                    )
        self.save_policy()
        return self.history

    def _update(self) -> dict[str, float]:
        """Rollouts, their rewards and advantages, and the optimizer steps on them."""
        config, started = self.config, time.perf_counter()
        means = Means()
        batch = self._sample()
        stats = self._read(batch[1])
        experience = self._reward(*batch, stats, means)
        lr = [group["lr"] for group in self._set_learning_rates()]
        for _ in range(config.num_ppo_epochs):
            for mini in range(config.rollout_batch_size // config.mini_batch_size):
                self._step(experience, mini, means)
        metrics = means.reduce(self.accelerator)
        if self.normalizer is not None:
            variance = (
                metrics.pop("normalizer/second_moment") - metrics["normalizer/mean_drift"] ** 2
            )
            metrics["normalizer/std_drift"] = math.sqrt(max(variance, 0.0)) - 1
        kl_coef = self.kl_coef
        if config.kl_target is not None:
            # Ziegler et al. 2019, section 2.2.
            error = min(max(metrics["objective/kl"] / config.kl_target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * config.rollout_batch_size / config.kl_horizon
        seconds = time.perf_counter() - started
        return {
            "update": self.done + 1,
            "episode": (self.done + 1) * config.rollout_batch_size,
            **metrics,
            "objective/kl_coef": kl_coef,
            "lr": lr[0],
            "value_lr": lr[1],
            "seconds": seconds,
            "eps": config.rollout_batch_size / seconds,
        }

    def _due(self, every: int | None) -> bool:
        return bool(every and self.done % every == 0)

    def _anywhere(self, flag: bool) -> bool:
        """Whether any process says so."""
        count = torch.tensor(float(flag), device=self.accelerator.device)
        return self.accelerator.reduce(count, "sum").item() > 0

    def _set_learning_rates(self) -> list[dict[str, Any]]:
        groups = self.optimizer.param_groups
        rates = (self.config.learning_rate, self.config.value_learning_rate)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * self.lr_factor(self.done)
        return groups

    # ---- rollouts

    def _my_rows(self) -> list[int]:
        """Rows of a batch of rollouts that this process holds: its slice of each minibatch."""
        size, rank = self._rows_per_mini, self.accelerator.process_index
        starts = range(0, self.config.rollout_batch_size, self.config.mini_batch_size)
        return [s + rank * size + i for s in starts for i in range(size)]

    @property
    def _rows_per_mini(self) -> int:
        return self.config.mini_batch_size // self.accelerator.num_processes

    def _prompt_at(self, row: int) -> int:
        """Index of the prompt of the run's row-th response: a new order every epoch."""
        epoch, place = divmod(row, len(self.train_prompts))
        if self._epoch[0] != epoch:
            g = torch.Generator().manual_seed(_mix(self.config.seed, "epoch", epoch))
            self._epoch = epoch, torch.randperm(len(self.train_prompts), generator=g).tolist()
        return self._epoch[1][place]

    def _sample(self) -> tuple[list[int], Rollout]:
        first = self.done * self.config.rollout_batch_size
        rows = [first + row for row in self._my_rows()]
        prompts = [self._prompt_at(row) for row in rows]
        ids = [self.train_prompts[i]["prompt_ids"] for i in prompts]
        return prompts, self._generate(ids, [_mix(self.config.seed, "row", row) for row in rows])

    def _generate(self, prompt_ids: list[list[int]], seeds: list[int]) -> Rollout:
        with self.accelerator.autocast():
            return generate(
                self.module.policy,
                self.tokenizer,
                prompt_ids,
                max_new_tokens=self.config.response_length,
                seeds=seeds,
                temperature=self.config.temperature,
                batch_size=self.config.generation_batch_size,
                end_token_ids=self.end_token_ids,
            )

    # ---- what the models say about them

    def _micro_batches(self, n_rows: int, start: int = 0) -> Iterator[slice]:
        step = self.config.per_device_train_batch_size
        for first in range(start, start + n_rows, step):
            yield slice(first, min(first + step, start + n_rows))

    @torch.no_grad()
    def _read(self, rollout: Rollout) -> dict[str, Tensor]:
        """What all models say at each token, ``[B, T]`` by name."""
        parts: dict[str, list[Tensor]] = {}
        size = self._rows_per_mini
        for start in range(0, len(rollout), size):
            for part in self._micro_batches(min(size, len(rollout) - start), start):
                rows = rollout.rows(part)
                with self.accelerator.autocast():
                    found = self._read_rows(rows.input_ids, rows.attention_mask, rows.action_mask)
                for name, x in found.items():
                    pad = rollout.input_ids.shape[1] - x.shape[1]
                    parts.setdefault(name, []).append(F.pad(x.float(), (0, pad)))
        return {name: torch.cat(xs) for name, xs in parts.items()}

    def _read_rows(self, ids: Tensor, attention: Tensor, action: Tensor) -> dict[str, Tensor]:
        tokens, temperature = (ids, attention, action), self.config.temperature
        segments = self.reward_model.granularity == "segment"
        also = {1.0} if segments and self.entropy_model is None else set()
        ref = token_stats_at(self.ref_policy, *tokens, {temperature} | also)
        out = {
            "logprobs": token_stats(self.module.policy, *tokens, temperature)[0],
            "values": state_values(self.module.value, ids, attention),
            "ref_logprobs": ref[temperature][0],
            "rewards": self.reward_model(ids, attention_mask=attention),
        }
        if segments:
            cutter = self.entropy_model
            _, out["entropy"] = ref[1.0] if cutter is None else token_stats(cutter, *tokens)
        return out

    def _reward(
        self, prompts: list[int], rollout: Rollout, stats: dict[str, Tensor], means: Means
    ) -> Experience:
        config, mask = self.config, rollout.action_mask
        bad = torch.stack([(~x.isfinite() & mask).any(1) for x in stats.values()])
        if self._anywhere(bool(bad.any())):
            names = [name for name, rows in zip(stats, bad, strict=True) if rows.any()]
            self._stop_non_finite(names, [prompts[i] for i in bad.any(0).nonzero().flatten()])
        ends = self.reward_model.segment_ends(stats.get("entropy"), mask, rollout.terminated)
        if isinstance(self.normalizer, RunningLocationNormalizer):
            self.normalizer.update(stats["rewards"], ends, mask)
            self.normalizer.all_reduce()
            self.normalizer.refit()
        rewards, paid_ends, rule = self._credit(stats["rewards"], ends, rollout)
        advantages, returns, token_rewards, kl = segment_advantages(
            rewards,
            paid_ends,
            stats["logprobs"],
            stats["ref_logprobs"],
            stats["values"],
            mask,
            kl_coef=self.kl_coef,
            gamma=config.gamma,
            lam=config.lam,
            **rule,
        )
        self._count_rollouts(rollout, ends, stats, token_rewards, kl, means)
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)
        return Experience(prompts, rollout, stats["logprobs"], stats["values"], advantages, returns)

    def _credit(
        self, rewards: Tensor, ends: Tensor, rollout: Rollout
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Rewards, ends and options for ``segment_advantages`` under the rules of the config.

        Without special rules these are the reward model's own. Otherwise the rules make token
        rewards, each of which is then a segment that is paid as it stands.
        """
        config, mask = self.config, rollout.action_mask
        rule = {
            "normalizer": self.normalizer,
            "spread": config.reward_spread,
            "reduction": config.reward_reduction,
            "clip": config.reward_clip,
        }
        final = config.reward_credit == "final"
        penalty, limit = config.missing_eos_penalty, config.overlong_tokens
        if not final and penalty is None and limit is None:
            return rewards, ends, rule
        last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
        if final:
            rule |= {"spread": "last", "reduction": "mean", "clip": math.inf}
        paid = scatter_segment_rewards(rewards, ends, mask, **rule)
        if final:
            clip = config.reward_clip
            paid = torch.where(last, paid.sum(1, keepdim=True).clamp(-clip, clip), 0.0)
        if penalty is not None:
            paid = paid - penalty * (last & ~rollout.terminated[:, None])
        if limit is not None:
            overlong = ~rollout.terminated | (mask.sum(1) > limit)
            paid = torch.where(overlong[:, None] & mask, config.overlong_reward, paid)
        as_it_is = {"normalizer": None, "spread": "last", "reduction": "sum", "clip": math.inf}
        return paid, mask, as_it_is

    def _count_rollouts(
        self,
        rollout: Rollout,
        ends: Tensor,
        stats: dict[str, Tensor],
        token_rewards: Tensor,
        kl: Tensor,
        means: Means,
    ) -> None:
        config, mask, rows = self.config, rollout.action_mask, len(rollout)
        in_segment = mask & (ends.flip(1).cumsum(1).flip(1) > 0)
        scores = segment_scores(stats["rewards"], ends, mask)
        paid, penalty = token_rewards.double().sum(), self.kl_coef * kl.double().sum()
        means.add("objective/kl", kl.sum(), rows)
        means.add("objective/entropy", -stats["logprobs"].double().sum(), rows)
        means.add("objective/non_score_reward", -penalty, rows)
        means.add("objective/rlhf_reward", paid - penalty, rows)
        means.add("objective/scores", scores.double().sum(), rows)
        n_segments, n_tokens = ends.sum(), mask.sum()
        means.add("segments/per_response", n_segments, rows)
        means.add("segments/tokens_per_segment", in_segment.sum(), n_segments)
        means.add("response_length", n_tokens, rows)
        clipped = (token_rewards.abs() >= config.reward_clip) & mask
        means.add("rewards/clipped_share", clipped.sum(), n_tokens)
        # TRL's count of the whole batch, as a mean over one batch.
        share = 1.0 / self.accelerator.num_processes
        means.add("val/num_eos_tokens", rollout.terminated.sum(), share)
        if self.normalizer is not None:
            z = scatter_segment_rewards(
                stats["rewards"],
                ends,
                mask,
                normalizer=self.normalizer,
                spread="last",
                reduction="sum",
                clip=math.inf,
            )[ends].double()
            means.add("normalizer/mean_drift", z.sum(), n_segments)
            means.add("normalizer/second_moment", z.square().sum(), n_segments)

    # ---- learning from them

    def _step(self, experience: Experience, mini: int, means: Means) -> None:
        """One optimizer step on minibatch ``mini``, in micro-batches."""
        config, accelerator, size = self.config, self.accelerator, self._rows_per_mini
        rows = slice(mini * size, (mini + 1) * size)
        n_tokens = accelerator.reduce(experience.rollout.action_mask[rows].sum(), "sum")
        bad: list[Tensor] = []
        self.optimizer.zero_grad()
        for part in self._micro_batches(size, rows.start):
            last = part.stop == rows.stop
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                batch = experience.rollout.rows(part)
                mask, width = batch.action_mask, batch.input_ids.shape[1]
                old_logprobs = experience.logprobs[part, :width]
                old_values = experience.values[part, :width]
                returns = experience.returns[part, :width]
                policy, values = self.model(
                    batch.input_ids,
                    batch.attention_mask,
                    mask,
                    old_logprobs,
                    experience.advantages[part, :width],
                    temperature=config.temperature,
                    clip=config.cliprange,
                    aggregation=config.loss_aggregation,
                )
                # Shares of the whole minibatch, so that its division does not matter.
                share = len(batch) / config.mini_batch_size
                if config.loss_aggregation == "token-mean":
                    share = mask.sum() / n_tokens
                loss = share * policy.loss
                loss_of_values = share * value_loss(
                    values,
                    old_values,
                    returns,
                    mask,
                    clip=config.cliprange_value,
                    aggregation=config.loss_aggregation,
                )
                # Data-parallel gradients are averaged over processes; these are shares of a sum.
                accelerator.backward((loss + loss_of_values) * accelerator.num_processes)
            with torch.no_grad():
                bad.append(((~policy.logprobs.isfinite() | ~values.isfinite()) & mask).any(1))
                means.add("loss/policy_avg", loss, share)
                means.add("loss/value_avg", loss_of_values, share)
                self._count_tokens(mask, means, policy, old_logprobs, values, old_values, returns)
        norms = [
            nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            for model in (self.module.policy, self.module.value)
        ]
        finite = torch.stack([*norms, loss, loss_of_values]).isfinite().all()
        if self._anywhere(not finite):
            found = torch.cat(bad).nonzero().flatten().tolist() or range(size)
            names = ["gradient of the loss"]
            self._stop_non_finite(names, [experience.prompts[rows.start + i] for i in found])
        for name, norm in zip(("policy", "value"), norms, strict=True):
            means.add(f"{name}/grad_norm", norm, 1)
        self.optimizer.step()

    def _count_tokens(
        self,
        mask: Tensor,
        means: Means,
        policy: PolicyLoss,
        old_logprobs: Tensor,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
    ) -> None:
        """Token means of the metrics. Masked sums, because x[mask] would wait for the device."""
        assert policy.entropy is not None
        n, reach = mask.sum(), self.config.cliprange_value
        means.add("policy/approxkl_avg", policy.approx_kl * n, n)
        means.add("policy/clipfrac_avg", policy.clip_fraction * n, n)
        means.add("policy/entropy_avg", policy.entropy.double().sum(), n)
        ratio = (policy.logprobs.double() - old_logprobs).exp()
        means.add("val/ratio", ratio.where(mask, 0.0).sum(), n)
        values, old_values, returns = values.double(), old_values.double(), returns.double()
        near = old_values + (values - old_values).clamp(-reach, reach)
        worse = (near - returns).square() > (values - returns).square()
        means.add("val/clipfrac_avg", (worse & mask).sum(), n)

    def _stop_non_finite(self, names: list[str], prompts: list[int]) -> None:
        """Saves the weights, which nothing non-finite has touched, and raises on every process."""
        names = sorted(set(gather_object(names)))
        prompts = sorted(set(gather_object(prompts)))
        path = self.save_checkpoint()
        raise NonFiniteError(
            f"update {self.done + 1}: expected finite numbers, got NaN or infinity in "
            f"{', '.join(names)} for prompts {prompts[:8]}{' ...' if len(prompts) > 8 else ''} "
            f"(row numbers of the tokenized prompts); the last good weights are in {path}; look at "
            "those rows or lower the learning rates, then --resume_from_checkpoint true"
        )

    # ---- evaluation

    def evaluate(self) -> dict[str, float]:
        """One response per evaluation prompt, with the same random numbers every time."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = list(range(rank, len(self.eval_prompts), world))
        found: list[tuple[int, list[int], float, int, float]] = []
        if mine:
            rollout = self._generate(
                [self.eval_prompts[i]["prompt_ids"] for i in mine],
                [_mix(self.config.seed, "eval", i) for i in mine],
            )
            stats, mask = self._read(rollout), rollout.action_mask
            ends = self.reward_model.segment_ends(stats.get("entropy"), mask, rollout.terminated)
            kl = (stats["logprobs"] - stats["ref_logprobs"]).masked_fill(~mask, 0.0).sum(1)
            scores = segment_scores(stats["rewards"], ends, mask)
            columns = (kl, ends.sum(1), scores)
            found = list(
                zip(mine, rollout.responses(), *(x.tolist() for x in columns), strict=True)
            )
        rows, responses, *sums = zip(*sorted(gather_object(found)), strict=True)
        mean_kl, segments, mean_score = (sum(x) / len(rows) for x in sums)
        metrics = {
            "eval/kl": mean_kl,
            "eval/segments_per_response": segments,
            "eval/scores": mean_score,
            "eval/distinct_bigrams": distinct_bigrams(responses),
            "eval/response_length": sum(map(len, responses)) / len(rows),
        }
        if self.eval_fn is not None:
            gold = [0.0]
            if self.accelerator.is_main_process:
                texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
                rewards = self.eval_fn(texts, [self.eval_prompts[i]["prompt"] for i in rows])
                gold = [sum(rewards) / len(rewards)]
            metrics["eval/gold"] = broadcast_object_list(gold)[0]
        return metrics

    # ---- files

    def _start_log(self) -> None:
        if self.accelerator.is_main_process:
            lines = [json.dumps(metrics) + "\n" for metrics in self.history]
            files.write_text(self._log_file, "".join(lines))
        if self.accelerator.log_with:
            flags = {
                k: v
                for k, v in dataclasses.asdict(self.config).items()
                if isinstance(v, str | int | float)
            }
            self.accelerator.init_trackers("segrlhf-ppo", config=flags)

    @property
    def _log_file(self) -> Path:
        return Path(self.config.output_dir) / "metrics.jsonl"

    def _log(self, metrics: dict[str, float]) -> None:
        self.history.append(metrics)
        if self.accelerator.is_main_process:
            with open(self._log_file, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(metrics) + "\n")
        self.accelerator.log(metrics, step=int(metrics["update"]))

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        """What a run must keep for its continuation to be the run that was cut off."""
        names = (
            "seed", "rollout_batch_size", "mini_batch_size", "num_ppo_epochs", "response_length",
            "temperature", "normalizer", "reward_credit", "reward_spread", "reward_reduction",
        )  # fmt: skip
        ids = json.dumps([list(row["prompt_ids"]) for row in self.train_prompts])
        prompts = hashlib.blake2b(ids.encode(), digest_size=16).hexdigest()
        return {**{name: getattr(self.config, name) for name in names}, "prompts": prompts}

    def save_checkpoint(self) -> Path:
        """``checkpoint-<updates done>``: all that a resumed run needs; one that is there stays."""
        path = Path(self.config.output_dir) / f"checkpoint-{self.done}"
        if self.accelerator.is_main_process and not (path / COMPLETE).is_file():
            try:
                with files.whole_dir(path) as part:
                    self._write_checkpoint(part)
                    mark_complete(part, self.done)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"checkpoint: expected to write {path}, got {error}; earlier checkpoints are "
                    "intact: free some space and go on with --resume_from_checkpoint true"
                ) from error
            self._drop_old_checkpoints()
        self.accelerator.wait_for_everyone()
        return path

    def _write_checkpoint(self, part: Path) -> None:
        self.module.policy.save_pretrained(part / "policy")
        self.tokenizer.save_pretrained(part / "policy")
        self.module.value.save_pretrained(part / "value")
        moments = {
            f"{name}/{key}": tensor
            for name, parameter in self.module.named_parameters()
            for key, tensor in self.optimizer.state[parameter].items()
        }
        save_file(moments, part / "optimizer.safetensors")
        running = isinstance(self.normalizer, RunningLocationNormalizer)
        state = {
            "update": self.done,
            "kl_coef": self.kl_coef,
            "normalizer": self.normalizer.state_dict() if running else None,
            "history": self.history,
            "identity": self._identity,
        }
        files.write_json(part / "state.json", state)

    def _drop_old_checkpoints(self) -> None:
        if self.config.save_total_limit:
            found = Path(self.config.output_dir).glob("checkpoint-*")
            steps = {p.name.rpartition("-")[2]: p for p in found}
            numbered = sorted((int(step), p) for step, p in steps.items() if step.isdigit())
            for _, path in numbered[: -self.config.save_total_limit]:
                shutil.rmtree(path)

    def load_checkpoint(self, path: Path) -> None:
        """Continues from ``path``; UserError when it belongs to a run of other settings."""
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        now = self._identity
        changed = [f"{k} {v} (now {now[k]})" for k, v in state["identity"].items() if v != now[k]]
        if changed:
            raise UserError(
                f"resume_from_checkpoint: expected the settings of {path}, got another run's: "
                f"{', '.join(changed)}; repeat the first command line, or start in a new output_dir"
            )
        for model, name in ((self.module.policy, "policy"), (self.module.value, "value")):
            saved = type(model).from_pretrained(path / name, dtype=torch.float32)
            model.load_state_dict(saved.state_dict())
        parameters = dict(self.module.named_parameters())
        for key, tensor in load_file(path / "optimizer.safetensors").items():
            name, _, part = key.rpartition("/")
            parameter = parameters[name]
            device = "cpu" if part == "step" else parameter.device
            self.optimizer.state[parameter][part] = tensor.to(device)
        if state["normalizer"] is not None:
            self.normalizer.load_state_dict(state["normalizer"])
        self.done, self.kl_coef = state["update"], state["kl_coef"]
        self.history = state["history"]

    def save_policy(self) -> None:
        """Policy and tokenizer into ``output_dir``, as ``from_pretrained`` reads them."""
        if self.accelerator.is_main_process:
            with files.files_into(self.config.output_dir) as part:
                self.module.policy.save_pretrained(part)
                self.tokenizer.save_pretrained(part)
        self.accelerator.wait_for_everyone()
