"""Rollouts and what all models say of them, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from ..models.lm_head import token_stats, token_stats_at
from .config import PPOConfig
from .experience import TokenScores
from .models import PolicyAndValue, state_values
from .rollout import Rollout, generate, prompt_of, seed_from


@dataclass(frozen=True)
class RolloutWorker:
    """Samples from the policy and lets every model read the responses."""

    accelerator: Accelerator
    config: PPOConfig
    tokenizer: Any
    end_token_ids: list[int]
    trained: PolicyAndValue
    ref_policy: Any
    reward_model: Any
    entropy_model: Any | None  # whose entropy cuts segments; None: the reference policy's

    @property
    def rows_per_minibatch(self) -> int:
        return self.config.mini_batch_size // self.accelerator.num_processes

    def minibatches(self, n_rows: int) -> Iterator[slice]:
        """This process's rows by optimizer step."""
        return _slices(slice(0, n_rows), self.rows_per_minibatch)

    def micro_batches(self, rows: slice) -> Iterator[slice]:
        """Those rows by forward pass."""
        return _slices(rows, self.config.per_device_train_batch_size)

    def sample(self, update: int, prompts: Any) -> tuple[list[int], Rollout]:
        """(index of each row's prompt, responses): this process's slice of each minibatch."""
        config, size = self.config, self.rows_per_minibatch
        first = update * config.rollout_batch_size + self.accelerator.process_index * size
        starts = range(first, first + config.rollout_batch_size, config.mini_batch_size)
        rows = [start + i for start in starts for i in range(size)]
        chosen = [prompt_of(row, len(prompts), config.seed) for row in rows]
        ids = [prompts[i]["prompt_ids"] for i in chosen]
        return chosen, self.generate(ids, [seed_from(config.seed, "row", row) for row in rows])

    def generate(self, prompt_ids: list[list[int]], seeds: list[int]) -> Rollout:
        """A response to each prompt, each from its own stream of random numbers."""
        with self.accelerator.autocast():
            return generate(
                self.trained.policy,
                self.tokenizer,
                prompt_ids,
                max_new_tokens=self.config.response_length,
                seeds=seeds,
                temperature=self.config.temperature,
                batch_size=self.config.generation_batch_size,
                end_token_ids=self.end_token_ids,
            )

    @torch.no_grad()
    def score(self, rollout: Rollout) -> TokenScores:
        """What all models say, in the micro-batches that are trained on, so that ratios are 1
        before the first step."""
        found = []
        for rows in self.minibatches(len(rollout)):
            for part in self.micro_batches(rows):
                with self.accelerator.autocast():
                    found.append(self.read(rollout.rows(part)))
        width = rollout.input_ids.shape[1]

        def whole(name: str) -> Any:
            parts = [getattr(scores, name) for scores in found]
            if parts[0] is None:
                return None
            return torch.cat([F.pad(x.float(), (0, width - x.shape[1])) for x in parts])

        return TokenScores(**{field.name: whole(field.name) for field in fields(TokenScores)})

    def read(self, rollout: Rollout) -> TokenScores:
        """One pass of every model."""
        ids, attention = rollout.input_ids, rollout.attention_mask
        tokens, temperature = (ids, attention, rollout.action_mask), self.config.temperature
        # Segments are cut by the entropy at temperature 1, whatever is sampled at.
        segments = self.reward_model.granularity == "segment"
        also = {1.0} if segments and self.entropy_model is None else set()
        ref = token_stats_at(self.ref_policy, *tokens, {temperature} | also)
        entropy = None
        if segments:
            cutter = self.entropy_model
            _, entropy = ref[1.0] if cutter is None else token_stats(cutter, *tokens)
        return TokenScores(
            logprobs=token_stats(self.trained.policy, *tokens, temperature)[0],
            ref_logprobs=ref[temperature][0],
            values=state_values(self.trained.value, ids, attention),
            rewards=self.reward_model(ids, attention_mask=attention),
            entropy=entropy,
        )

    def segment_ends(self, rollout: Rollout, scores: TokenScores) -> Tensor:
        """Ends of the segments that the reward model pays."""
        return self.reward_model.segment_ends(
            scores.entropy, rollout.action_mask, rollout.terminated
        )


def _slices(rows: slice, size: int) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(start + size, rows.stop))
