"""PPO on rewards per segment: one loop over accelerate, the same for any number of processes."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from segkernels import PolicyLoss, value_loss

from ..configs import ModelConfig
from ..data.render import stop_token_ids
from ..errors import NonFiniteError
from ..models.loading import check_vocabulary, recompute_activations
from ..models.reward_model import SegmentRewardModel
from ..runtime import files
from ..runtime.checkpoints import (
    check_contents,
    check_newest,
    check_not_beyond,
    check_output_dir,
    check_room,
    drop_old_checkpoints,
    is_whole,
    mark_complete,
    resolve_resume,
    saving,
)
from ..runtime.distributed import any_rank
from ..runtime.finite import check_weights
from ..runtime.identity import Identity, changes_told
from ..runtime.interrupt import Interrupt
from ..runtime.metrics import Metrics
from .checkpoint import (
    TrainingState,
    read_checkpoint,
    run_identity,
    write_checkpoint,
)
from .config import PPOConfig
from .evaluation import Judge, evaluate
from .experience import Experience, TokenScores, build_normalizer, make_experience
from .launch import check_prompts, make_accelerator
from .metrics import METRICS_FILE, MetricsLog, rollout_means, token_means, with_std_drift
from .models import PolicyAndValue, starting_value_model, without_dropout
from .optimization import make_optimizer, make_schedule
from .rollout import Rollout, eos_ids
from .worker import RolloutWorker


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
        eval_fn: Judge | None = None,
        ref_policy: Any = None,
        value_model: SegmentRewardModel | None = None,
        entropy_model: Any = None,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.train_prompts, self.eval_prompts, self.eval_fn = train_prompts, eval_prompts, eval_fn
        self.accelerator = make_accelerator(config)
        check_prompts(config, train_prompts, eval_prompts)
        if self.accelerator.is_main_process:
            check_output_dir(config.output_dir, config.resume_from_checkpoint, METRICS_FILE)
        for model in (policy, reward_model, ref_policy, value_model, entropy_model):
            if model is not None:
                check_vocabulary(model.config, tokenizer)
        self.normalizer = build_normalizer(config, reward_model)
        if value_model is None:
            value_model = starting_value_model(
                config, ModelConfig(policy.name_or_path), reward_model
            )
        ref_policy = copy.deepcopy(policy) if ref_policy is None else ref_policy
        device = self.accelerator.device
        for model in (ref_policy, reward_model, entropy_model):
            if model is not None:
                model.to(device).eval().requires_grad_(False)
        self.module = PolicyAndValue(policy, value_model).float().to(device).requires_grad_(True)
        without_dropout(self.module)
        if config.gradient_checkpointing:
            recompute_activations(policy)
            recompute_activations(value_model)
        # Only gradient checkpointing asks for it: there is no dropout to switch.
        self.module.train(config.gradient_checkpointing)
        self.model = self.accelerator.prepare(self.module)
        stops = stop_token_ids(tokenizer, bool(train_prompts[0].get("conversational")))
        self.worker = RolloutWorker(
            self.accelerator,
            config,
            tokenizer,
            sorted({*stops, *eos_ids(policy, tokenizer)}),
            self.module,
            ref_policy,
            reward_model,
            entropy_model,
        )
        total = config.total_episodes or math.ceil(config.num_episodes * len(train_prompts))
        self.n_updates = math.ceil(total / config.rollout_batch_size)
        self.optimizer = make_optimizer(config, self.module)
        self.learning_rates = make_schedule(config, self.optimizer, self.n_updates)
        self.metrics = Metrics()
        self.log = MetricsLog(self.accelerator, config)
        self.state = TrainingState(kl_coef=config.kl_coef)

    def train(self) -> list[dict[str, float]]:
        """Runs all updates that are left; returns the metrics of every logged update."""
        config, state = self.config, self.state
        checkpoint = resolve_resume(config.output_dir, config.resume_from_checkpoint)
        if checkpoint is not None:
            state = self.load_checkpoint(checkpoint)
            check_not_beyond(state.global_step, self.n_updates, "update")
        if self.accelerator.is_main_process:
            self._check_room()
        self.log.start(state.history)
        if state.global_step == 0 and self._due(config.eval_steps):
            self._log({"update": 0, "episode": 0, **self.evaluate()})
        bar = tqdm(
            total=self.n_updates,
            initial=state.global_step,
            desc="ppo",
            unit="update",
            disable=not self.accelerator.is_main_process,
        )
        with bar, Interrupt(config.output_dir) as interrupt:
            while state.global_step < self.n_updates:
                metrics = self.update()
                state.global_step += 1
                last = state.global_step == self.n_updates
                evaluated = self._due(config.eval_steps) or (last and config.eval_steps)
                if evaluated:
                    metrics |= self.evaluate()
                if evaluated or last or self._due(config.logging_steps):
                    self._log(metrics)
                bar.set_postfix(
                    score=f"{metrics['objective/scores']:.3g}", kl=f"{metrics['objective/kl']:.3g}"
                )
                bar.update()
                stop = interrupt.requested(self.accelerator) and not last
                if stop or self._due(config.save_steps):
                    path = self.save_checkpoint()
                if stop:
                    raise interrupt.stopped(
                        f"stopped after update {state.global_step} of {self.n_updates}, saved as "
                        f"{path}; go on with --resume_from_checkpoint true"
                    )
            self.save_policy()
        return state.history

    def _due(self, every: int | None) -> bool:
        return bool(every and self.state.global_step % every == 0)

    def _log(self, metrics: dict[str, float]) -> None:
        self.state.history.append(metrics)
        self.log.write(metrics)

    def update(self) -> dict[str, float]:
        """One PPO update: rollouts, their scores and advantages, and the optimizer steps on them.

        Returns its metrics.
        """
        config, state, started = self.config, self.state, time.perf_counter()
        prompts, rollout = self.worker.sample(state.global_step, self.train_prompts)
        scores = self.worker.score(rollout)
        self.check_scores(prompts, rollout, scores)
        ends = self.worker.segment_ends(rollout, scores)
        experience = make_experience(
            config, prompts, rollout, scores, ends, self.normalizer, state.kl_coef
        )
        self.metrics.means(
            rollout_means(
                config, experience, self.normalizer, state.kl_coef, self.accelerator.num_processes
            )
        )
        learning_rates = self.learning_rates(state.global_step)
        for group, learning_rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = learning_rate
        for _ in range(config.num_ppo_epochs):
            for rows in self.worker.minibatches(len(rollout)):
                self.train_minibatch(experience, rows)
        metrics = with_std_drift(self.metrics.reduce(self.accelerator))
        kl_coef = state.kl_coef
        if config.kl_target is not None:
            # Ziegler et al. 2019, section 2.2.
            error = min(max(metrics["objective/kl"] / config.kl_target - 1, -0.2), 0.2)
            state.kl_coef *= 1 + error * config.rollout_batch_size / config.kl_horizon
        seconds = time.perf_counter() - started
        return {
            "update": state.global_step + 1,
            "episode": (state.global_step + 1) * config.rollout_batch_size,
            **metrics,
            "objective/kl_coef": kl_coef,
            "lr": learning_rates[0],
            "value_lr": learning_rates[1],
            "seconds": seconds,
            "eps": config.rollout_batch_size / seconds,
        }

    def check_scores(self, prompts: list[int], rollout: Rollout, scores: TokenScores) -> None:
        """NonFiniteError, naming models and prompts, for a NaN or infinity at an action."""
        bad = {
            name: (~x.isfinite() & rollout.action_mask).any(1)
            for name, x in vars(scores).items()
            if x is not None
        }
        rows = torch.stack(list(bad.values())).any(0)
        if any_rank(self.accelerator, rows.any()):
            names = [name for name, found in bad.items() if found.any()]
            self._stop_non_finite(names, [prompts[i] for i in rows.nonzero().flatten()])

    def train_minibatch(self, experience: Experience, rows: slice) -> None:
        """One optimizer step on some rows, in micro-batches."""
        config, accelerator = self.config, self.accelerator
        n_tokens = accelerator.reduce(experience.rollout.action_mask[rows].sum(), "sum")
        bad: list[Tensor] = []
        self.optimizer.zero_grad()
        for part in self.worker.micro_batches(rows):
            batch, last = experience.rows(part), part.stop == rows.stop
            mask = batch.rollout.action_mask
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                policy, values, of_values = self.losses(batch)
                # Shares of the whole minibatch, so that its division does not matter.
                share: Tensor | float = len(batch.rollout) / config.mini_batch_size
                if config.loss_aggregation == "token-mean":
                    share = mask.sum() / n_tokens
                loss, loss_of_values = share * policy.loss, share * of_values
                # Data-parallel gradients are averaged over processes; these are shares of a sum.
                accelerator.backward((loss + loss_of_values) * accelerator.num_processes)
            with torch.no_grad():
                bad.append(((~policy.logprobs.isfinite() | ~values.isfinite()) & mask).any(1))
                self.metrics.mean("loss/policy_avg", loss, share)
                self.metrics.mean("loss/value_avg", loss_of_values, share)
                self.metrics.means(token_means(batch, policy, values, config.cliprange_value))
        norms = {
            name: nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            for name, model in (("policy", self.module.policy), ("value", self.module.value))
        }
        finite = torch.stack([*norms.values(), loss, loss_of_values]).isfinite().all()
        if any_rank(accelerator, ~finite):
            found = torch.cat(bad).nonzero().flatten().tolist() or range(rows.stop - rows.start)
            prompts = [experience.prompts[rows.start + i] for i in found]
            self._stop_non_finite(["gradient of the loss"], prompts)
        for name, norm in norms.items():
            self.metrics.mean(f"{name}/grad_norm", norm, 1)
        self.optimizer.step()
        step = f"an optimizer step of update {self.state.global_step + 1}"
        check_weights(accelerator, self.module, self.optimizer, step, config.output_dir)

    def losses(self, batch: Experience) -> tuple[PolicyLoss, Tensor, Tensor]:
        """(policy loss, values, value loss) of a micro-batch."""
        config, rollout = self.config, batch.rollout
        policy, values = self.model(
            rollout.input_ids,
            rollout.attention_mask,
            rollout.action_mask,
            batch.logprobs,
            batch.advantages,
            temperature=config.temperature,
            clip=config.cliprange,
            aggregation=config.loss_aggregation,
        )
        of_values = value_loss(
            values,
            batch.values,
            batch.returns,
            rollout.action_mask,
            clip=config.cliprange_value,
            aggregation=config.loss_aggregation,
        )
        return policy, values, of_values

    def _stop_non_finite(self, names: list[str], prompts: list[int]) -> None:
        """Saves the weights, which nothing non-finite has touched, and raises on every process."""
        names = sorted(set(gather_object(names)))
        prompts = sorted(set(gather_object(prompts)))
        path = self.save_checkpoint()
        raise NonFiniteError(
            f"update {self.state.global_step + 1}: expected finite numbers, got NaN or infinity in "
            f"{', '.join(names)} for prompts {prompts[:8]}{' ...' if len(prompts) > 8 else ''} "
            f"(row numbers of the tokenized prompts); the last good weights are in {path}; look at "
            "those rows or lower the learning rates, then --resume_from_checkpoint true"
        )

    def evaluate(self) -> dict[str, float]:
        """``evaluation.evaluate`` on the evaluation prompts."""
        return evaluate(self.worker, self.eval_prompts, self.eval_fn)

    # Files

    @functools.cached_property
    def _identity(self) -> Identity:
        worker = self.worker
        models = (worker.ref_policy, worker.reward_model, worker.entropy_model)
        return run_identity(self.config, self.train_prompts, self.tokenizer, *models)

    def _check_room(self) -> None:
        config = self.config
        policy, both = (
            sum(weight.nbytes for weight in module.parameters())
            for module in (self.module.policy, self.module)
        )
        left = self.n_updates - self.state.global_step
        n_checkpoints = math.ceil(left / config.save_steps) if config.save_steps else 0
        # Beside the weights, Adam's two moments of each.
        warning = check_room(
            config.output_dir, 3 * both, policy, n_checkpoints, config.save_total_limit
        )
        if warning:
            tqdm.write(warning)

    def save_checkpoint(self) -> Path:
        """``checkpoint-<updates done>``: all that a resumed run needs; one that is there stays."""
        output_dir, state = Path(self.config.output_dir), self.state
        path = output_dir / f"checkpoint-{state.global_step}"
        if self.accelerator.is_main_process and not is_whole(path):
            with saving(path.name, output_dir), files.whole_dir(path) as part:
                write_checkpoint(
                    part, self.module, self.tokenizer, self.optimizer, self.normalizer, state,
                    self._identity,
                )  # fmt: skip
                mark_complete(part, state.global_step)
            drop_old_checkpoints(output_dir, self.config.save_total_limit)
        self.accelerator.wait_for_everyone()
        return path

    def load_checkpoint(self, path: Path) -> TrainingState:
        """Continues from ``path``; UserError when it belongs to a run of other settings."""
        if self.accelerator.is_main_process:
            check_contents(path)
        self.state, changed = read_checkpoint(
            path, self.module, self.optimizer, self.normalizer, self._identity
        )
        if changed and self.accelerator.is_main_process:
            check_newest(self.config.output_dir, path)
            tqdm.write(changes_told(changed))
        return self.state

    def save_policy(self) -> None:
        """Policy and tokenizer into ``output_dir``, as ``from_pretrained`` reads them."""
        output_dir = self.config.output_dir
        if self.accelerator.is_main_process:
            with saving("the policy", output_dir), files.files_into(output_dir) as part:
                self.module.policy.save_pretrained(part)
                self.tokenizer.save_pretrained(part)
        self.accelerator.wait_for_everyone()
